"""A run begins in a folder that is its own, alone, and leaves word of how it ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import preloaded
import pytest
import torch

from wegeft_cli.artifacts.adapter_files import CONFIG_NAME
from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.distributed.signals import STOP_SIGNALS, StopRequest
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.methods.registry import find_method
from wegeft_cli.runs import cpu_advice
from wegeft_cli.runs import start as begin
from wegeft_cli.runs.train import train

PATIENCE_SECONDS = 240


def test_a_run_that_came_between_the_look_and_the_lock_is_left_alone(
    write_recipe, monkeypatch, files_in, tmp_path
):
    """The second start looks at an empty folder; before it has the lock, the first one is done."""
    recipe = write_recipe()
    look = begin.check_resume

    def look_and_be_overtaken(*args, **options):
        found = look(*args, **options)
        monkeypatch.setattr("wegeft_cli.runs.train.check_resume", look)
        train(recipe)
        return found

    monkeypatch.setattr("wegeft_cli.runs.train.check_resume", look_and_be_overtaken)
    run_dir = tmp_path / "runs" / "tiny"
    with pytest.raises(UserError, match=r"already holds a run .*finished"):
        train(recipe)
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    before = files_in(run_dir)
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe)
    assert files_in(run_dir) == before


def test_a_folder_that_cannot_be_written_is_refused_before_the_checks(
    write_recipe, tmp_path, monkeypatch
):
    recipe = write_recipe()
    monkeypatch.setattr("wegeft_cli.artifacts.run_directory.os.access", lambda *args: False)
    for options in ({"dry_run": True}, {"resume": "auto"}):
        with pytest.raises(UserError, match="is not writable") as caught:
            train(recipe, **options)
        assert caught.value.key == "output_dir"


def test_links_that_lead_nowhere_are_refused(write_recipe, tmp_path):
    recipe = write_recipe()
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("dangling", "loop", "loop/run"):
        with pytest.raises(UserError, match=r"is a link to .* which does not exist") as caught:
            train(recipe, [f"output_dir={tmp_path / name}"])
        assert caught.value.key == "output_dir"


def test_an_earlier_run_is_replaced_on_request(write_recipe, files_in, read_run):
    recipe = write_recipe()
    run_dir = train(recipe).run_dir
    (run_dir / "notes.txt").write_text("my own")
    (run_dir / "eval").mkdir()
    (run_dir / "eval" / "adapter-scores.json").write_text("{}")
    before = files_in(run_dir)
    with pytest.raises(UserError, match="already holds a run") as caught:
        train(recipe, ["train.max_steps=3"])
    assert "--overwrite" in caught.value.hint
    with pytest.raises(UserError, match="contradicts --resume"):
        train(recipe, overwrite=True, resume="auto")
    with pytest.raises(UserError, match="model"):
        train(recipe, ["model.name_or_path=/missing"], overwrite=True)
    train(recipe, ["train.max_steps=3"], overwrite=True, dry_run=True)
    assert files_in(run_dir) == before
    result = train(recipe, ["train.max_steps=3"], overwrite=True)
    assert (result.status, result.num_steps, read_run(run_dir)["num_steps"]) == ("finished", 3, 3)
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000003"]
    assert (run_dir / "notes.txt").read_text() == "my own"
    assert not (run_dir / "eval").exists()


def test_all_faults_of_model_targets_and_data_are_raised_together(write_recipe):
    recipe = write_recipe()
    with pytest.raises(ExceptionGroup) as caught:
        train(recipe, ["adapter.target_modules=[nosuch_proj]", "data.train[0].path=missing.jsonl"])
    assert {fault.key for fault in caught.value.exceptions} == {
        "adapter.target_modules",
        "data.train[0].path",
    }
    words = ["model.name_or_path=/missing", "data.train[0].path=missing.jsonl"]
    with pytest.raises(ExceptionGroup) as caught:
        train(recipe, words, dry_run=True)
    assert [fault.key for fault in caught.value.exceptions] == [
        "model.name_or_path",
        "data.train[0].path",
    ]


def test_a_moved_run_resumes_where_it_is(write_recipe, tmp_path, stop_after, read_run):
    run_dir = train(write_recipe(), should_stop=stop_after(2)).run_dir
    moved = run_dir.rename(tmp_path / "moved")
    result = train(moved / "recipe.yaml", resume="auto")
    assert (result.run_dir, result.num_steps, result.status) == (moved, 6, "finished")
    assert not run_dir.exists()
    assert str(moved) in (moved / "recipe.yaml").read_text()
    other = tmp_path / "other"
    assert train(moved / "recipe.yaml", [f"output_dir={other}"], dry_run=True).run_dir == other
    assert train(moved / "recipe.yaml", resume="auto").run_dir == moved


@pytest.mark.slow
def test_of_two_starts_at_once_exactly_one_wins(write_recipe, read_run):
    recipe = write_recipe(train={"max_steps": 30})
    processes = [
        preloaded.Popen(
            [sys.executable, "-m", "wegeft_cli", "train", str(recipe)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2], errors
    loser = next(e for p, e in zip(processes, errors, strict=True) if p.returncode == 2)
    assert "in use by process" in loser or "already holds a run" in loser
    run_dir = recipe.parent / "runs" / "tiny"
    assert read_run(run_dir)["status"] == "finished"
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))


def test_an_adapter_lost_between_two_renames_is_found_again(write_recipe, listener, read_adapter):
    recipe = write_recipe()
    done = train(recipe)
    before = read_adapter(done.run_dir)
    done.adapter_dir.rename(done.run_dir / ".trash-adapter-0123abcd")
    again = train(recipe, resume="auto", reporter=listener)
    assert any("was being replaced" in note for note in listener.notes)
    assert (again.status, read_adapter(again.run_dir)) == ("finished", before)


def test_half_removed_trash_is_no_adapter(write_recipe, read_adapter):
    recipe = write_recipe()
    done = train(recipe)
    before = read_adapter(done.run_dir)
    trash = done.run_dir / ".trash-adapter-0123abcd"
    done.adapter_dir.rename(trash)
    (trash / CONFIG_NAME).unlink()
    again = train(recipe, resume="auto")  # written again from the last checkpoint
    assert read_adapter(again.run_dir) == before
    assert (again.adapter_dir / CONFIG_NAME).is_file()


def test_resume_refuses_a_runs_folder_with_a_hint(write_recipe, stop_after):
    recipe = write_recipe()
    stopped = train(recipe, should_stop=stop_after(2))
    with pytest.raises(UserError, match="not one of its checkpoints") as caught:
        train(recipe, resume=str(stopped.run_dir))
    assert "--resume auto" in caught.value.hint


def test_a_checkpoint_of_another_run_starts_this_one(write_recipe, stop_after, read_adapter):
    whole = train(write_recipe("whole"))
    recipe = write_recipe("first")
    first = train(recipe, should_stop=stop_after(3))
    checkpoint = first.run_dir / "checkpoints" / "step-00000003"
    elsewhere = [f"output_dir={recipe.parent / 'second'}"]
    second = train(recipe, elsewhere, resume=str(checkpoint))
    assert read_adapter(second.run_dir) == read_adapter(whole.run_dir)
    assert not (first.run_dir / "adapter").exists()


@pytest.mark.parametrize(
    ("change", "is_watched", "allowed"),
    [
        ("eval.batch_size=1", False, True),
        ("eval.batch_size=1", True, False),
        ("logging.sample_prompts=[a]", True, True),
        ("train.eval_tasks=[]", False, True),
        ("train.metric_for_best_model=eval_boolq", False, False),
        ("train.ema_decay=0.5", False, False),
        ("train.max_skipped_steps=3", True, True),
    ],
)
def test_what_may_change_when_a_run_goes_on(
    write_recipe, stop_after, data_dir, change, is_watched, allowed
):
    watched = {"metric_for_best_model": "eval_boolq", "load_best_model_at_end": True}
    recipe = write_recipe(
        train={"eval_steps": 3, "eval_tasks": ["boolq"], **(watched if is_watched else {})},
        eval={"data_dir": str(data_dir), "limit": 2, "max_new_tokens": 2},
        logging={"sample_prompts": ["b"]},
    )
    train(recipe, should_stop=stop_after(2))
    if allowed:
        assert train(recipe, [change], resume="auto").status == "finished"
        return
    with pytest.raises(UserError, match="another recipe") as caught:
        train(recipe, [change], resume="auto")
    assert change.partition("=")[0] in caught.value.message


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_the_first_step_a_signal_leaves_at_once(write_recipe, read_run, number, tmp_path):
    """The signal comes while the model is made ready: the status is told, nothing is saved."""
    recipe = write_recipe()
    run_dir = tmp_path / "runs" / "tiny"

    class Interrupting:
        def note(self, text):
            pass

        def warn(self, text):
            pass

        def progress(self, title, total):
            signal.raise_signal(number)
            time.sleep(PATIENCE_SECONDS)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), StopRequest() as should_stop:
        train(recipe, should_stop=should_stop, reporter=Interrupting())
    assert signal.getsignal(number) is before
    assert read_run(run_dir)["status"] == "interrupted"
    assert not (run_dir / "checkpoints").exists()
    assert train(recipe).status == "finished"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_while_training_a_signal_is_obeyed_after_the_step(write_recipe, read_run, number):
    told = []
    with StopRequest(lambda: told.append(number)) as stop:

        def should_stop():
            if not told:
                stop()
                signal.raise_signal(number)
            return stop()

        result = train(write_recipe(), should_stop=should_stop)
    assert told == [number]
    assert (result.status, result.num_steps) == ("interrupted", 1)
    assert read_run(result.run_dir)["status"] == "interrupted"


def test_the_second_ctrl_c_leaves_at_once():
    with StopRequest() as stop:
        stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert threading.current_thread() is threading.main_thread()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_only_ctrl_c_forces_and_only_the_second(number):
    with StopRequest() as stop:
        stop()
        for _ in range(2):
            signal.raise_signal(number)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_nohup_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop()
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_run_json_takes_figures_that_json_has_no_word_for(tmp_path):
    folder = RunDirectory(tmp_path)
    folder.update({"validation": {"2": {"eval_loss": float("nan")}}, "rows": [float("inf"), 1]})
    written = json.loads((tmp_path / "run.json").read_text())
    assert written == {"validation": {"2": {"eval_loss": None}}, "rows": [None, 1]}


def take_torch_memory():
    torch.empty(2**50, dtype=torch.uint8)


def take_numpy_memory():
    np.empty(2**50)


@pytest.mark.parametrize("take", [take_torch_memory, take_numpy_memory])
def test_out_of_memory_is_told_with_keys_and_values(write_recipe, monkeypatch, read_run, take):
    monkeypatch.setattr("wegeft_cli.runs.build.load_base", lambda recipe, **options: take())
    recipe = write_recipe()
    with pytest.raises(MachineError, match=r"out of memory on .* at a peak of \d+\.\d\d") as told:
        train(recipe)
    fault = told.value
    assert fault.exit_code == 1
    for words in (
        "train.per_device_train_batch_size (it is 4)",
        "train.gradient_accumulation_steps (1)",
        "data.max_length (64)",
        "train.gradient_checkpointing: true",
        "train.per_device_eval_batch_size (16)",
    ):
        assert words in fault.hint
    run = read_run(recipe.parent / "runs" / "tiny")
    assert run["status"] == "failed"
    assert "out of memory" in run["error"]


def test_another_number_of_threads_is_told(write_recipe, listener):
    recipe = write_recipe(train={"max_steps": 4})
    threads = torch.get_num_threads()
    stops = iter([False, True])
    train(recipe, should_stop=lambda: next(stops, True))
    try:
        torch.set_num_threads(threads + 1)
        result = train(recipe, resume="auto", reporter=listener)
    finally:
        torch.set_num_threads(threads)
    assert result.status == "finished"
    (told,) = [text for text in listener.warnings if "threads" in text]
    assert f"began with {threads} CPU threads and resumes with {threads + 1}" in told


@pytest.mark.parametrize(
    ("free", "is_set", "warns"), [(1.2, False, True), (4, False, False), (1.2, True, False)]
)
def test_more_threads_than_free_cores_are_warned_of(
    write_recipe, monkeypatch, listener, free, is_set, warns
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if is_set:
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(cpu_advice.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(cpu_advice, "measure_free_cores", lambda: free)
    train(write_recipe(), reporter=listener)
    assert any("OMP_NUM_THREADS=1" in text for text in listener.warnings) is warns


@pytest.mark.parametrize(
    ("dtype", "mixed", "speed", "advice"),
    [
        ("float32", "none", 4.5, "4.5 times as fast as float32: model.dtype=bfloat16 shortens"),
        ("float32", "none", 1.2, None),
        ("float32", "bf16", 4.5, None),
        ("bfloat16", "none", 0.25, "4.0 times as fast as bfloat16: model.dtype=float32 shortens"),
        ("float32", "bf16", 0.25, "model.dtype=float32 train.mixed_precision=none shortens"),
        ("bfloat16", "none", 4.5, None),
        ("float16", "none", 4.5, None),
        ("float32", "fp16", 4.5, None),
    ],
)
def test_the_faster_number_type_is_named(monkeypatch, listener, dtype, mixed, speed, advice):
    monkeypatch.setattr(cpu_advice, "measure_bfloat16_speed", lambda: speed)
    run = SimpleNamespace(
        recipe=SimpleNamespace(train=SimpleNamespace(mixed_precision=mixed)),
        processes=SimpleNamespace(device=torch.device("cpu")),
        method=find_method("lora"),
        reporter=listener,
    )
    base = torch.nn.Linear(5000, 5000, device="meta", dtype=getattr(torch, dtype))
    cpu_advice.advise_dtype(run, base)
    assert len(listener.notes) == (advice is not None)
    assert advice is None or advice in listener.notes[0]


@pytest.mark.parametrize(
    ("method", "key"),
    [("wegeft", "model.dtype=bfloat16"), ("full", "train.mixed_precision=bf16")],
)
def test_a_run_names_the_faster_number_type(write_recipe, monkeypatch, listener, method, key):
    monkeypatch.setattr(cpu_advice, "_SMALL", 1)
    monkeypatch.setattr(cpu_advice, "measure_bfloat16_speed", lambda: 4.5)
    recipe = write_recipe(model={"dtype": "float32"})
    train(recipe, [f"adapter.type={method}"], reporter=listener)
    (note,) = [note for note in listener.notes if "this CPU multiplies" in note]
    assert key in note
    assert train(recipe, [f"adapter.type={method}", key], dry_run=True, overwrite=True)


def test_a_small_base_gets_no_advice_on_its_type(write_recipe, monkeypatch, listener):
    monkeypatch.setattr(cpu_advice, "measure_bfloat16_speed", lambda: 4.5)
    train(write_recipe(model={"dtype": "float32"}), reporter=listener)
    assert not [note for note in listener.notes if "this CPU multiplies" in note]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_speed_of_bfloat16_is_a_ratio_of_two_measured_times(monkeypatch, dtype):
    slow, multiply, now = getattr(torch, dtype), torch.mm, [0.0]

    def take_time(one, other):
        now[0] += 8.0 if one.dtype == slow else 2.0
        return multiply(one, other)

    monkeypatch.setattr(cpu_advice.torch, "mm", take_time)
    monkeypatch.setattr(cpu_advice.time, "perf_counter", lambda: now[0])
    assert cpu_advice.measure_bfloat16_speed() == (4.0 if dtype == "float32" else 0.25)


def test_each_slow_stage_is_announced(write_recipe, listener):
    train(write_recipe(data={"validation_fraction": 0.2}), reporter=listener)
    starts = ("reading the data", "loading the weights", "adding the adapter")
    stages = [note for note in listener.notes if note.startswith(starts)]
    assert [note.startswith(start) for note, start in zip(stages, starts, strict=True)] == [
        True
    ] * 3
