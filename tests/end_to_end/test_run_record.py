"""What a run says of itself holds: while it runs, after a failure, a kill, and asked again."""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import yaml

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.planning.plan import plan
from wegeft_cli.reporter import SilentReporter
from wegeft_cli.runs import build as build_module
from wegeft_cli.runs import start as begin
from wegeft_cli.runs import train as train_module
from wegeft_cli.runs.callbacks import trackers
from wegeft_cli.runs.callbacks.run_files import MetricsFileCallback
from wegeft_cli.runs.train import train

# The first validation stays the best; two steps make a line, so that the last has none.
STOPS_EARLY = {
    "data": {"validation_fraction": 0.2},
    "train": {
        "eval_steps": 1,
        "logging_steps": 2,
        "early_stopping_patience": 2,
        "load_best_model_at_end": True,
        "learning_rate": 1e-30,
    },
}
# These tell of the process that trained.
ITS_OWN = ("finished_at", "peak_memory_gib")


def without_own(values):
    return {key: value for key, value in values.items() if key not in ITS_OWN}


def test_killed_between_adapter_and_record_an_early_stop_is_done(
    write_recipe, monkeypatch, read_run, files_in
):
    recipe = write_recipe(**STOPS_EARLY)
    export_adapter, kept = train_module.export_adapter, []

    def write_and_keep(model, run, *others, **options):
        kept.append(run.directory.record_path.read_bytes())
        return export_adapter(model, run, *others, **options)

    monkeypatch.setattr(train_module, "export_adapter", write_and_keep)
    done = train(recipe)
    assert (done.num_steps, done.stopped_early, done.adapter_step) == (3, True, 1)
    record = read_run(done.run_dir)
    (done.run_dir / "run.json").write_bytes(kept[0])  # as the kill left it
    assert read_run(done.run_dir)["status"] == "running"
    again = train(recipe, resume="auto")
    assert replace(again, peak_memory_gib=None) == replace(done, peak_memory_gib=None)
    assert without_own(read_run(done.run_dir)) == without_own(record)
    before = files_in(done.run_dir)
    train(recipe, resume="auto")
    assert files_in(done.run_dir) == before


def test_a_finished_run_asked_again_tells_the_same(write_recipe, files_in):
    recipe = write_recipe(**STOPS_EARLY)
    done = train(recipe)
    before = files_in(done.run_dir)
    assert done.validation_loss is not None
    assert train(recipe, resume="auto") == done
    assert files_in(done.run_dir) == before


def test_a_run_that_goes_on_takes_back_how_it_ended(write_recipe, monkeypatch, read_run):
    recipe = write_recipe(train={"save_steps": 2})
    on_log, run_dir = MetricsFileCallback.on_log, recipe.parent / "runs" / "tiny"

    def fail(self, trainer, metrics):
        if metrics.step == 4:
            raise MachineError("the disk is gone")
        on_log(self, trainer, metrics)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsFileCallback, "on_log", fail)
        with pytest.raises(MachineError):
            train(recipe)
    told = read_run(run_dir)
    assert (told["status"], told["error"]) == ("failed", "the disk is gone")
    assert told["num_steps"] == 4
    meanwhile = []

    def look():
        run = read_run(run_dir)
        meanwhile.append((run["status"], run["error"], run["finished_at"]))
        return False

    train(recipe, resume="auto", should_stop=look)
    assert set(meanwhile) == {("running", None, None)}
    assert read_run(run_dir)["error"] is None


def test_a_failed_attempt_does_not_report_the_figures_of_an_earlier_one(
    write_recipe, monkeypatch, read_run, stop_after
):
    recipe = write_recipe(data={"validation_fraction": 0.2}, train={"eval_steps": 1})
    run_dir = train(recipe, should_stop=stop_after(2)).run_dir
    before = read_run(run_dir)
    assert (before["status"], before["num_steps"]) == ("interrupted", 2)
    assert before["validation"]

    def fail(*args, **options):
        raise MachineError("the weights cannot be read")

    monkeypatch.setattr(build_module, "load_base", fail)
    with pytest.raises(MachineError):
        train(recipe, resume="auto")
    after = read_run(run_dir)
    assert (after["status"], after["num_steps"]) == ("failed", 2)
    assert after["started_at"] > before["finished_at"]
    assert {after[name] for name in ("final_loss", "best_step", "peak_memory_gib")} == {None}
    assert after["validation"] == {}


