"""Real processes: killed, interrupted, or two in one folder."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pytest

from wegeft_cli.artifacts.checkpoint import find_newest_checkpoint
from wegeft_cli.errors import UserError
from wegeft_cli.runs.train import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# Long enough for a process to load torch and reach its first steps on a busy machine.
PATIENCE_SECONDS = 120


@pytest.fixture
def start():
    """A function that starts `wegeft train`; what still runs at the end is killed."""
    started = []

    def start_(recipe, *arguments, fresh=False):
        start_process = subprocess.Popen if fresh else preloaded.Popen
        process = start_process(
            [sys.executable, "-m", "wegeft_cli", "train", str(recipe), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_
    for process in started:
        process.kill()
        process.communicate()


def wait_for_steps(process, run_dir, num_steps):
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < num_steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("round_", [1, 2, 3])
def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(
    write_recipe, start, read_adapter, read_metrics, round_
):
    settings = {
        "adapter": {"dropout": 0.1},
        "train": {"max_steps": 40, "save_steps": 3, "logging_steps": 2},
    }
    step = random.SystemRandom().randrange(1, 18)
    whole = train(write_recipe("whole", **settings)).run_dir
    recipe = write_recipe("parts", **settings)
    run_dir = recipe.parent / "runs" / "parts"
    process = start(recipe)
    wait_for_steps(process, run_dir, step)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run_dir / "adapter").exists()
    assert train(recipe, resume="auto").status == "finished"
    assert read_adapter(run_dir) == read_adapter(whole), f"killed after {step} lines"
    assert read_metrics(run_dir) == read_metrics(whole), f"killed after {step} lines"
    assert not [path for path in run_dir.rglob("*") if path.name.startswith((".tmp-", ".trash-"))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(write_recipe, start, read_run, number):
    recipe = write_recipe(train={"max_steps": 100_000})
    run_dir = recipe.parent / "runs" / "tiny"
    process = start(recipe, "--json")
    wait_for_steps(process, run_dir, 3)
    # Meanwhile nobody else gets into the folder.
    with pytest.raises(UserError, match=f"in use by process {process.pid}"):
        train(recipe, resume="auto")
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, err
    told = json.loads(out)
    assert (told["status"], told["adapter_dir"]) == ("interrupted", None)
    assert read_run(run_dir)["status"] == "interrupted"
    checkpoint, notes = find_newest_checkpoint(run_dir / "checkpoints")
    assert (checkpoint.step, notes) == (told["num_steps"], [])
    assert told["num_steps"] >= 3
    resumed = train(recipe, [f"train.max_steps={told['num_steps'] + 1}"], resume="auto")
    assert (resumed.status, resumed.num_steps) == ("finished", told["num_steps"] + 1)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is loaded")
def test_a_signal_while_torch_is_loading_leaves_no_ruin(write_recipe, start):
    recipe = write_recipe(train={"max_steps": 100_000})
    process = start(recipe, fresh=True)
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "libtorch_cpu" not in maps.read_text():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert train(recipe, ["train.max_steps=3"], resume="auto").status == "finished"
