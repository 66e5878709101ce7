"""Read sweep.json, the table of a sweep, for the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.artifacts.run_results import BEST, LOWER_IS_BETTER
from wegeft_cli.errors import UserError
from wegeft_cli.storage.json_files import is_number, read_object

TABLE_NAME = "sweep.json"


@dataclass(frozen=True)
class SweepTable:
    """A sweep as its folder holds it.

    Args:
        folder: The sweep's folder.
        status: running, finished, failed or interrupted.
        metric: The watched metric.
        best: Values of the best combination; None without one.
        rows: One per combination without its seed, best first: values, num_runs, num_finished,
            figures (name -> mean, std).
        runs: Every run, best first: name, status, error.
        started: Folders of the runs that hold files, in that order.
    """

    folder: Path
    status: str
    metric: str
    best: dict[str, Any] | None
    rows: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    started: list[Path]


def read_sweep(folder: Path) -> SweepTable | None:
    """Return the sweep of a folder; None if the folder is not a sweep's.

    Raise UserError if its table is damaged or none of its runs has started.
    """
    file = folder / TABLE_NAME
    if not file.is_file():
        return None
    values = read_object(file)
    metric, best = str(values.get("metric")), values.get("best")
    rows = [_read_row(row) for row in _objects(values.get("rows"))]
    runs = _objects(values.get("runs"))
    if not rows or not runs:
        raise UserError("is damaged: it holds no runs", file=str(file), hint="run the sweep again")
    sign = 1 if metric == LOWER_IS_BETTER else -1

    def rank(mean: Any) -> tuple[bool, float]:
        return (False, sign * mean) if is_number(mean) else (True, 0.0)

    figure = BEST + metric
    rows.sort(key=lambda row: rank(row["figures"].get(figure, {}).get("mean")))
    runs.sort(key=lambda run: rank(_object(run.get("figures")).get(figure)))
    folders = [folder / Path(str(run.get("name"))).name for run in runs]
    started = [path for path in folders if RunDirectory(path).exists()]
    if not started:
        raise UserError(
            "no run of this sweep has started", file=str(folder), hint="start it: wegeft sweep"
        )
    return SweepTable(
        folder=folder,
        status=str(values.get("status")),
        metric=metric,
        best=best if isinstance(best, dict) else None,
        rows=rows,
        runs=[{k: run.get(k) for k in ("name", "status", "error")} for run in runs],
        started=started,
    )


def _read_row(row: dict[str, Any]) -> dict[str, Any]:
    figures = {
        name: {"mean": each["mean"], "std": each["std"] if is_number(each.get("std")) else None}
        for name, each in _object(row.get("figures")).items()
        if isinstance(each, dict) and is_number(each.get("mean"))
    }
    counts = {k: row.get(k, 0) for k in ("num_runs", "num_finished")}
    return {"values": _object(row.get("values")), "figures": figures, **counts}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(values: Any) -> list[dict[str, Any]]:
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []
