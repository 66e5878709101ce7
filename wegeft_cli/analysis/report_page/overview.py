"""The tables of a report: what each run is and reached, a sweep's combinations, and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from wegeft_cli.artifacts.run_results import BEST, LOWER_IS_BETTER
from wegeft_cli.artifacts.sweep_table import SweepTable
from wegeft_cli.methods.registry import find_method
from wegeft_cli.recipe.grid import name_value, short_names

Run = Mapping[str, Any]
_BASE = "base"  # the model of scores that others are compared with


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        columns: Titles.
        rows: One text per column.
        best: Number of the best row; None without one.
    """

    columns: list[str]
    rows: list[list[str]]
    best: int | None = None


def summarize(runs: Sequence[Run]) -> Table:
    """Return one row per run: status, scores, losses, method, rank, learning rate and duration.

    Columns without a value are omitted.
    """
    tasks = dict.fromkeys((s["task"], s["protocol"]) for run in runs for s in run["scores"])
    recipes = [flatten(run["recipe"]) for run in runs]
    columns: dict[str, list[str | None]] = {
        "Run": [run["name"] for run in runs],
        "Status": [run["run"].get("status") for run in runs],
    }
    for task, protocol in tasks:
        title = f"Score: {task}" if len({p for t, p in tasks if t == task}) == 1 else None
        columns[title or f"Score: {task} ({protocol})"] = [
            _read_score(run, task, protocol) for run in runs
        ]
    watched = [recipe.get("train.metric_for_best_model", LOWER_IS_BETTER) for recipe in recipes]
    for metric in dict.fromkeys([LOWER_IS_BETTER, *watched]):
        columns[f"Best {metric}"] = [_read_best(run, metric) for run in runs]
    columns["Training loss"] = [format_number(run["run"].get("final_loss"), None) for run in runs]
    columns["Method"] = [recipe.get("adapter.type") for recipe in recipes]
    columns["Rank"] = [_read_rank(recipe) for recipe in recipes]
    columns["Learning rate"] = [recipe.get("train.learning_rate") for recipe in recipes]
    columns["Trainable parameters"] = [
        format_number(run["run"].get("trainable_parameters"), None) for run in runs
    ]
    columns["Duration"] = [format_duration(_seconds(run)) for run in runs]
    kept = {name: values for name, values in columns.items() if any(values)}
    rows = zip(*kept.values(), strict=True)
    return Table(list(kept), [["-" if text is None else str(text) for text in row] for row in rows])


def describe_sweep(sweep: SweepTable) -> Table:
    """Return the combinations of a sweep, best first, with means over their seeds."""
    keys = dict.fromkeys(key for row in sweep.rows for key in row["values"])
    figures = dict.fromkeys(
        name
        for row in sweep.rows
        for name in row["figures"]
        if name != sweep.metric or BEST + sweep.metric not in row["figures"]
    )
    shown = short_names(keys)
    columns = [*shown.values(), "Runs finished", *(name.replace("_", " ") for name in figures)]
    rows = [
        [
            *(name_value(row["values"].get(key)) for key in keys),
            f"{row['num_finished']} of {row['num_runs']}",
            *(_format_statistic(row["figures"].get(name)) for name in figures),
        ]
        for row in sweep.rows
    ]
    best = [place for place, row in enumerate(sweep.rows) if row["values"] == sweep.best]
    return Table(columns, rows, best[0] if best else None)


_BENCH_FIGURES = {
    "score": "Score",
    "validation_loss": "Validation loss",
    "trainable_parameters": "Trainable parameters",
    "adapter_bytes": "Adapter (bytes)",
    "peak_memory_gib": "Peak memory (GiB)",
    "step_seconds": "Step (s)",
    "merge_seconds": "Merge (s)",
}


def describe_bench(bench: Mapping[str, Any]) -> Table:
    """Return the methods of a bench: each figure with its ratio to the baseline, and the tests."""
    rows = bench["methods"]
    shown = {
        name: title
        for name, title in _BENCH_FIGURES.items()
        if any(name in row["figures"] for row in rows)
    }
    tests = {"t_test_p": "p (t-test)", "sign_flip_p": "p (sign flips)"}
    columns = ["Method", "Chosen values", "Seeds", *shown.values(), *tests.values()]
    table = [
        [
            str(row["method"]),
            ", ".join(f"{key}={value}" for key, value in (row.get("values") or {}).items()) or "-",
            f"{len(row['seeds'])} of {row['num_seeds']}",
            *(_format_figure(row, name) for name in shown),
            *(format_number((row.get("test") or {}).get(name)) for name in tests),
        ]
        for row in rows
    ]
    return Table(columns, table)


