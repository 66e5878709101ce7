"""A sweep as a user starts it: interrupted, gone on with, and read as one table."""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pytest

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.runs import children
from wegeft_cli.runs.children import POLL_SECONDS, run_child, train_words
from wegeft_cli.runs.sweep import sweep
from wegeft_cli.runs.train import train
from wegeft_cli.storage.lock import lock_folder

pytestmark = pytest.mark.usefixtures("one_thread")

# Long enough for a process to load torch and reach its first steps on a busy machine.
PATIENCE_SECONDS = 120
# Rows, one at a time, of a step that takes longer than a sweep takes to pass a signal on.
LONG_STEP = 200
GRID = {"train.learning_rate": [0.01, 1e30], "seed": [1, 2]}
SETTINGS = {
    "data": {"validation_fraction": 0.2},
    "adapter": {"dropout": 0.2},
    # Steps of many passes: the first run must still be there when the signal comes.
    "train": {
        "max_steps": 60,
        "eval_steps": 20,
        "max_skipped_steps": 0,
        "gradient_accumulation_steps": 8,
    },
}


def wait_for(process, is_reached):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for_lines(process, run_dir, num_lines):
    metrics = run_dir / "metrics.jsonl"
    wait_for(
        process,
        lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= num_lines,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)  # six processes: half a minute on a quiet machine