def test_a_base_still_on_a_hub_is_compared_once_it_is_loaded(
    write_recipe, monkeypatch, stop_after, llama_dir, build_llama_dir, tmp_path, read_run
):
    base = shutil.copytree(llama_dir, tmp_path / "base")
    recipe = write_recipe(model={"name_or_path": str(base)})
    run_dir = train(recipe, should_stop=stop_after(2)).run_dir
    fingerprint = read_run(run_dir)["base_fingerprint"]
    find, load, is_here = begin.find_base_folder, build_module.load_base, []

    def load_it(section, **options):
        is_here.append(True)
        return load(section, **options)

    monkeypatch.setattr(build_module, "load_base", load_it)
    monkeypatch.setattr(begin, "find_base_folder", lambda *args: find(*args) if is_here else None)
    assert train(recipe, resume="auto", should_stop=stop_after(2)).num_steps == 4
    shutil.copy(build_llama_dir(seed=1) / "model.safetensors", base)
    for _ in range(2):  # a refusal does not forget what it was held against
        is_here.clear()
        with pytest.raises(UserError, match="has changed since the run began"):
            train(recipe, resume="auto")
        assert is_here
        assert read_run(run_dir)["base_fingerprint"] == fingerprint


def test_a_tracker_that_is_down_once_keeps_its_run(write_recipe, monkeypatch, stop_after, read_run):
    recipe = write_recipe(logging={"report_to": "tensorboard"})
    run_dir = train(recipe, should_stop=stop_after(2)).run_dir
    ids = read_run(run_dir)["trackers"]
    assert ids

    def refuse(*args):
        raise ConnectionError("no network")

    with monkeypatch.context() as patched:
        patched.setitem(trackers._TRACKERS, "tensorboard", refuse)
        train(recipe, resume="auto", should_stop=stop_after(2))
    assert read_run(run_dir)["trackers"] == ids


@pytest.fixture
def relative(write_recipe, llama_dir, data_dir, tmp_path, monkeypatch):
    """A recipe whose every path hangs on the working folder, which is not the recipe's."""
    place = tmp_path / "place"
    place.mkdir()
    shutil.copytree(llama_dir, place / "base")
    shutil.copytree(data_dir, place / "tests")
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (place / "my.jinja").write_text(template)
    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(8)]
    for name in ("rows.jsonl", "held.jsonl"):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(place)
    return write_recipe(
        model={"name_or_path": "base"},
        data={
            "train": [{"path": "rows.jsonl"}],
            "validation": [{"path": "./held.jsonl"}],
            "template": "my.jinja",
            "cache_dir": "kept",
        },
        eval={"data_dir": "../place/tests"},
    )


def test_the_runs_own_recipe_leads_to_the_same_files_from_anywhere(
    relative, stop_after, monkeypatch, tmp_path
):
    run_dir = train(relative, should_stop=stop_after(1)).run_dir
    kept = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    place = tmp_path / "place"
    paths = [
        kept["model"]["name_or_path"],
        kept["data"]["train"][0]["path"],
        kept["data"]["validation"][0]["path"],
        kept["data"]["template"],
        kept["data"]["cache_dir"],
        kept["eval"]["data_dir"],
    ]
    names = ["base", "rows.jsonl", "held.jsonl", "my.jinja", "kept", "tests"]
    assert paths == [str(place / name) for name in names]
    assert train(relative, resume="auto", should_stop=stop_after(1)).num_steps == 2
    monkeypatch.chdir("/")
    assert train(run_dir / "recipe.yaml", resume="auto").status == "finished"


