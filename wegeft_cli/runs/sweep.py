"""`wegeft sweep`: every combination of a recipe's `sweep` is a run, and the runs become one table.

This process loads no torch; each run is a child process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_results import (
    BEST,
    RunOutcome,
    SweepRow,
    average,
    find_best,
)
from wegeft_cli.artifacts.sweep_table import TABLE_NAME
from wegeft_cli.planning.validate import check_all_names
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.recipe.sweep import LoadedSweep, load_sweep
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.runs.children import (
    RunQueue,
    check_recipes,
    check_runs,
    list_commands,
    list_outcomes,
    list_places,
    refuse_launcher,
)
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
        status: finished, failed (some runs did), interrupted, checked (a dry run), or listed.
        metric: The watched metric, which best_<metric> and `best` refer to.
        rows: One per combination without its seed.
        runs: Every run.
        best: Values of the row with the best mean of the metric; None without a validation.
        plot: The plot; None without one.
        jobs: Runs that trained at the same time.
        commands: Commands that train what is left, if they were asked for.
    """

    recipe: Path
    output_dir: Path
    status: str
    metric: str
    rows: list[SweepRow]
    runs: list[RunOutcome]
    best: dict[str, Any] | None = None
    plot: Path | None = None
    jobs: int = 1
    commands: list[str] = field(default_factory=list)

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
            "jobs": self.jobs,
            "commands": self.commands,
        }


@checked_arguments
def sweep(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    jobs: int = 1,
    dry_run: bool = False,
    only_commands: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    reporter: Reporter | None = None,
) -> SweepResult:
    """Train every combination of a recipe's `sweep`, and compare them.

    Finished runs are not repeated, and an interrupted one is resumed. A run that fails is recorded,
    and the others continue.

    Args:
        recipe_path: A recipe file, or the name of a shipped one.
        overrides: `key=value` texts that win over the file; `sweep.seed=[1,2]` sets what is tried.
        jobs: Number of runs at the same time, one device each.
        dry_run: Check each combination as far as is cheap, and train nothing.
        only_commands: Write the recipes of the runs that are left, and list their commands.
        should_stop: Polled several times a second; true lets the current runs save, and returns.
        reporter: Receives messages and progress.

    Returns:
        The result, which `<output_dir>/sweep.json` holds and sweep.png plots.

    Raises:
        UserError: If the recipe or a combination is invalid, or differs from that of its run.
        ExceptionGroup: If there are several such faults.
        MachineError: If this process cannot write; errors of runs are recorded instead.
    """
    reporter = reporter or SilentReporter()
    refuse_launcher("a sweep")
    places = list_places(jobs)
    loaded = load_sweep(recipe_path, overrides)
    for note in loaded.base.notes:
        reporter.note(note)
    check_all_names(run.loaded for run in loaded.runs)
    job = _Sweep(loaded, places, should_stop, reporter)
    check_recipes(loaded.runs)
    if dry_run:
        from wegeft_cli.runs.train import train  # loads torch

        check_runs(loaded.runs, train, reporter)
        return job.summarize("checked")
    with lock_folder(job.output_dir):
        remove_leftover_files(job.output_dir, (TABLE_NAME, _PLOT_NAME))
        if only_commands:
            return job.list_commands()
        return job.run()


@dataclass
class _Sweep:
    """The runs of a sweep and how far each is."""

    loaded: LoadedSweep
    places: Sequence[Mapping[str, str]]
    should_stop: Callable[[], bool]
    reporter: Reporter

    def __post_init__(self) -> None:
        self.output_dir = Path(self.loaded.base.recipe.output_dir).expanduser()
        self.outcomes = list_outcomes(self.loaded.runs)
        self.queue = RunQueue(
            self.loaded.runs,
            self.outcomes,
            lambda: _write(self.summarize("running")),
            self.reporter,
            self.places,
        )

    def list_commands(self) -> SweepResult:
        """Write the recipes of the runs that are left and return their commands."""
        self.queue.prepare()
        return replace(self.summarize("listed"), commands=list_commands(self.outcomes))

    def run(self) -> SweepResult:
        """Train the runs that are left, and write the table."""
        try:
            self.queue.prepare()
            status = self.queue.train(self.should_stop)
        except BaseException as error:
            # The current runs have saved before this process sees the error.
            self.outcomes[:] = [
                replace(run, status="interrupted") if run.status == "running" else run
                for run in self.outcomes
            ]
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            _write(self.summarize(status))
            raise
        result = self.summarize(status)
        if any(outcome.status == "finished" for outcome in self.outcomes):
            result = replace(result, plot=_draw(result, self.reporter))
        _write(result)
        return result

    def summarize(self, status: str) -> SweepResult:
        """Return the result as far as the runs are."""
        metric = self.loaded.base.recipe.train.metric_for_best_model
        rows = average(self.outcomes)
        best = find_best(rows, metric)
        return SweepResult(
            recipe=self.loaded.base.path,
            output_dir=self.output_dir,
            status=status,
            metric=metric,
            rows=rows,
            runs=list(self.outcomes),
            best=None if best is None or len(rows) == 1 else best.values,
            jobs=len(self.places),
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
