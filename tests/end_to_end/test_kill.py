"""Runs killed at any moment, again and again, end with the bits of one that was never touched."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import preloaded
import pytest

from wegeft_cli.runs.train import train

# A dozen processes each: seconds on a quiet machine, minutes on a very busy one.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# For one process on a busy machine.
PATIENCE_SECONDS = 200
# Far below the time of a save, which reaches the disk file by file.
POLL_SECONDS = 0.0005
# A wide pair, so that a save takes long enough to be met in its middle.
RANK = 500
# These tell of the clock, the process and the checkout, not of the training.
SURROUNDINGS = (
    "estimated_memory_gib",
    "started_at",
    "finished_at",
    "peak_memory_gib",
    "git_revision",
)

CASES = {
    "dropout, accumulation, validation, early stopping, ema": {
        "adapter": {"r": RANK, "dropout": 0.2},
        "data": {"validation_fraction": 0.2},
        "train": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_steps": 14,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "eval_steps": 3,
            "logging_steps": 4,
            "early_stopping_patience": 9,
            "load_best_model_at_end": True,
            "ema_decay": 0.5,
            "warmup_steps": 5,
        },
    },
    "grouped by length, noise, own pairs": {
        "adapter": {"r": RANK, "share": "none", "side": "output"},
        "train": {
            "max_steps": 12,
            "learning_rate": 1e-3,
            "save_steps": 1,
            "logging_steps": 5,
            "group_by_length": True,
            "neftune_noise_alpha": 5.0,
            "lr_scheduler_type": "cosine",
            "optim": "rmsprop",
        },
    },
    "patience that runs out": {
        "adapter": {"r": RANK},
        "data": {"validation_fraction": 0.2},
        "train": {
            "max_steps": 20,
            "learning_rate": 1e-30,
            "save_steps": 2,
            "eval_steps": 3,
            "logging_steps": 5,
            "early_stopping_patience": 2,
            "load_best_model_at_end": True,
        },
    },
    "packed": {
        "adapter": {"r": RANK, "dropout": 0.1},
        "data": {"packing": "bfd"},
        "train": {"max_steps": 14, "learning_rate": 1e-3, "save_steps": 3, "logging_steps": 2},
    },
}
KILLS_OF_A_CASE = 4


class KillableRuns:
    """Training processes, to be killed."""

    def __init__(self) -> None:
        self._processes: dict[int, preloaded.Popen] = {}

    def start(self, log: Path, *words: object) -> int:
        command = [sys.executable, "-m", "wegeft_cli", *map(str, words)]
        with log.open("a") as file:
            process = preloaded.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        self._processes[process.pid] = process
        return process.pid

    def poll(self, pid: int) -> int | None:
        return self._processes[pid].poll()

    def wait(self, pid: int, is_met: Callable[[], bool] = lambda: False) -> int | None:
        """Wait for the process, or None as soon as something is met."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        turn = 0
        while time.monotonic() < deadline:
            if is_met():
                return None
            code = self.poll(pid) if turn % 20 == 0 else None
            if code is not None:
                return code
            turn += 1
            time.sleep(POLL_SECONDS)
        raise AssertionError(f"process {pid} neither ended nor got there")

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def runs():
    runs = KillableRuns()
    yield runs
    runs.close()


def find_moment(run_dir: Path, chance: random.Random) -> tuple[str, Callable[[], bool]]:
    """Choose a moment at random: its name, and whether it has come."""

    def names(folder: Path) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(folder)]
        except FileNotFoundError:
            return []

    def count_lines() -> int:
        metrics = run_dir / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    saved = run_dir / "checkpoints"
    before = set(names(saved))
    more = count_lines() + chance.randrange(1, 3)
    clock = time.monotonic() + 3 * chance.random()
    begins = {
        "in a save": lambda: any(name.startswith(".tmp-step") for name in names(saved)),
        "in a later save": lambda: (
            len(set(names(saved)) - before) >= 2
            and any(name.startswith(".tmp-step") for name in names(saved))
        ),
        "at a new checkpoint": lambda: any(
            name.startswith("step-") for name in set(names(saved)) - before
        ),
        "in the rotation": lambda: any(name.startswith(".trash-") for name in names(saved)),
        "at a line of metrics": lambda: count_lines() >= more,
        "in run.json": lambda: any(name.endswith("-run.json") for name in names(run_dir)),
        "in the adapter": lambda: any(name.startswith(".tmp-adapter") for name in names(run_dir)),
        "at any time": lambda: time.monotonic() >= clock,
    }
    name = chance.choice(list(begins))
    return name, begins[name]


@pytest.fixture
def check_equal(read_adapter, read_metrics, read_run):
    """A function: hold a run's adapter, metrics and record against another's."""

    def record(run_dir: Path) -> dict[str, object]:
        return {key: value for key, value in read_run(run_dir).items() if key not in SURROUNDINGS}

    def check(run_dir: Path, whole: Path, told: str) -> None:
        assert read_adapter(run_dir) == read_adapter(whole), told
        assert read_metrics(run_dir) == read_metrics(whole), told
        mine, other = record(run_dir), record(whole)
        assert mine.keys() == other.keys(), told
        assert mine == other, told
        left = [path.name for path in run_dir.rglob("*") if path.name.startswith(".t")]
        assert left == [], told

    return check


