"""`wegeft sweep`: every combination of a recipe's `sweep` is a run, and the runs become one table.

This process loads no torch; each run is a child process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.artifacts.run_results import (
    BEST,
    RunOutcome,
    SweepRow,
    average,
    find_best,
    read_outcome,
)
from wegeft_cli.artifacts.sweep_table import TABLE_NAME
from wegeft_cli.distributed.signals import STOP_SIGNALS, VARIABLE
from wegeft_cli.errors import EXIT_DONE, EXIT_INTERRUPTED, UserError, disk_errors, raise_all
from wegeft_cli.planning.validate import check_names
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.recipe.load import recipe_to_yaml
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.sweep import LoadedSweep, SweepRun, load_sweep
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.runs.resume_rules import check_same_recipe, with_absolute_paths
from wegeft_cli.runs.sweep_plot import draw_sweep
from wegeft_cli.storage.atomic import remove_leftover_files, write_bytes_atomic, write_text_atomic
from wegeft_cli.storage.json_files import to_finite
from wegeft_cli.storage.lock import lock_folder

_PLOT_NAME = "sweep.png"
_NOT_DRAWN = ("peak_memory_gib", "seconds")


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended.

    Args:
        recipe: The recipe's file.
        output_dir: The folder of all runs, of sweep.json and of sweep.png.
        status: finished, failed (some runs did), interrupted, or checked (a dry run).
        metric: The watched metric, which best_<metric> and `best` refer to.
        rows: One per combination without its seed.
        runs: Every run.
        best: Values of the row with the best mean of the metric; None without a validation.
        plot: The plot; None without one.
    """

    recipe: Path
    output_dir: Path
    status: str
    metric: str
    rows: list[SweepRow]
    runs: list[RunOutcome]
    best: dict[str, Any] | None = None
    plot: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object, the content of sweep.json."""
        return {
            "recipe": str(self.recipe),
            "output_dir": str(self.output_dir),
            "status": self.status,
            "metric": self.metric,
            "best": self.best,
            "plot": None if self.plot is None else str(self.plot),
            "rows": [asdict(row) for row in self.rows],
            "runs": [run.to_json() for run in self.runs],
        }


@checked_arguments
def sweep(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    reporter: Reporter | None = None,
) -> SweepResult:
    """Train every combination of a recipe's `sweep`, and compare them.

    Finished runs are not repeated, and an interrupted one is resumed. A run that fails is recorded,
    and the others continue.

    Args:
        recipe_path: A recipe file, or the name of a shipped one.
        overrides: `key=value` texts that win over the file; `sweep.seed=[1,2]` sets what is tried.
        dry_run: Check each combination as far as is cheap, and train nothing.
        should_stop: Polled several times a second; true lets the current run save, and returns.
        reporter: Receives messages and progress.

    Returns:
        The result, which `<output_dir>/sweep.json` holds and sweep.png plots.

    Raises:
        UserError: If the recipe or a combination is invalid, or differs from that of its run.
        ExceptionGroup: If there are several such faults.
        MachineError: If this process cannot write; errors of runs are recorded instead.
    """
    reporter = reporter or SilentReporter()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep starts its runs itself, one process each",
            hint="start it without a launcher, or train each run under one",
        )
    loaded = load_sweep(recipe_path, overrides)
    for note in loaded.base.notes:
        reporter.note(note)
    found = [fault for run in loaded.runs for fault in check_names(run.loaded)]
    raise_all(list({str(fault): fault for fault in found}.values()))
    output_dir = Path(loaded.base.recipe.output_dir).expanduser()
    outcomes = [
        RunOutcome(run.name, run.values, Path(run.loaded.recipe.output_dir).expanduser())
        for run in loaded.runs
    ]
    _check_recipes(loaded, outcomes)
    if dry_run:
        _check_runs(loaded.runs, reporter)
        return _summarize(loaded, output_dir, outcomes, "checked")
    with lock_folder(output_dir):
        remove_leftover_files(output_dir, (TABLE_NAME, _PLOT_NAME))
        try:
            status = _train_all(loaded, output_dir, outcomes, should_stop, reporter)
        except BaseException as error:
            # The current run has saved before this process sees the error.
            ended = [
                replace(run, status="interrupted") if run.status == "running" else run
                for run in outcomes
            ]
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            _write(_summarize(loaded, output_dir, ended, status))
            raise
        result = _summarize(loaded, output_dir, outcomes, status)
        if any(outcome.status == "finished" for outcome in outcomes):
            result = replace(result, plot=_draw(result, reporter))
        _write(result)
    return result


def _check_recipes(loaded: LoadedSweep, outcomes: Sequence[RunOutcome]) -> None:
    """Raise UserError for runs that were started under another recipe."""
    faults = []
    for run, outcome in zip(loaded.runs, outcomes, strict=True):
        directory = RunDirectory(outcome.run_dir)
        if not directory.exists():
            continue
        try:
            check_same_recipe(
                directory, with_absolute_paths(run.loaded), is_finished=directory.is_finished()
            )
        except UserError as fault:
            fault.hint = "restore the old values, or choose another output_dir"
            faults.append(fault)
    raise_all(faults)


def _check_runs(runs: Sequence[SweepRun], reporter: Reporter) -> None:
    """Make all checks of a dry run, once for all seeds of a combination."""
    from wegeft_cli.runs.train import train  # loads torch

    distinct: dict[str, SweepRun] = {}
    for run in runs:
        distinct.setdefault(repr(replace(run.loaded.recipe, seed=0, output_dir="")), run)
    faults: dict[str, UserError] = {}
    with reporter.progress("checking", len(distinct)) as advance:
        for done, run in enumerate(distinct.values(), start=1):
            try:
                train(run.loaded, resume="auto", dry_run=True)
            except UserError as fault:
                faults.setdefault(str(fault), fault)
            except ExceptionGroup as group:
                for each in group.exceptions:
                    if not isinstance(each, UserError):
                        raise
                    faults.setdefault(str(each), each)
            advance(done)
    raise_all(list(faults.values()))


def _train_all(
    loaded: LoadedSweep,
    output_dir: Path,
    outcomes: list[RunOutcome],
    should_stop: Callable[[], bool],
    reporter: Reporter,
) -> str:
    """Train the runs that are not finished, one after the other, and return the sweep's status."""
    metrics = [run.loaded.recipe.train.metric_for_best_model for run in loaded.runs]
    for position, outcome in enumerate(outcomes):
        if RunDirectory(outcome.run_dir).is_finished():
            outcomes[position] = read_outcome(outcome, metrics[position], "finished", None)
            reporter.note(f"{outcome.name} is finished already")
        else:
            # All are written now, so that a later edit of the recipe changes no run.
            text = recipe_to_yaml(with_absolute_paths(loaded.runs[position].loaded))
            RunDirectory(outcome.run_dir).write_recipe(text)
    num_done = sum(outcome.status == "finished" for outcome in outcomes)
    with reporter.progress("runs", len(outcomes)) as advance:
        advance(num_done)
        for position, outcome in enumerate(outcomes):
            if outcome.status == "finished":
                continue
            if should_stop():
                return "interrupted"
            directory = RunDirectory(outcome.run_dir)
            with directory.lock():
                pass  # reports a run that outlived its sweep as such, not as a failure
            outcomes[position] = replace(outcome, status="running")
            _write(_summarize(loaded, output_dir, outcomes, "running"))
            show_progress = _ProgressReport(outcome, num_done, advance)
            log = outcome.run_dir / LOG_NAME
            end = run_training(directory.recipe_path, log, should_stop, show_progress)
            outcomes[position] = read_outcome(outcome, metrics[position], end.status, end.error)
            if end.status == "interrupted":
                return "interrupted"
            if end.status == "failed":
                reporter.warn(f"{outcome.name} failed: {end.error} (see {log})")
            num_done += 1
            advance(num_done)
    return "failed" if any(outcome.status == "failed" for outcome in outcomes) else "finished"