def _format_figure(row: Mapping[str, Any], name: str) -> str:
    text, ratio = _format_statistic(row["figures"].get(name)), row["ratios"].get(name)
    return text if ratio is None else f"{text} ({ratio:.3g} x)"


def list_facts(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Return the counts of all runs, one row per fact; facts without any value are omitted."""
    facts: list[tuple[str, Any]] = [
        ("Base model", lambda run: run["run"].get("base_model_name_or_path")),
        ("Optimizer steps", lambda run: run["run"].get("num_steps")),
        ("Adapter of step", lambda run: run["run"].get("adapter_step")),
        ("Skipped steps", lambda run: run["run"].get("num_skipped")),
        ("Rows", lambda run: _inner(run, "data", "num_rows")),
        ("Tokens", lambda run: _inner(run, "data", "num_tokens")),
        ("Learned tokens", lambda run: _inner(run, "data", "num_label_tokens")),
        ("Rows cut at max_length", lambda run: _inner(run, "data", "num_truncated")),
        ("Template", lambda run: _inner(run, "data", "template")),
        ("Padding share", lambda run: _inner(run, "waste", "padding_share")),
        ("Seed", lambda run: run["run"].get("seed")),
        ("Processes", lambda run: run["run"].get("num_processes")),
        ("Peak memory (GiB)", lambda run: run["run"].get("peak_memory_gib")),
        ("Started", lambda run: run["run"].get("started_at")),
    ]
    rows = [(name, [read(run) for run in runs]) for name, read in facts]
    return [(name, values) for name, values in rows if any(v is not None for v in values)]


def compare_recipes(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the recipe's lines in which several runs differ, by dotted key."""
    if len(runs) < 2:
        return []
    tables = [flatten(run["recipe"]) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, "-") for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def flatten(text: str) -> dict[str, str]:
    """Parse a resolved recipe's lines as dotted keys; lists stay with their key."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        key, colon, value = stripped.partition(":")
        if stripped.startswith("- ") or not colon:
            name = ".".join(part for _, part in path)
            found[name] = f"{found.get(name, '')} {stripped}".strip()
            continue
        while path and path[-1][0] >= indent:
            path.pop()
        path.append((indent, key))
        if value.strip():
            found[".".join(part for _, part in path)] = value.strip()
    return found


def format_number(value: Any, absent: Any = "-") -> Any:
    """Return a number with at most four significant digits, and any other value as text."""
    if value is None:
        return absent
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def format_duration(seconds: float | None) -> str | None:
    """Return a duration in its two largest units, such as `4 min 51 s`."""
    if seconds is None:
        return None
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _read_score(run: Run, task: str, protocol: str) -> str | None:
    """Return the newest score of the run's own model, and its gain over the base."""
    rows = [s for s in run["scores"] if (s["task"], s["protocol"]) == (task, protocol)]
    own = [row for row in rows if row["model"] != _BASE]
    if not own:
        return None
    score = own[-1]
    text = f"{100 * score['score']:.1f} %"
    base = [row for row in rows if row["model"] == _BASE and row["source"] == score["source"]]
    return f"{text} (base {100 * base[0]['score']:.1f} %)" if base else text


def _read_best(run: Run, metric: str) -> str | None:
    points = run["validation"].get(metric)
    if not points:
        return None
    choose = min if metric == LOWER_IS_BETTER else max
    step, value = choose(points, key=lambda point: point[1])
    return f"{format_number(value)} (step {step:,})"


def _read_rank(recipe: Mapping[str, str]) -> str | None:
    name = recipe.get("adapter.type")
    if name is None or "adapter.r" in find_method(name).unread_keys(name):
        return None
    return recipe.get("adapter.r")


def _seconds(run: Run) -> float | None:
    try:
        start, end = (datetime.fromisoformat(run["run"][k]) for k in ("started_at", "finished_at"))
        return (end - start).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def _format_statistic(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    mean, std = figure["mean"], figure["std"]
    if mean >= 1000 and float(mean).is_integer() and not std:  # a count, equal for all seeds
        return f"{int(mean):,}"
    shown: str = format_number(mean)
    return shown if std is None else f"{shown} ± {std:.2g}"


def _inner(run: Run, *keys: str) -> Any:
    value: Any = run["run"]
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
