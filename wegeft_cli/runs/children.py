"""Runs as child processes, several at a time: the engine of `wegeft sweep` and `wegeft bench`.

This process loads no torch.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.artifacts.run_results import RunOutcome, read_outcome
from wegeft_cli.distributed.signals import STOP_SIGNALS, VARIABLE
from wegeft_cli.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    Faults,
    UserError,
    disk_errors,
    raise_all,
    raise_by_name,
)
from wegeft_cli.recipe.load import recipe_to_yaml
from wegeft_cli.recipe.sweep import SweepRun
from wegeft_cli.reporter import Advance, Reporter
from wegeft_cli.runs.resume_rules import (
    check_same_recipe,
    with_absolute_paths,
    with_matched_rank,
)

LOG_NAME = "train.log"
POLL_SECONDS = 0.25
_GRACE_SECONDS = 120.0  # for a pass under way and its checkpoint
_ERROR = "error: "  # start of an error message of the command line
_ONE_PLACE: tuple[Mapping[str, str], ...] = ({},)


@dataclass(frozen=True)
class ChildEnd:
    """How a child process ended.

    Args:
        status: finished, failed or interrupted.
        error: Its error message, if it failed.
    """

    status: str
    error: str | None = None


class Child:
    """A command of this package in a process of its own, whose output goes to the end of a file.

    What it prints on standard output goes to `output`, if that is given. If this process is killed,
    the child saves and exits, see `follow_starter`.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        output: Path | None = None,
    ) -> None:
        # -P: a file called json.py in the working folder is no module.
        command = [sys.executable, "-P", "-m", "wegeft_cli", *words]
        self._log = log
        self._is_stopping = False
        with disk_errors(log), log.open("ab") as file, ExitStack() as stack:
            self._start = file.tell()
            printed = file if output is None else stack.enter_context(output.open("wb"))
            # Ctrl-C does not reach a separate process group: the child would receive it twice, and
            # a second one means that it should not save.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=file,
                process_group=0,
                env={**os.environ, **(environment or {}), VARIABLE: str(os.getpid())},
            )

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if the child still runs after these seconds."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Let the child save and exit."""
        if not self._is_stopping:
            self._is_stopping = True
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Let the child save and exit; kill it if that takes too long or is interrupted."""
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.wait(_GRACE_SECONDS)
        self._process.kill()
        self._process.wait()

    def describe_end(self, code: int, *, was_asked: bool) -> ChildEnd:
        """Return how the child ended; `was_asked` is whether this process was asked to stop."""
        if code == EXIT_DONE:
            return ChildEnd("finished")
        # A child that has not set its signal handlers yet ends by the signal itself.
        if code == EXIT_INTERRUPTED or (-code in STOP_SIGNALS and (self._is_stopping or was_asked)):
            return ChildEnd("interrupted")
        return ChildEnd("failed", self._explain(code))

    def _explain(self, code: int) -> str:
        """Return the reason of a failure, from the child's own output."""
        if code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                reason += ": the machine may have run out of memory"
            return reason
        with disk_errors(self._log, "read"), self._log.open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        said = [line.strip() for line in lines if line.strip()]
        return "; ".join(errors) or (said[-1] if said else f"exit code {code}")


def train_words(recipe: Path) -> list[str]:
    """Return the words after `wegeft` that train a run's recipe, from its newest checkpoint."""
    return ["train", str(recipe), "--resume", "auto"]


def run_child(
    words: Sequence[str],
    log: Path,
    should_stop: Callable[[], bool],
    on_poll: Callable[[], None] = lambda: None,
    output: Path | None = None,
) -> ChildEnd:
    """Run a command of this package and wait for it.

    `should_stop` and `on_poll` are called several times a second; true lets the child save and
    exit. A KeyboardInterrupt is raised after the child has ended.
    """
    child = Child(words, log, output=output)
    try:
        while (code := child.wait(POLL_SECONDS)) is None:
            on_poll()
            if should_stop():
                child.stop()
    except BaseException:
        child.kill()
        raise
    return child.describe_end(code, was_asked=should_stop())