@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again(write_recipe, runs, check_equal, read_run, tmp_path, case):
    recipe = write_recipe(**CASES[case])
    run_dir, whole = tmp_path / "runs" / "tiny", tmp_path / "whole"
    log = tmp_path / "log"
    assert runs.wait(runs.start(log, "train", recipe)) == 0, log.read_text()
    shutil.move(run_dir, whole)  # the same output_dir for both, which the card tells
    assert read_run(whole)["stopped_early"] == (case == "patience that runs out")
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    told = [f"seed {seed}"]
    while len(told) <= KILLS_OF_A_CASE:
        name, is_met = find_moment(run_dir, chance)
        pid = runs.start(log, "train", recipe, "--resume", "auto")
        code = runs.wait(pid, is_met)
        if code is not None:
            assert code == 0, log.read_text()
            if len(told) > 1:
                break
            shutil.rmtree(run_dir)  # it was done before its moment came: once more
            continue
        time.sleep(chance.choice([0, 0, 0.001, 0.01]))
        os.kill(pid, signal.SIGKILL)
        code = runs.wait(pid)
        told.append(name if code == -signal.SIGKILL else f"{name} (too late)")
        print(told)
    assert len(told) > 1, "it was never killed"
    pid = runs.start(log, "train", recipe, "--resume", "auto")
    assert runs.wait(pid) == 0, log.read_text()
    check_equal(run_dir, whole, f"{told}\n{log.read_text()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_with_all_that_was_done(
    write_recipe, runs, check_equal, read_run, tmp_path, number
):
    recipe = write_recipe(**CASES["packed"])
    run_dir, whole, log = tmp_path / "runs" / "tiny", tmp_path / "whole", tmp_path / "log"
    metrics = run_dir / "metrics.jsonl"
    assert runs.wait(runs.start(log, "train", recipe)) == 0, log.read_text()
    shutil.move(run_dir, whole)
    codes = []
    for num_lines in (1, 3):
        pid = runs.start(log, "train", recipe, "--resume", "auto")

        def has_lines(least: int = num_lines) -> bool:
            return metrics.exists() and metrics.read_bytes().count(b"\n") >= least

        assert runs.wait(pid, has_lines) is None
        os.kill(pid, number)
        codes.append(runs.wait(pid))
        assert read_run(run_dir)["status"] == "interrupted", log.read_text()
    assert codes == [130, 130]
    assert runs.wait(runs.start(log, "train", recipe, "--resume", "auto")) == 0
    check_equal(run_dir, whole, log.read_text())


DAMAGE = {
    "flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "truncated": lambda data: data[: len(data) // 3],
    "emptied": lambda data: b"",
    "removed": lambda data: None,
}


def test_a_damaged_newest_checkpoint_is_passed_over_whatever_the_damage(
    write_recipe, stop_after, listener, read_adapter, read_metrics, tmp_path
):
    settings = {"train": {"save_steps": 2}, "adapter": {"dropout": 0.1}}
    whole = train(write_recipe("whole", **settings)).run_dir
    recipe = write_recipe("parts", **settings)
    run_dir = train(recipe, should_stop=stop_after(5)).run_dir
    kept = shutil.copytree(run_dir, tmp_path / "kept")
    newest = run_dir / "checkpoints" / "step-00000005"
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) >= 4
    tried = 0
    for number, name in enumerate(names):
        kinds = DAMAGE if name == "manifest.json" else [list(DAMAGE)[number % len(DAMAGE)]]
        for kind in kinds:
            shutil.rmtree(run_dir)
            shutil.copytree(kept, run_dir)
            data = DAMAGE[kind]((newest / name).read_bytes())
            (newest / name).unlink()
            if data is not None:
                (newest / name).write_bytes(data)
            listener.warnings.clear()
            listener.notes.clear()
            train(recipe, resume="auto", reporter=listener)
            told = f"{name} {kind}: {listener.warnings} {listener.notes}"
            assert any("step-00000005" in text for text in listener.warnings), told
            assert any("resuming from step 4" in text for text in listener.notes), told
            assert read_adapter(run_dir) == read_adapter(whole), told
            assert read_metrics(run_dir) == read_metrics(whole), told
            tried += 1
    assert tried == len(names) + len(DAMAGE) - 1


@pytest.mark.parametrize("words", [[], ["--resume", "auto"]])
def test_of_two_runs_into_one_folder_exactly_one_goes_on(
    write_recipe, runs, read_metrics, read_run, tmp_path, words
):
    recipe = write_recipe(train={"max_steps": 100_000})
    run_dir = tmp_path / "runs" / "tiny"
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    pids = [runs.start(log, "train", recipe, *words) for log in logs]
    codes: dict[int, int | None] = {}

    def has_ended() -> bool:
        codes.update({i: runs.poll(pid) for i, pid in enumerate(pids)})
        return any(code is not None for code in codes.values())

    runs.wait(pids[0], has_ended)
    (loser,) = [i for i, code in codes.items() if code is not None]
    told = logs[loser].read_text()
    assert codes[loser] == 2, told
    # The winner's number is in the lock a moment after the lock itself.
    assert re.search("in use by (another )?process|already holds a run", told)
    metrics = run_dir / "metrics.jsonl"
    runs.wait(pids[1 - loser], lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 3)
    os.kill(pids[1 - loser], signal.SIGTERM)
    assert runs.wait(pids[1 - loser]) == 130
    steps = [line["step"] for line in read_metrics(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    assert read_run(run_dir)["status"] == "interrupted"
