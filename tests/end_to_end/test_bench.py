"""A bench as a user starts it: searched, trained, measured, resumed, and read as one table."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import preloaded
import pytest

from wegeft_cli.analysis.report import report
from wegeft_cli.analysis.report_page.lines import PALETTE
from wegeft_cli.artifacts.adapter_files import WEIGHTS_NAME
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.sweep import load_sweep
from wegeft_cli.runs import children
from wegeft_cli.runs.bench import measures
from wegeft_cli.runs.bench.bench import bench
from wegeft_cli.runs.bench.contestants import (
    choose_search_seeds,
    load_entries,
    read_contestants,
    read_seeds,
)
from wegeft_cli.runs.bench.table import Candidate, find_best, join_seeds, note_edges
from wegeft_cli.runs.children import RunQueue, list_outcomes, list_places
from wegeft_cli.runs.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"data": {"validation_fraction": 0.2}, "train": {"max_steps": 3}}
SMALL = ["lora:adapter.r=2"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # seven processes: half a minute on a quiet machine
def test_searched_trained_measured_and_resumed(write_recipe, listener, data_dir, monkeypatch):
    monkeypatch.setattr(children.subprocess, "Popen", preloaded.Popen)
    recipe = write_recipe(
        **SETTINGS, eval={"tasks": ["boolq"], "data_dir": str(data_dir), "limit": 2}
    )
    root = recipe.parent / "runs" / "tiny"
    search = ["lora:train.learning_rate=0.01,1e30"]
    options = {"methods": ["wegeft", "lora"], "settings": SMALL, "search": search, "seeds": "1"}
    asked = bench(recipe, ["train.max_skipped_steps=0"], only_commands=True, **options)
    assert [shlex.split(command)[:2] for command in asked.commands] == [["wegeft", "train"]] * 2
    for command in asked.commands[:1]:
        assert train(shlex.split(command)[2], resume="auto").status == "finished"
    result = bench(recipe, ["train.max_skipped_steps=0"], reporter=listener, **options)
    told = json.loads((root / "bench.json").read_text())
    assert told == json.loads(json.dumps(result.to_json()))
    assert "search" in listener.titles
    assert any("lora: the search chooses train.learning_rate=0" in x for x in listener.notes)
    # The rate 1e30 diverges. A note says so, and the other candidate is chosen.
    assert result.status == "failed"
    mine, lora = result.methods
    assert [each.status for each in lora.searched] == ["finished", "failed"]
    assert lora.values == {"train.learning_rate": 0.01}
    assert any("diverged" in note for note in lora.notes)
    assert (mine.searched, mine.values) == ([], {})
    for row in (mine, lora):
        assert list(row.seeds) == [7]
        expected = {
            "score", "validation_loss", "trainable_parameters", "adapter_bytes", "peak_memory_gib",
            "step_seconds", "merge_seconds",
        }  # fmt: skip
        assert set(row.figures) == expected
    assert mine.figures["trainable_parameters"].mean == 896
    assert lora.figures["trainable_parameters"].mean == 768
    assert mine.ratios["trainable_parameters"] == 896 / 768
    assert mine.test is not None
    assert mine.test.difference == pytest.approx(
        mine.seeds[7][result.metric] - lora.seeds[7][result.metric]
    )
    assert result.metric == "score"
    assert not list(root.glob("*/*/merged-by-bench"))
    (theirs,) = (root / "method_comparison").glob("wegeft--*.json")
    values = json.loads(theirs.read_text())
    assert list(values) == ["run_info", "train_info", "meta_info"]
    assert values["train_info"]["num_trainable_params"] == 896
    assert values["train_info"]["metrics"][-1]["test accuracy"] == mine.seeds[7]["score"]
    # An ordinary run: the same as one trained alone.
    alone = train(recipe, ["train.max_skipped_steps=0", f"output_dir={recipe.parent / 'alone'}"])
    assert alone.validation_loss == mine.seeds[7]["validation_loss"]
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/*/*.json")}
    again = bench(recipe, ["train.max_skipped_steps=0"], reporter=listener, **options)
    assert again.methods == result.methods
    after = {path: path.stat().st_mtime_ns for path in root.glob("*/*/*.json")}
    changed = {path.parent.name for path in before if before[path] != after[path]}
    assert changed <= {"learning_rate=1e+30_seed=6"}  # what failed is tried again


def test_arguments_are_read():
    search = ["train.learning_rate=1e-4,1e-3", "big:train.warmup_ratio=[0, 0.1]"]
    found = read_contestants(["wegeft", "big=lora"], ["big:adapter.r=32"], search)
    assert [(each.label, each.type, each.settings) for each in found] == [
        ("wegeft", "wegeft", ()),
        ("big", "lora", ("adapter.r=32",)),
    ]
    assert found[0].search == ("sweep.train.learning_rate=[1e-4,1e-3]",)
    assert found[1].search == (*found[0].search, "sweep.train.warmup_ratio=[0, 0.1]")
    assert read_seeds("3", 42) == [42, 43, 44]
    assert read_seeds("5,9", 42) == [5, 9]
    assert choose_search_seeds(42, [42, 43], 1) == [41]
    assert choose_search_seeds(0, [0], 1) == [2**32 - 1]
    assert choose_search_seeds(42, [41, 42], 2) == [40, 39]
    with pytest.raises(UserError, match="at least 1"):
        choose_search_seeds(42, [42], 0)


def test_the_mean_over_the_seeds_of_the_search_decides(write_recipe):
    words = ["train.learning_rate=1e-3,1e-2"]
    (contestant,) = read_contestants(["lora"], [], words)
    (entry,) = load_entries(write_recipe(**SETTINGS), [], [contestant], [41, 40])
    assert [len(runs) for _, runs in entry.combinations] == [2, 2]
    assert entry.has_search
    (alone,) = load_entries(
        write_recipe(**SETTINGS), [], read_contestants(["lora"], [], []), [41, 40]
    )
    assert not alone.has_search
    runs = [run for _, runs in entry.combinations for run in runs]
    ended = [replace(each, status="finished") for each in list_outcomes(runs)]
    # By the first seed alone the smaller rate is better.
    candidates = [
        join_seeds(values, ended[2 * i : 2 * i + 2], losses)
        for i, ((values, _), losses) in enumerate(
            zip(entry.combinations, ([1.0, 3.0], [1.5, 1.5]), strict=True)
        )
    ]
    assert [each.validation_loss for each in candidates] == [2.0, 1.5]
    best = find_best(candidates)
    assert best is not None
    assert best.values == {"train.learning_rate": 1e-2}
    half = [ended[0], replace(ended[1], status="failed", error="diverged")]
    assert join_seeds({}, half, [1.0, None]) == Candidate({}, "failed", None, "diverged")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["loraa"], [], []), "did you mean `lora`"),
        ((["lora", "lora"], [], []), "lora-2=lora"),
        (([], [], []), "names no method"),
        ((["lora"], ["adapter.r=2"], []), "names no method"),
        ((["lora"], ["lara:adapter.r=2"], []), "did you mean `lora`"),
        ((["lora"], [], ["train.learning_rate"]), "is not KEY=VALUE"),
        ((["a/b=lora"], [], []), "no usable name"),
    ],
)
def test_wrong_arguments_are_told(arguments, words):
    with pytest.raises(UserError) as caught:
        read_contestants(*arguments)
    assert words in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("text", ["0", "1,1", "two", "-1", "4294967296,1", "", "²"])
def test_wrong_seeds_are_told(text):
    with pytest.raises(UserError, match="--seeds"):
        read_seeds(text, 42)


def refuse(recipe, *overrides, **options):
    """Return the errors that are raised before the first run, which leave no file behind."""
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        bench(recipe, overrides, **{"methods": ["wegeft", "lora"], **options})
    assert not (recipe.parent / "runs").exists()
    found = caught.value.exceptions if isinstance(caught.value, ExceptionGroup) else [caught.value]
    return "; ".join(f"{fault} {fault.hint}" for fault in found)


def test_faults_are_told_before_the_first_run(write_recipe):
    recipe = write_recipe(**SETTINGS)
    no_rows = write_recipe("none")
    search = ["train.learning_rate=0.1,0.2"]
    assert "no validation rows" in refuse(no_rows, search=search)
    assert "neither validation rows nor test sets" in refuse(no_rows)
    unequal = refuse(recipe, settings=["lora:data.max_length=32"])
    assert "data.max_length: is 64 for wegeft and 32 for lora" in unequal
    assert "train.max_steps" in refuse(recipe, settings=["lora:train.max_steps=9"])
    assert "none of --methods" in refuse(recipe, baseline="dora")
    seen = refuse(recipe, "eval.tasks=[boolq]", "train.eval_tasks=[boolq]")
    assert "scores boolq in training" in seen
    # A method that the task or the base does not take.
    assert "linear_probe" in refuse(recipe, methods=["lora", "linear_probe"])
    assert "no bias to train (in bitfit)" in refuse(recipe, methods=["lora", "bitfit"])
    unmet = refuse(recipe, settings=["lora:adapter.match_params=10"])
    assert "rank 1 has 384 and rank 2 has 768 (in lora)" in unmet
    assert "no_such" in refuse(recipe, settings=["lora:adapter.target_modules=[no_such]"])
    # A fault of all methods is shown once, one of some names them.
    both = refuse(recipe, "train.max_steps=0", settings=["lora:adapter.r=0"])
    assert both.count("must be -1 or at least 1; got 0") == 1
    assert "must be at least 1; got 0 (in lora)" in both
    assert "learns a prompt in front of the rows" in refuse(recipe, methods=["prompt_tuning"])
    assert "`lora`" in refuse(recipe, methods=["lorra"])


def test_a_dry_run_checks_every_method_and_trains_nothing(write_recipe, tmp_path):
    result = bench(write_recipe(**SETTINGS), methods=["wegeft", "lora"], dry_run=True)
    assert (result.status, len(result.methods), result.seeds) == ("checked", 2, [7, 8, 9])
    assert not (tmp_path / "runs").exists()


def test_the_lowest_validation_loss_is_chosen_and_an_edge_is_told():
    key = "train.learning_rate"
    losses = {0.1: 2.0, 0.2: 1.0, 0.3: 1.0, 0.4: float("nan")}
    searched = [Candidate({key: rate}, "finished", loss) for rate, loss in losses.items()]
    best = find_best([Candidate({key: 0.05}, "failed", 0.5), *searched])
    assert best == searched[1]
    assert note_edges(searched, best) == []
    assert "largest tried" in note_edges(searched[:2], best)[0]
    assert find_best([Candidate({key: 0.05}, "failed")]) is None


def test_runs_at_the_same_time_share_the_cores_or_the_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert list_places(1) == [{}]
    assert len(list_places(2)) == 2
    assert set(list_places(2)[0]) == {"OMP_NUM_THREADS"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in list_places(2)] == ["3", "5"]
    with pytest.raises(UserError, match="this machine has 2"):
        list_places(3)


def test_a_report_shows_the_table_of_methods(write_recipe, tmp_path):
    pytest.importorskip("vl_convert")
    folder = tmp_path / "compared"
    size = {"mean": 43008.0, "std": 0.0, "n": 2}
    loss = {"mean": 1.25, "std": 0.5, "n": 2}
    figures = {"validation_loss": loss, "trainable_parameters": size}
    row = {"figures": figures, "ratios": {"validation_loss": 1.5}, "num_seeds": 2, "notes": []}
    methods = []
    for label in ("lora", "<b>mine"):
        write = {"seed": 1, "output_dir": str(folder / label / "seed=1"), "train": {"max_steps": 1}}
        train(write_recipe(**write))
        test = {"t_test_p": 0.125, "sign_flip_p": None}
        own = {"method": label, "values": {"train.learning_rate": 0.1}, "seeds": {"1": {}}}
        methods.append({**row, **own, "test": test, "notes": [f"note of {label}"]})
    runs = [
        {"name": f"{label}/seed=1", "status": "finished", "values": {"seed": 1}}
        for label in ("lora", "<b>mine", "../compared/lora")
    ]
    values = {"status": "finished", "metric": "validation_loss", "baseline": "lora"}
    text = json.dumps({**values, "seeds": [1], "methods": methods, "runs": runs})
    (folder / "bench.json").write_text(text)
    result = report([folder], look_inside=False)
    page = (folder / "report.html").read_text()
    assert result.output == folder / "report.html"
    assert result.runs == ["lora/seed=1", "<b>mine/seed=1"]
    assert "1.25 ± 0.5 (1.5 x)" in page
    assert "43,008" in page
    assert "4.301e+04" not in page
    assert "note of &lt;b&gt;mine" in page
    assert "<b>mine" not in page
    assert "0.125" in page
    assert "Validation loss and trainable parameters" in page
    # Without JavaScript, too: a bar of the deviation and a mark for each method.
    still = page.partition('data-chart="chart-bench-0"')[2].partition("</figure>")[0]
    bars, _, marks = still.partition("layer_0_marks")[2].partition("layer_1_marks")
    for color in PALETTE[:2]:
        assert bars.count(f'stroke="{color}"') == marks.count(f'fill="{color}"') == 1
    (folder / "bench.json").write_text('{"methods": [{}]}')
    with pytest.raises(UserError, match="damaged"):
        report([folder], look_inside=False)


@pytest.mark.parametrize("jobs", [1, 2])
def test_as_many_runs_as_places_train_at_once_and_a_stop_reaches_all(
    write_recipe, monkeypatch, listener, jobs
):
    """Each process is an object that ends at its third look."""
    started, running, most = [], set(), []

    class Stub:
        def __init__(self, words, log, environment):
            self.name, self.left = words[1].split("/")[-2], 3
            started.append((self.name, environment["PLACE"]))
            running.add(self.name)
            most.append(len(running))

        def wait(self, seconds):
            self.left -= 1
            return None if self.left else 0

        def stop(self):
            self.left = 1

        def describe_end(self, code, *, was_asked):
            running.discard(self.name)
            if was_asked:
                return children.ChildEnd("interrupted")
            is_bad = self.name == "seed=2"
            return children.ChildEnd("failed" if is_bad else "finished", "bad" if is_bad else None)

    monkeypatch.setattr(children, "Child", Stub)
    monkeypatch.setattr(children, "POLL_SECONDS", 0.001)
    places = [{"PLACE": str(number)} for number in range(jobs)]

    def train_all(should_stop):
        runs = load_sweep(write_recipe(sweep={"seed": [1, 2, 3]})).runs
        queue = RunQueue(runs, list_outcomes(runs), lambda: None, listener, places)
        queue.prepare()
        return queue.train(should_stop), [outcome.status for outcome in queue.outcomes]

    assert train_all(lambda: False) == ("failed", ["finished", "failed", "finished"])
    assert max(most) == jobs
    assert [name for name, _ in started] == ["seed=1", "seed=2", "seed=3"]
    assert {place for _, place in started} == {str(number) for number in range(jobs)}
    assert any("seed=2 failed: bad" in text for text in listener.warnings)
    started.clear()
    ended = train_all(lambda: bool(started))
    assert ended[0] == "interrupted"
    assert ended[1] == ["interrupted"] * len(started) + ["waiting"] * (3 - len(started))


def test_a_run_is_scored_again_when_its_evaluation_changes(write_recipe, monkeypatch):
    """The evaluation is an object that writes a score for each call."""
    calls = []

    def score(words, log, should_stop):
        calls.append(words)
        output = words[words.index("--output") + 1]
        Path(output).write_text(json.dumps({"results": [{"task": "boolq", "score": len(calls)}]}))
        return children.ChildEnd("finished")

    monkeypatch.setattr(measures, "run_child", score)
    recipe = load_recipe(write_recipe(eval={"tasks": ["boolq"], "limit": 2})).recipe
    run_dir = Path(recipe.output_dir)
    (run_dir / "adapter").mkdir(parents=True)
    (run_dir / "adapter" / WEIGHTS_NAME).write_bytes(b"weights")

    def evaluate(**changes):
        asked = replace(recipe, eval=replace(recipe.eval, **changes))
        assert measures.evaluate_run(run_dir, asked, lambda: False).status == "finished"
        return measures.read_scores(run_dir)

    assert evaluate() == evaluate() == {"score": 1.0}
    assert evaluate(limit=1) == evaluate(limit=1) == {"score": 2.0}
    assert evaluate(max_new_tokens=9) == {"score": 3.0}
    assert evaluate() == {"score": 4.0}
    # An interrupted evaluation leaves the record of its settings, and no scores.
    (run_dir / "eval" / "adapter-bench-scores.json").unlink()
    assert evaluate() == {"score": 5.0}
    assert evaluate(tasks=[]) == {"score": 5.0}
    assert len(calls) == 5