class _ProgressReport:
    """Reports the progress of the current run by the last line of its metrics."""

    def __init__(self, outcome: RunOutcome, num_done: int, advance: Callable[..., None]) -> None:
        self._outcome = outcome
        self._num_done = num_done
        self._advance = advance

    def __call__(self) -> None:
        line = RunDirectory(self._outcome.run_dir).last_metrics()
        loss = line.get("loss")
        self._advance(
            self._num_done,
            run=self._outcome.name,
            step=str(line.get("step", 0)),
            loss="-" if loss is None else f"{loss:.4f}",
        )


def _summarize(
    loaded: LoadedSweep, output_dir: Path, outcomes: Sequence[RunOutcome], status: str
) -> SweepResult:
    recipe: Recipe = loaded.base.recipe
    metric = recipe.train.metric_for_best_model
    rows = average(outcomes)
    best = find_best(rows, metric)
    return SweepResult(
        recipe=loaded.base.path,
        output_dir=output_dir,
        status=status,
        metric=metric,
        rows=rows,
        runs=list(outcomes),
        best=None if best is None or len(rows) == 1 else best.values,
    )


def _draw(result: SweepResult, reporter: Reporter) -> Path | None:
    watched = (result.metric, *_NOT_DRAWN)
    names = dict.fromkeys(name for row in result.rows for name in row.figures)
    panels = {
        name: [
            (row.figures[name].mean, row.figures[name].std) if name in row.figures else None
            for row in result.rows
        ]
        for name in names
        if name not in watched or (name == result.metric and BEST + name not in names)
    }
    picture = draw_sweep([row.values for row in result.rows], panels)
    if picture is None:
        reporter.note("no sweep.png without matplotlib: pip install 'wegeft-cli[plot]'")
        return None
    path = result.output_dir / _PLOT_NAME
    write_bytes_atomic(path, picture)
    return path


