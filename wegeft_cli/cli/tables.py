"""Scores, comparisons and the list of tasks as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from wegeft_cli.cli.console import get_console, print_json, show

_NUM_CLASSES_SHOWN = 5
_LEFT = ("task", "protocol", "file under --data-dir", "answers", "protocols", "group", "tasks")


def print_scores(result: Mapping[str, Any]) -> None:
    """Show a result of `wegeft eval`: a table for each protocol, whose scores never mix.

    Args:
        result: The JSON object.
    """
    rows = result["results"]
    bases = result.get("base_results") or [None] * len(rows)
    tests = result.get("comparison") or [None] * len(rows)
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        told = [
            triple
            for triple in zip(rows, bases, tests, strict=True)
            if triple[0]["protocol"] == protocol
        ]
        _show_table(_score_columns(told), drop=("95 % interval", "protocol", "invalid", "p"))
    for mean, base in zip(
        result.get("groups", ()),
        result.get("base_groups") or [None] * len(result.get("groups", ())),
        strict=True,
    ):
        before = "" if base is None else f" (base {base['score']:.1%})"
        show(
            f"{mean['group']}: [bold]{mean['score']:.1%}[/]{before}, the {mean['aggregate']} "
            f"({mean['num_tasks']} tasks)",
            highlight=False,
            soft_wrap=True,
        )
        if parts := mean.get("parts"):
            each = ", ".join(f"{part} {score:.1%}" for part, score in parts.items())
            show(f"  {each}; mean of all tasks {mean['mean_of_tasks']:.1%}", highlight=False)
    for row in rows:
        _show_classes(row)
    if result.get("samples_path"):
        show(
            f"every sample: {result['samples_path']}", highlight=False, soft_wrap=True, style="dim"
        )


def _score_columns(told: Sequence[tuple[Any, Any, Any]]) -> dict[str, list[str]]:
    rows = [row for row, _, _ in told]
    columns = {
        "task": [row["task"] + (" (leaks)" if row.get("leak") else "") for row in rows],
        "protocol": [row["protocol"] for row in rows],
        "correct": [_count(row) for row in rows],
        "score": [_percent(row["score"]) for row in rows],
        "95 % interval": [_interval(row["ci95"]) for row in rows],
        "invalid": [str(row["n_invalid"]) for row in rows],
    }
    if told[0][1] is not None:
        columns["base"] = [_percent(base["score"]) for _, base, _ in told]
        columns["gain"] = [_gain(base["score"], row["score"]) for row, base, _ in told]
    if any(test is not None for _, _, test in told):
        columns["p"] = ["" if test is None else _show_p(test["p_value"]) for _, _, test in told]
    return columns


def _show_classes(row: Mapping[str, Any]) -> None:
    """Show a classifier's other figures, and the classes that it takes for others most often."""
    if "per_class" not in row:
        return
    figures = "  ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items())
    show(f"{row['task']}: {figures}", highlight=False, soft_wrap=True)
    wrong = [each for each in row["per_class"] if each["mistaken_for"]]
    wrong.sort(key=lambda each: each["accuracy"])
    for each in wrong[:_NUM_CLASSES_SHOWN]:
        other, count = next(iter(each["mistaken_for"].items()))
        show(
            f"  {each['label']}: {each['accuracy']:.1%} of {each['n']}, most often taken for "
            f"{other} ({count})",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _count(row: Mapping[str, Any]) -> str:
    """Rows answered rightly; just the rows where answers are neither right nor wrong."""
    correct = row["num_correct"]
    return f"{row['n']} rows" if correct is None else f"{correct} / {row['n']}"


def print_comparison(result: Mapping[str, Any]) -> None:
    """Show a result of `wegeft compare`.

    Args:
        result: The JSON object.
    """
    show(f"A: {result['a']}\nB: {result['b']}", highlight=False, soft_wrap=True)
    tasks = result["tasks"]
    for protocol in dict.fromkeys(task["protocol"] for task in tasks):
        told = [task for task in tasks if task["protocol"] == protocol]
        columns = {
            "task": [task["task"] for task in told],
            "protocol": [task["protocol"] for task in told],
            "n": [str(task["n"]) for task in told],
            "A": [_percent(task["score_a"]) for task in told],
            "B": [_percent(task["score_b"]) for task in told],
            "B - A": [f"{100 * task['difference']:+.1f}" for task in told],
            "95 % interval": [_interval(task["ci95"], sign="+") for task in told],
            "only A": [str(task["only_a"]) for task in told],
            "only B": [str(task["only_b"]) for task in told],
            "p": [f"{task['p_value']:.2g}" for task in told],
        }
        _show_table(columns, drop=("95 % interval", "protocol"))
    if left := result["not_compared"]:
        names = ", ".join(f"{task} ({protocol})" for task, protocol in left)
        why = "not compared, since answers are neither right nor wrong"
        show(f"{why}: {names}", highlight=False, soft_wrap=True)
    for side in ("a", "b"):
        if left := result[f"only_in_{side}"]:
            names = ", ".join(f"{task} ({protocol})" for task, protocol in left)
            show(f"only in {side.upper()}, not compared: {names}", highlight=False, soft_wrap=True)
    for task in tasks:
        if "generation" in task["differs"]:
            show(
                f"[yellow]note:[/] {task['task']} was generated with other settings in the two "
                "(`generation` in the files)",
                highlight=False,
                soft_wrap=True,
            )
    show(
        "p: McNemar's exact two-sided test on the rows where one alone is right",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def print_tasks(listing: Mapping[str, Any], as_json: bool) -> None:
    """Show the tasks, groups and protocols.

    Args:
        listing: The JSON object of `wegeft eval --list`.
        as_json: Print it as it is.
    """
    if as_json:
        print_json(dict(listing))
        return
    tasks = listing["tasks"]
    columns = {
        "task": [task["name"] for task in tasks],
        "file under --data-dir": [str(task.get("file") or "") for task in tasks],
        "answers": [str(task.get("kind") or "") for task in tasks],
        "rows": [f"{task['num_rows']:,}" if task.get("num_rows") else "" for task in tasks],
    }
    _show_table(columns)
    for task in tasks:
        for note in (task.get("part"), task.get("leak")):
            if note:
                told = f"{note}; needs --allow-leaky" if note == task.get("leak") else note
                show(f"[bold]{task['name']}[/]  {told}", highlight=False, soft_wrap=True)
    show("\n[bold]groups[/] (the score is the unweighted mean of the tasks')", highlight=False)
    for group in listing["groups"]:
        how = "; --task NAME RUN RUN ...: a run of each" if group.get("of_runs") else ""
        told = f"[bold]{group['name']}[/]  {', '.join(group['tasks'])}{how}"
        show(told, highlight=False, soft_wrap=True)
    show("\n[bold]protocols[/] (scores of two of them are never comparable)", highlight=False)
    for protocol in listing["protocols"]:
        show(
            f"[bold]{protocol['name']}[/]  {protocol['description']}",
            highlight=False,
            soft_wrap=True,
        )


def _show_table(columns: dict[str, list[str]], *, drop: Sequence[str] = ()) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    # A narrow terminal shows less rather than cut figures; --json and --output hold all.
    for name in drop:
        widths = [max(map(len, (title, *cells))) for title, cells in columns.items()]
        if name in columns and sum(widths) + 3 * len(widths) > get_console().width:
            del columns[name]
    table = Table(box=SIMPLE)
    for name in columns:
        justify: Literal["left", "right"] = "left" if name in _LEFT else "right"
        table.add_column(name, no_wrap=True, justify=justify)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    show(table)


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.1%}"


def _gain(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{100 * (after - before):+.1f}"


def _interval(bounds: Sequence[float] | None, *, sign: str = "") -> str:
    if bounds is None:  # of what is no share of rows
        return "-"
    low, high = (f"{100 * bound:{sign}.1f}" for bound in bounds)
    return f"{low} to {high}" if sign else f"{low}-{high}"


def _show_p(value: float) -> str:
    """Give a p-value as a narrow terminal has room for; the JSON has all of it."""
    return "<0.001" if value < 0.001 else f"{value:.2g}"