def refuse_launcher(what: str) -> None:
    """Raise UserError where a launcher has started several processes of a command."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{what} starts its runs itself, one process each",
            hint="start it without a launcher, or train each run under one",
        )


def list_places(jobs: int) -> list[dict[str, str]]:
    """Return the environment of each of several runs: a device each, or a part of the cores."""
    if jobs < 1:
        raise UserError(f"must be at least 1, got {jobs}", key="--jobs")
    if jobs == 1:
        return [{}]
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        return [{"OMP_NUM_THREADS": str(threads)} for _ in range(jobs)]
    if jobs > count:
        raise UserError(
            f"{jobs} runs at the same time need {jobs} devices, and this machine has {count}",
            key="--jobs",
            hint=f"at most {count}; --print-commands lists the runs for a cluster",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": name.strip()} for name in names[:jobs]]


def list_commands(outcomes: Sequence[RunOutcome]) -> list[str]:
    """Return the commands that train the runs which are not finished."""
    return [
        shlex.join(["wegeft", *train_words(RunDirectory(outcome.run_dir).recipe_path)])
        for outcome in outcomes
        if outcome.status != "finished"
    ]


def check_runs(runs: Sequence[SweepRun], train: Callable[..., Any], reporter: Reporter) -> None:
    """Make all checks of a dry run of `train`, once for all seeds of a combination."""
    distinct: dict[str, SweepRun] = {}
    for run in runs:
        distinct.setdefault(repr(replace(run.loaded.recipe, seed=0, output_dir="")), run)
    found: dict[str, list[UserError]] = {}
    with reporter.progress("checking", len(distinct)) as advance:
        for done, run in enumerate(distinct.values(), start=1):
            faults = Faults()
            with faults.collected():
                train(run.loaded, resume="auto", dry_run=True)
            found.setdefault(run.name.partition("/")[0], []).extend(faults.found)
            advance(done)
    raise_by_name(found)


def check_recipes(runs: Sequence[SweepRun]) -> None:
    """Raise UserError for the runs that were started by another recipe."""
    faults = []
    for run, outcome in zip(runs, list_outcomes(runs), strict=True):
        loaded, directory = run.loaded, RunDirectory(outcome.run_dir)
        if not directory.exists():
            continue
        try:
            check_same_recipe(
                directory, with_absolute_paths(loaded), is_finished=directory.is_finished()
            )
        except UserError as fault:
            fault.hint = "restore the old values, or choose another output_dir"
            faults.append(fault)
    raise_all(faults)


def list_outcomes(runs: Sequence[SweepRun]) -> list[RunOutcome]:
    """Return the runs as waiting."""
    return [
        RunOutcome(run.name, run.values, Path(run.loaded.recipe.output_dir).expanduser())
        for run in runs
    ]


@dataclass
class RunQueue:
    """Runs that are trained as far as they are not finished, several at a time.

    Args:
        runs: The runs with their recipes.
        outcomes: How far each run is, in the same order; replaced as the runs end.
        on_change: Called when a run has started.
        reporter: Receives messages and progress.
        places: Environment variables of the runs that train at the same time, one mapping for
            each place.
        title: What the runs are, for the progress.
    """

    runs: Sequence[SweepRun]
    outcomes: list[RunOutcome]
    on_change: Callable[[], None]
    reporter: Reporter
    places: Sequence[Mapping[str, str]] = _ONE_PLACE
    title: str = "runs"
    _active: dict[int, tuple[int, Child]] = field(default_factory=dict)  # place -> run, child

    def prepare(self) -> None:
        """Read the finished runs, and write the recipe of every other one.

        All are written at once, so that a later edit of the recipe changes no run.
        """
        for position, (run, outcome) in enumerate(zip(self.runs, self.outcomes, strict=True)):
            if RunDirectory(outcome.run_dir).is_finished():
                self.outcomes[position] = self._read(position, "finished", None)
                self.reporter.note(f"{outcome.name} is finished already")
            else:
                directory = RunDirectory(outcome.run_dir)
                recipe = with_matched_rank(directory, with_absolute_paths(run.loaded))
                directory.write_recipe(recipe_to_yaml(recipe))

    def train(self, should_stop: Callable[[], bool]) -> str:
        """Train the runs that are not finished; return finished, failed or interrupted."""
        waiting = [n for n, outcome in enumerate(self.outcomes) if outcome.status != "finished"]
        with self.reporter.progress(self.title, len(self.outcomes)) as advance:
            try:
                self._train(waiting, should_stop, advance)
            except BaseException:
                for _, child in self._active.values():
                    child.kill()
                raise
        statuses = {outcome.status for outcome in self.outcomes}
        if statuses & {"interrupted", "waiting"}:
            return "interrupted"
        return "failed" if "failed" in statuses else "finished"

    def _train(self, waiting: list[int], should_stop: Callable[[], bool], advance: Advance) -> None:
        advance(self._count_ended())
        is_stopping = False
        while waiting or self._active:
            is_stopping = is_stopping or should_stop()
            if is_stopping:
                waiting.clear()
                for _, child in self._active.values():
                    child.stop()
            for place in range(len(self.places)):
                if waiting and place not in self._active:
                    self._start(place, waiting.pop(0))
            is_stopping = self._collect(should_stop, advance) or is_stopping
            self._report(advance)

    def _start(self, place: int, position: int) -> None:
        outcome = self.outcomes[position]
        directory = RunDirectory(outcome.run_dir)
        with directory.lock():
            pass  # reports a run that outlived its sweep as such, not as a failure
        self.outcomes[position] = replace(outcome, status="running")
        self.on_change()
        words, log = train_words(directory.recipe_path), outcome.run_dir / LOG_NAME
        self._active[place] = position, Child(words, log, self.places[place])

    def _collect(self, should_stop: Callable[[], bool], advance: Advance) -> bool:
        """Wait a moment, and record the runs that have ended; return whether one was stopped."""
        was_stopped = False
        if len(self._active) > 1:
            time.sleep(POLL_SECONDS)
        for place, (position, child) in list(self._active.items()):
            code = child.wait(POLL_SECONDS if len(self._active) == 1 else 0)
            if code is None:
                continue
            del self._active[place]
            end = child.describe_end(code, was_asked=should_stop())
            outcome = self.outcomes[position] = self._read(position, end.status, end.error)
            was_stopped |= end.status == "interrupted"
            if end.status == "failed":
                log = outcome.run_dir / LOG_NAME
                self.reporter.warn(f"{outcome.name} failed: {end.error} (see {log})")
            advance(self._count_ended())
        return was_stopped

    def _read(self, position: int, status: str, error: str | None) -> RunOutcome:
        metric = self.runs[position].loaded.recipe.train.metric_for_best_model
        return read_outcome(self.outcomes[position], metric, status, error)

    def _count_ended(self) -> int:
        return sum(outcome.status in ("finished", "failed") for outcome in self.outcomes)

    def _report(self, advance: Advance) -> None:
        """Report the progress of a current run by the last line of its metrics."""
        for position, _ in list(self._active.values())[-1:]:
            outcome = self.outcomes[position]
            line = RunDirectory(outcome.run_dir).last_metrics()
            loss = line.get("loss")
            advance(
                self._count_ended(),
                run=outcome.name,
                step=str(line.get("step", 0)),
                loss="-" if loss is None else f"{loss:.4f}",
            )
