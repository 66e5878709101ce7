"""What the runs of a sweep left behind, read from their folders and averaged over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SEED = "seed"
FINAL_LOSS = "final_loss"
BEST = "best_"
LOWER_IS_BETTER = "eval_loss"


@dataclass(frozen=True)
class RunOutcome:
    """One run of a sweep.

    Args:
        name: Its folder's name.
        values: Dotted key -> value.
        run_dir: Its folder.
        status: waiting, running, finished, failed or interrupted.
        error: Why it failed.
        num_steps: Optimizer steps in its metrics; 0 before the first line.
        figures: final_loss, best_<watched metric>, eval_loss and eval_<task> of the last
            validation, peak_memory_gib, and the seconds of its steps; those that are known.
    """

    name: str
    values: dict[str, Any]
    run_dir: Path
    status: str = "waiting"
    error: str | None = None
    num_steps: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Give the outcome as a JSON object."""
        return {**asdict(self), "run_dir": str(self.run_dir)}


@dataclass(frozen=True)
class Statistic:
    """A figure over the seeds of one combination.

    Args:
        mean: Arithmetic mean.
        std: Standard deviation with n - 1; None of one run.
        n: Runs that gave the figure.
    """

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class SweepRow:
    """One combination without its seed.

    Args:
        values: Dotted key -> value.
        num_runs: Seeds.
        num_finished: Seeds whose run is finished; the figures are theirs.
        figures: Name -> statistic.
    """

    values: dict[str, Any]
    num_runs: int
    num_finished: int
    figures: dict[str, Statistic]


def is_finished(run_dir: Path) -> bool:
    """Tell whether a run has come to its end and has its adapter."""
    status = read_json(run_dir / "run.json").get("status")
    return status == "finished" and (run_dir / "adapter").is_dir()


def read_outcome(before: RunOutcome, metric: str, status: str, error: str | None) -> RunOutcome:
    """Read a run's figures.

    Args:
        before: The run.
        metric: The metric that it watches: eval_loss, or `eval_<task>`.
        status: How it ended.
        error: Why it failed.

    Returns:
        The run with its figures; none are made up where its folder holds none.
    """
    lines = list(read_lines(before.run_dir / "metrics.jsonl"))
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if any(key.startswith("eval_") for key in line)]
    figures: dict[str, Any] = {}
    if steps:
        run = read_json(before.run_dir / "run.json")
        figures[FINAL_LOSS] = run.get(FINAL_LOSS) if status == "finished" else steps[-1]["loss"]
    watched = [line[metric] for line in validations if _is_number(line.get(metric))]
    if watched:
        figures[BEST + metric] = min(watched) if metric == LOWER_IS_BETTER else max(watched)
    if validations:
        figures.update({k: v for k, v in validations[-1].items() if k.startswith("eval_")})
    if steps:
        figures["peak_memory_gib"] = max(line.get("peak_memory_gib", 0.0) for line in steps)
        ends = [0, *(line["step"] for line in steps)]
        figures["seconds"] = math.fsum(
            line.get("step_seconds", 0.0) * (line["step"] - start)
            for start, line in zip(ends, steps, strict=False)
        )
    return RunOutcome(
        before.name,
        before.values,
        before.run_dir,
        status,
        error,
        steps[-1]["step"] if steps else 0,
        {name: float(value) for name, value in figures.items() if _is_number(value)},
    )


def average(outcomes: Sequence[RunOutcome]) -> list[SweepRow]:
    """Average the runs that differ in their seed alone, in the order of their first run."""
    groups: dict[str, list[RunOutcome]] = {}
    for outcome in outcomes:
        key = json.dumps({k: v for k, v in outcome.values.items() if k != SEED}, sort_keys=True)
        groups.setdefault(key, []).append(outcome)
    rows = []
    for members in groups.values():
        finished = [member for member in members if member.status == "finished"]
        names = dict.fromkeys(name for member in finished for name in member.figures)
        rows.append(
            SweepRow(
                values={k: v for k, v in members[0].values.items() if k != SEED},
                num_runs=len(members),
                num_finished=len(finished),
                figures={
                    name: _describe([m.figures[name] for m in finished if name in m.figures])
                    for name in names
                },
            )
        )
    return rows


def find_best(rows: Sequence[SweepRow], metric: str) -> SweepRow | None:
    """Find the row with the best mean of the watched metric.

    Args:
        rows: The rows; one that has a run that did not finish is passed over.
        metric: The metric.

    Returns:
        The row; None where nothing was validated: a training loss tells of no other rows.
    """
    figure = BEST + metric
    whole = [row for row in rows if row.num_finished == row.num_runs and figure in row.figures]
    if not whole:
        return None
    sign = 1.0 if metric == LOWER_IS_BETTER else -1.0
    return min(whole, key=lambda row: sign * row.figures[figure].mean)


def read_last_line(run_dir: Path) -> dict[str, Any]:
    """Read the last whole line of a run's metrics without reading all of them."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        values = _parse(line)
        if "loss" in values:
            return values
    return {}


def _describe(values: list[float]) -> Statistic:
    std = statistics.stdev(values) if len(values) > 1 else None
    return Statistic(statistics.fmean(values), std, len(values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file's JSON object; an empty one where there is none to read."""
    try:
        return _parse(path.read_bytes())
    except OSError:
        return {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the JSON objects of a file's lines; lines that hold none are passed over."""
    try:
        with path.open("rb") as file:
            yield from (values for line in file if (values := _parse(line)))
    except OSError:
        return


def _parse(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