def _write(result: SweepResult) -> None:
    text = json.dumps(to_finite(result.to_json()), indent=2, allow_nan=False) + "\n"
    write_text_atomic(result.output_dir / TABLE_NAME, text)


LOG_NAME = "train.log"
POLL_SECONDS = 0.25
_GRACE_SECONDS = 120.0  # for a pass under way and its checkpoint
_ERROR = "error: "  # start of an error message of the command line


@dataclass(frozen=True)
class ChildEnd:
    """How a run's process ended.

    Args:
        status: finished, failed or interrupted.
        error: Its error message, if it failed.
    """

    status: str
    error: str | None = None


def run_training(
    recipe: Path, log: Path, should_stop: Callable[[], bool], on_poll: Callable[[], None]
) -> ChildEnd:
    """Train a recipe in a child process, from its newest checkpoint if it has one.

    If this process is killed, the child saves and exits, see `follow_starter`. The child's output
    is appended to `log`. `should_stop` and `on_poll` are called several times a second; true lets
    the child save and exit. A KeyboardInterrupt is raised after the child has ended.
    """
    # -P: a file called json.py in the working folder is no module.
    command = [sys.executable, "-P", "-m", "wegeft_cli", "train", str(recipe), "--resume", "auto"]
    with disk_errors(log), log.open("ab") as file:
        start = file.tell()
        # Ctrl-C does not reach a separate process group: the child would receive it twice, and a
        # second one means that it should not save.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            process_group=0,
            env={**os.environ, VARIABLE: str(os.getpid())},
        )
        try:
            is_stopping = False
            while (code := _wait(process)) is None:
                on_poll()
                if not is_stopping and should_stop():
                    is_stopping = True
                    process.send_signal(signal.SIGINT)
        except BaseException:
            _end(process)
            raise
    if code == EXIT_DONE:
        return ChildEnd("finished")
    # A child that has not set its signal handlers yet ends by the signal itself.
    if code == EXIT_INTERRUPTED or (-code in STOP_SIGNALS and (is_stopping or should_stop())):
        return ChildEnd("interrupted")
    return ChildEnd("failed", _explain(code, log, start))


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the child save and exit; kill it if that takes too long or is interrupted."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(_GRACE_SECONDS)
    process.kill()
    process.wait()


def _explain(code: int, log: Path, start: int) -> str:
    """Return the reason of a failure, from the child's output since `start`."""
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            reason += ": the machine may have run out of memory"
        return reason
    with disk_errors(log, "read"), log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    said = [line.strip() for line in lines if line.strip()]
    return "; ".join(errors) or (said[-1] if said else f"exit code {code}")