def test_an_earlier_versions_relative_paths_are_the_same_files(relative, stop_after, tmp_path):
    run_dir = train(relative, should_stop=stop_after(1)).run_dir
    kept = run_dir / "recipe.yaml"
    text = kept.read_text()
    earlier = text.replace(f"{tmp_path / 'place'}{os.sep}", "")
    assert earlier != text
    kept.write_text(earlier)
    assert train(relative, resume="auto", should_stop=stop_after(1)).num_steps == 2
    kept.write_text(earlier.replace("rows.jsonl", "held.jsonl"))
    with pytest.raises(UserError, match=r"another recipe: data\.train\[0\]\.path"):
        train(relative, resume="auto")


def test_a_model_on_a_hub_keeps_its_name(write_recipe, tmp_path):
    from wegeft_cli.recipe.load import load_recipe
    from wegeft_cli.runs.resume_rules import with_absolute_paths

    sections = {"model": {"name_or_path": "some/model"}, "data": {"train": [{"path": "some/set"}]}}
    kept = with_absolute_paths(load_recipe(write_recipe(**sections)))
    assert (kept.model.name_or_path, kept.data.train[0].path) == ("some/model", "some/set")


def test_the_test_set_of_a_classifier_is_written_with_its_absolute_path(
    write_recipe, tmp_path, monkeypatch
):
    from wegeft_cli.recipe.load import load_recipe
    from wegeft_cli.runs.resume_rules import with_absolute_paths

    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "good", "label": "yes"}\n')
    data = {"train": [{"path": "train.jsonl"}], "test": [{"path": "test.jsonl"}]}
    recipe = write_recipe(task="sequence_classification", data=data)
    monkeypatch.chdir("/")
    kept = with_absolute_paths(load_recipe(recipe))
    assert [source.path for source in kept.data.test] == [str(recipe.parent / "test.jsonl")]


def test_a_run_without_validation_leaves_nothing_on_the_progress_line(write_recipe, monkeypatch):
    shown = {}

    class Recorder(SilentReporter):
        @contextmanager
        def progress(self, title, total):
            shown.clear()
            yield lambda done, **figures: shown.update(figures)

    train(write_recipe(), reporter=Recorder())
    assert shown["loss"]
    assert shown["scoring"] == ""


@pytest.fixture
def set_free(monkeypatch, tmp_path):
    """A function that lets the disk have so many free bytes."""
    usage = shutil.disk_usage(tmp_path)

    def set_free(num_bytes):
        free = usage._replace(free=int(num_bytes))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)

    return set_free


def test_the_disk_is_measured_against_the_plans_estimate(write_recipe, set_free, tmp_path):
    recipe = write_recipe(train={"save_steps": 1, "save_total_limit": 3})
    one = plan(recipe).checkpoint_gib * 2**30
    set_free(4.1 * one)  # three that stay and the one being written
    assert train(recipe, dry_run=True).status == "checked"
    for change in ("train.save_total_limit=4", "train.save_total_limit=null"):
        with pytest.raises(MachineError, match="needed for the run's checkpoints"):
            train(recipe, [change], dry_run=True)
    set_free(3.9 * one)
    with pytest.raises(MachineError, match="needed for the run's checkpoints"):
        train(recipe)
    assert not (tmp_path / "runs").exists()


def test_checkpoints_that_lie_there_need_no_more_disk(write_recipe, set_free, stop_after):
    recipe = write_recipe(train={"save_steps": 1, "save_total_limit": 2})
    one = plan(recipe).checkpoint_gib * 2**30
    train(recipe, should_stop=stop_after(3))
    set_free(0.9 * one)
    with pytest.raises(MachineError, match="needed for the run's checkpoints"):
        train(recipe, resume="auto")
    set_free(1.1 * one)
    assert train(recipe, resume="auto").status == "finished"
    set_free(0)
    assert train(recipe, resume="auto").status == "finished"