def test_interrupted_resumed_and_averaged(
    write_recipe, read_adapter, read_metrics, listener, monkeypatch
):
    recipe = write_recipe(sweep=GRID, **SETTINGS)
    root = recipe.parent / "runs" / "tiny"
    names = [f"learning_rate={rate}_seed={seed}" for rate in ("0.01", "1e+30") for seed in (1, 2)]
    process = subprocess.Popen(
        [sys.executable, "-m", "wegeft_cli", "sweep", str(recipe), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    wait_for(process, (root / names[0] / ".wegeft.lock").is_file)
    with pytest.raises(UserError, match="in use by process"):
        sweep(recipe)
    wait_for_lines(process, root / names[0], 2)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, err
    told = json.loads(out)
    assert told == json.loads((root / "sweep.json").read_text())
    assert told["status"] == "interrupted"
    assert [run["status"] for run in told["runs"]] == ["interrupted", *["waiting"] * 3]
    saved = list((root / names[0] / "checkpoints").glob("step-*"))
    assert [path.name for path in saved] != ["step-00000060"]
    assert saved

    monkeypatch.setattr(children.subprocess, "Popen", preloaded.Popen)
    result = sweep(recipe, reporter=listener)
    assert result.status == "failed"
    assert [(run.name, run.status) for run in result.runs] == list(
        zip(names, ["finished", "finished", "failed", "failed"], strict=True)
    )
    assert all("diverged" in (run.error or "") for run in result.runs[2:])
    assert sum("diverged" in text for text in listener.warnings) == 2
    assert result.to_json() == json.loads((root / "sweep.json").read_text())
    alone = train(
        recipe, ["train.learning_rate=0.01", "seed=1", f"output_dir={recipe.parent / 'alone'}"]
    )
    assert read_adapter(root / names[0]) == read_adapter(alone.run_dir)
    assert read_metrics(root / names[0]) == read_metrics(alone.run_dir)
    sound, failed = result.rows
    assert (sound.num_finished, failed.num_finished, failed.figures) == (2, 0, {})
    losses = [run.figures["final_loss"] for run in result.runs[:2]]
    assert losses[0] == alone.final_loss
    assert sound.figures["final_loss"].mean == pytest.approx(statistics.fmean(losses))
    assert sound.figures["final_loss"].std == pytest.approx(statistics.stdev(losses))
    assert {"best_eval_loss", "eval_loss", "peak_memory_gib", "seconds"} <= set(sound.figures)
    assert result.best == {"train.learning_rate": 0.01}
    assert result.plot is None or result.plot.read_bytes().startswith(b"\x89PNG")

    # What is finished is not trained again, and an edit of the recipe does not mix with it.
    before = (root / names[0] / "train.log").read_bytes()
    again = sweep(recipe, ["sweep.train.learning_rate=[0.01]"], reporter=listener)
    assert (again.status, len(again.runs)) == ("finished", 2)
    assert again.rows == [sound]
    assert sum("finished already" in text for text in listener.notes) == 2
    assert (root / names[0] / "train.log").read_bytes() == before
    for change in ("adapter.r=2", "train.max_steps=90"):
        with pytest.raises((UserError, ExceptionGroup)) as caught:
            sweep(recipe, [change])
        assert change.partition("=")[0] in repr(caught.value)


@pytest.fixture
def start_sweep(write_recipe):
    """A function that starts a sweep whose steps take seconds, and waits for the first one."""
    processes = []

    def start():
        rows = [{"instruction": f"say {n}", "output": str(n)} for n in range(LONG_STEP)]
        train = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": LONG_STEP,
            "num_train_epochs": 100,
            "logging_steps": 1,
        }
        recipe = write_recipe(rows=rows, sweep={"seed": [1, 2]}, train=train)
        process = subprocess.Popen(
            [sys.executable, "-m", "wegeft_cli", "sweep", str(recipe)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        processes.append(process)
        root = recipe.parent / "runs" / "tiny"
        wait_for_lines(process, root / "seed=1", 1)
        child = json.loads((root / "seed=1" / ".wegeft.lock").read_text())["pid"]
        return process, child, root

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()  # killed, it would leave its run behind
            process.communicate(timeout=PATIENCE_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_every_process_costs_no_step(start_sweep, number, read_run, steps_saved):
    """As SLURM does; the sweep tells its run once more, in the middle of a step."""
    process, child, root = start_sweep()
    for pid in (child, process.pid):
        os.kill(pid, number)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, err
    assert read_run(root / "seed=1")["status"] == "interrupted"
    assert len(steps_saved(root / "seed=1")) == 1
    told = json.loads((root / "sweep.json").read_text())
    assert [run["status"] for run in told["runs"]] == ["interrupted", "waiting"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of such an end")
def test_a_killed_sweep_leaves_no_run_behind(start_sweep, read_run, steps_saved):
    process, child, root = start_sweep()
    process.kill()
    process.communicate(timeout=PATIENCE_SECONDS)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    assert not is_running(child)
    assert read_run(root / "seed=1")["status"] == "interrupted"
    assert len(steps_saved(root / "seed=1")) == 1


def is_running(pid):
    """A process that nobody waits for may stay as a name in the table."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_no_sweep_that_seems_to_run(start_sweep):
    process, _, root = start_sweep()
    process.send_signal(signal.SIGINT)
    time.sleep(2 * POLL_SECONDS)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, err
    told = json.loads((root / "sweep.json").read_text())
    assert told["status"] == "interrupted"
    assert [run["status"] for run in told["runs"]] == ["interrupted", "waiting"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("asked", [False, True])
def test_a_stop_before_a_run_has_its_handlers_is_no_fault(write_recipe, monkeypatch, number, asked):
    """The process is signalled as soon as it is there, and again by the one that waits for it."""
    start = subprocess.Popen

    def start_and_signal(*args, **settings):
        process = start(*args, **settings)
        process.send_signal(number)
        return process

    monkeypatch.setattr("wegeft_cli.runs.children.subprocess.Popen", start_and_signal)
    recipe = write_recipe()
    end = run_child(train_words(recipe), recipe.parent / "train.log", lambda: asked)
    assert end.status == ("interrupted" if asked else "failed")


@pytest.mark.slow
def test_a_run_killed_from_outside_is_told(write_recipe, monkeypatch):
    monkeypatch.setattr(children.subprocess, "Popen", preloaded.Popen)
    recipe = write_recipe(train={"max_steps": 100_000})
    run_dir = recipe.parent / "runs" / "tiny"

    def kill():
        if (run_dir / "metrics.jsonl").is_file():
            holder = json.loads((run_dir / ".wegeft.lock").read_text())
            os.kill(holder["pid"], signal.SIGKILL)

    end = run_child(train_words(recipe), recipe.parent / "train.log", lambda: False, kill)
    assert end.status == "failed"
    assert "SIGKILL" in (end.error or "")


def test_the_faults_of_all_combinations_come_before_the_first_run(write_recipe, tmp_path):
    grid = {"data.max_length": [64, 1000], "adapter.target_modules": [["q_proj"], ["no_such"]]}
    recipe = write_recipe(sweep={**grid, "seed": [1, 2, 3]})
    with pytest.raises(ExceptionGroup) as caught:
        sweep(recipe, dry_run=True)
    told = [str(fault) for fault in caught.value.exceptions]
    assert any("context" in text and "data.max_length" in text for text in told)
    assert any("no_such" in text for text in told)
    assert len(told) == len(set(told)) <= 3  # seeds are not checked again
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="alpacca"):
        sweep(recipe, ["data.template=alpacca"])
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_trains_nothing(write_recipe, tmp_path):
    result = sweep(write_recipe(sweep=GRID), dry_run=True)
    assert (result.status, len(result.runs), len(result.rows)) == ("checked", 4, 2)
    assert not (tmp_path / "runs").exists()


def test_a_launcher_is_refused(write_recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="starts its runs itself"):
        sweep(write_recipe(sweep=GRID))


def test_a_run_in_use_ends_the_sweep_with_its_holder(write_recipe, tmp_path):
    recipe = write_recipe(sweep=GRID)
    folder = tmp_path / "runs" / "tiny" / "learning_rate=0.01_seed=1"
    with lock_folder(folder), pytest.raises(UserError, match="in use"):
        sweep(recipe)
    assert not (folder / "train.log").exists()
    told = json.loads((tmp_path / "runs" / "tiny" / "sweep.json").read_text())
    assert told["status"] == "failed"
    assert {run["status"] for run in told["runs"]} == {"waiting"}


@pytest.mark.parametrize(
    ("error", "status"),
    [(MachineError("disk full"), "failed"), (KeyboardInterrupt(), "interrupted")],
)
def test_what_ends_the_sweep_itself_is_told_on_disk(
    write_recipe, monkeypatch, tmp_path, error, status
):
    def fail(*_):
        raise error

    monkeypatch.setattr(children, "Child", fail)
    with pytest.raises(type(error)):
        sweep(write_recipe(sweep=GRID))
    told = json.loads((tmp_path / "runs" / "tiny" / "sweep.json").read_text())
    assert told["status"] == status
    assert [run["status"] for run in told["runs"]] == ["interrupted", *["waiting"] * 3]


def test_the_sweep_itself_loads_no_torch():
    code = "import sys, wegeft_cli.runs.sweep; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_train_takes_the_recipe_alone(write_recipe, read_run):
    result = train(write_recipe(sweep=GRID), ["train.max_steps=1"])
    assert "sweep: {}" in (result.run_dir / "recipe.yaml").read_text()
    assert train(result.run_dir / "recipe.yaml", resume="auto").status == "finished"


def test_commands_for_a_cluster_and_several_runs_at_once(write_recipe, monkeypatch):
    """Each process is an object that ends at once; a second sweep collects the run on disk."""
    recipe = write_recipe(train={"max_steps": 1})
    grid = ["sweep.seed=[1, 2, 3]"]
    listed = sweep(recipe, grid, only_commands=True)
    words = [shlex.split(command) for command in listed.commands]
    assert [each[:2] + each[3:] for each in words] == [["wegeft", "train", "--resume", "auto"]] * 3
    assert (listed.status, listed.to_json()["commands"]) == ("listed", listed.commands)
    assert not (listed.output_dir / "sweep.json").exists()
    assert train(words[0][2], resume="auto").status == "finished"
    assert sweep(recipe, grid, only_commands=True).commands == listed.commands[1:]
    started = []

    class Stub:
        def __init__(self, words, log, environment):
            started.append((Path(words[1]).parent.name, dict(environment)))

        def wait(self, seconds):
            return 0

        def describe_end(self, code, *, was_asked):
            return children.ChildEnd("finished")

    monkeypatch.setattr(children, "Child", Stub)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    result = sweep(recipe, grid, jobs=2)
    places = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert started == [("seed=2", places[0]), ("seed=3", places[1])]
    assert (result.jobs, result.status) == (2, "finished")
    with pytest.raises(UserError, match="this machine has 2"):
        sweep(recipe, grid, jobs=3)
