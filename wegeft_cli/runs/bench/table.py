"""The table of a bench: means over seeds, ratios to the baseline, and a paired test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_results import RunOutcome, Statistic, describe_values
from wegeft_cli.errors import UserError
from wegeft_cli.runs.bench.measures import SCORE, VALIDATION_LOSS
from wegeft_cli.statistics import PairedMeans, compare_means
from wegeft_cli.storage.json_files import is_number, read_object

TABLE_NAME = "bench.json"
COSTS = (
    "trainable_parameters",
    "adapter_bytes",
    "peak_memory_gib",
    "step_seconds",
    "merge_seconds",
)
"""What a method costs, in the order of the table."""


@dataclass(frozen=True)
class Candidate:
    """One combination of a search.

    Args:
        values: Dotted key -> value.
        status: waiting, running, finished, failed or interrupted.
        validation_loss: Mean validation loss of its runs; None until each of them has one.
        error: Why the run failed.
    """

    values: dict[str, Any]
    status: str
    validation_loss: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class BenchRow:
    """One method.

    Args:
        method: Its name.
        type: The value of `adapter.type`.
        settings: Its own overrides.
        values: What its search has chosen; empty without a search.
        searched: The combinations of the search.
        seeds: Figures of each finished seed.
        num_seeds: Number of seeds asked for.
        figures: Figure -> mean, standard deviation and number of runs.
        ratios: Figure -> mean divided by the baseline's.
        test: The metric compared with the baseline's over the seeds that both have.
        notes: What went wrong, or limits the comparison.
    """

    method: str
    type: str
    settings: list[str]
    values: dict[str, Any]
    searched: list[Candidate]
    seeds: dict[int, dict[str, float]]
    num_seeds: int
    figures: dict[str, Statistic] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    test: PairedMeans | None = None
    notes: list[str] = field(default_factory=list)


def choose_metric(rows: Sequence[BenchRow]) -> str:
    """Return `score` if every method that has results has scores, else `validation_loss`."""
    seeds = [figures for row in rows for figures in row.seeds.values()]
    return SCORE if seeds and all(SCORE in figures for figures in seeds) else VALIDATION_LOSS


def join_seeds(
    values: dict[str, Any], outcomes: Sequence[RunOutcome], losses: Sequence[float | None]
) -> Candidate:
    """Return a combination as far as its runs are, one for each seed of the search."""
    if not outcomes:
        return Candidate(values, "waiting")
    first = next((each for each in outcomes if each.status != "finished"), outcomes[0])
    known = [loss for loss in losses if loss is not None]
    is_whole = first.status == "finished" and len(known) == len(outcomes)
    mean = math.fsum(known) / len(known) if is_whole else None
    return Candidate(values, first.status, mean, first.error)


def find_best(searched: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate of the lowest validation loss, the first of equal ones."""
    found = [
        each for each in searched if each.status == "finished" and is_number(each.validation_loss)
    ]
    return min(found, key=lambda each: each.validation_loss or 0.0) if found else None


def note_edges(searched: Sequence[Candidate], best: Candidate) -> list[str]:
    """Return a note for each key whose chosen value is the smallest or the largest tried."""
    notes = []
    for key, value in best.values.items():
        tried = [each.values[key] for each in searched]
        if len({str(each) for each in tried}) < 2 or not all(map(is_number, tried)):
            continue
        ends = {min(tried): "smallest", max(tried): "largest"}
        if value in ends:
            notes.append(f"the best {key}, {value}, is the {ends[value]} tried: widen the search")
    return notes


def _share_seeds(row: BenchRow, baseline: BenchRow, name: str) -> list[int]:
    """Return the seeds for which both rows have a figure: others would make a ratio unequal."""
    return [
        seed
        for seed, figures in row.seeds.items()
        if name in figures and name in baseline.seeds.get(seed, {})
    ]


def complete(row: BenchRow, baseline: BenchRow | None, metric: str) -> BenchRow:
    """Return a row with means, ratios and the paired test."""
    names = dict.fromkeys(name for figures in row.seeds.values() for name in figures)
    means = _average(row, names)
    ratios: dict[str, float] = {}
    test = None
    if baseline is not None:
        theirs = _average(baseline, names)
        for name in theirs:
            both = _share_seeds(row, baseline, name)
            divisor = sum(baseline.seeds[seed][name] for seed in both)
            if divisor:
                ratios[name] = sum(row.seeds[seed][name] for seed in both) / divisor
        shared = _share_seeds(row, baseline, metric)
        if shared and row.method != baseline.method:
            test = compare_means(
                [baseline.seeds[seed][metric] for seed in shared],
                [row.seeds[seed][metric] for seed in shared],
            )
    return BenchRow(
        **{**row.__dict__, "figures": means, "ratios": ratios, "test": test},
    )


def _average(row: BenchRow, names: Mapping[str, None]) -> dict[str, Statistic]:
    listed = {
        name: [figures[name] for figures in row.seeds.values() if name in figures] for name in names
    }
    return {name: describe_values(values) for name, values in listed.items() if values}


def read_bench(folder: Path) -> dict[str, Any] | None:
    """Return the values of a folder's bench.json; None if the folder is not a bench's.

    Raise UserError if the file is damaged.
    """
    file = folder / TABLE_NAME
    if not file.is_file():
        return None
    values = read_object(file)
    rows = values.get("methods")
    keys = {"method", "figures", "ratios", "num_seeds", "seeds", "notes"}
    is_whole = isinstance(rows, list) and all(
        isinstance(row, dict) and keys <= row.keys() for row in rows
    )
    if not rows or not is_whole or not isinstance(values.get("runs"), list):
        raise UserError("is damaged", file=str(file), hint="run the bench again")
    return {**values, "folder": folder}
