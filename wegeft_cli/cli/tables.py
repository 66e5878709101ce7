"""Tables: the one drawer, and those of scores, comparisons and benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from wegeft_cli.cli.console import escape_control, get_console, print_json, show

_NUM_CLASSES_SHOWN = 5


def print_scores(result: Mapping[str, Any]) -> None:
    """Print a result of `wegeft eval`, with one table per protocol."""
    rows = result["results"]
    bases = result.get("base_results") or [None] * len(rows)
    tests = result.get("comparison") or [None] * len(rows)
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        shown = [
            triple
            for triple in zip(rows, bases, tests, strict=True)
            if triple[0]["protocol"] == protocol
        ]
        show_table(
            _score_columns(shown),
            text=("protocol",),
            drop=("95 % interval", "protocol", "invalid", "p"),
        )
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
        show(f"samples: {result['samples_path']}", highlight=False, soft_wrap=True, style="dim")


def _score_columns(triples: Sequence[tuple[Any, Any, Any]]) -> dict[str, list[str]]:
    rows = [row for row, _, _ in triples]
    columns = {
        "task": [row["task"] + (" (leaks)" if row.get("leak") else "") for row in rows],
        "protocol": [row["protocol"] for row in rows],
        "correct": [_count(row) for row in rows],
        "score": [_percent(row["score"]) for row in rows],
        "95 % interval": [_interval(row["ci95"]) for row in rows],
        "invalid": [str(row["n_invalid"]) for row in rows],
    }
    if triples[0][1] is not None:
        columns["base"] = [_percent(base["score"]) for _, base, _ in triples]
        columns["gain"] = [_gain(base["score"], row["score"]) for row, base, _ in triples]
    if any(test is not None for _, _, test in triples):
        columns["p"] = ["" if test is None else _show_p(test["p_value"]) for _, _, test in triples]
    return columns


def _show_classes(row: Mapping[str, Any]) -> None:
    """Print a classifier's other metrics and the classes that it confuses most often."""
    if "per_class" not in row:
        return
    figures = "  ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items())
    show(f"{row['task']}: {figures}", highlight=False, soft_wrap=True)
    wrong = [each for each in row["per_class"] if each["mistaken_for"]]
    wrong.sort(key=lambda each: each["accuracy"])
    for each in wrong[:_NUM_CLASSES_SHOWN]:
        other, count = next(iter(each["mistaken_for"].items()))
        show(
            f"  {each['label']}: {each['accuracy']:.1%} of {each['n']}, most often confused with "
            f"{other} ({count})",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _count(row: Mapping[str, Any]) -> str:
    """Return the number of correct rows, or of rows if answers are neither right nor wrong."""
    correct = row["num_correct"]
    return f"{row['n']} rows" if correct is None else f"{correct} / {row['n']}"


def print_comparison(result: Mapping[str, Any]) -> None:
    """Print a result of `wegeft compare`."""
    show(f"A: {result['a']}\nB: {result['b']}", highlight=False, soft_wrap=True)
    tasks = result["tasks"]
    for protocol in dict.fromkeys(task["protocol"] for task in tasks):
        shown = [task for task in tasks if task["protocol"] == protocol]
        columns = {
            "task": [task["task"] for task in shown],
            "protocol": [task["protocol"] for task in shown],
            "n": [str(task["n"]) for task in shown],
            "A": [_percent(task["score_a"]) for task in shown],
            "B": [_percent(task["score_b"]) for task in shown],
            "B - A": [f"{100 * task['difference']:+.1f}" for task in shown],
            "95 % interval": [_interval(task["ci95"], sign="+") for task in shown],
            "only A": [str(task["only_a"]) for task in shown],
            "only B": [str(task["only_b"]) for task in shown],
            "p": [f"{task['p_value']:.2g}" for task in shown],
        }
        show_table(columns, text=("protocol",), drop=("95 % interval", "protocol"))
    if left := result["not_compared"]:
        names = ", ".join(f"{task} ({protocol})" for task, protocol in left)
        why = "not compared, because answers are neither right nor wrong"
        show(f"{why}: {names}", highlight=False, soft_wrap=True)
    for side in ("a", "b"):
        if left := result[f"only_in_{side}"]:
            names = ", ".join(f"{task} ({protocol})" for task, protocol in left)
            show(f"only in {side.upper()}, not compared: {names}", highlight=False, soft_wrap=True)
    for task in tasks:
        if "generation" in task["differs"]:
            show(
                f"[yellow]note:[/] {task['task']} was generated with different settings "
                "(`generation` in the files)",
                highlight=False,
                soft_wrap=True,
            )
    show(
        "p: McNemar's exact two-sided test on rows that only one answers correctly",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def print_tasks(listing: Mapping[str, Any], as_json: bool) -> None:
    """Print the result of `wegeft eval --list`."""
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
    show_table(columns, text=("file under --data-dir", "answers"))
    for task in tasks:
        for note in (task.get("part"), task.get("leak")):
            if note:
                needs = "; needs --allow-leaky" if note == task.get("leak") else ""
                show(f"[bold]{task['name']}[/]  {note}{needs}", highlight=False, soft_wrap=True)
    show("\n[bold]groups[/] (score: unweighted mean of the tasks)", highlight=False)
    for group in listing["groups"]:
        how = "; --task NAME RUN RUN ...: one run per dataset" if group.get("of_runs") else ""
        line = f"[bold]{group['name']}[/]  {', '.join(group['tasks'])}{how}"
        show(line, highlight=False, soft_wrap=True)
    show("\n[bold]protocols[/] (scores of different protocols are not comparable)", highlight=False)
    for protocol in listing["protocols"]:
        show(
            f"[bold]{protocol['name']}[/]  {protocol['description']}",
            highlight=False,
            soft_wrap=True,
        )


def show_table(
    columns: Mapping[str, Sequence[str]],
    *,
    title: str = "",
    text: Collection[str] = (),
    drop: Iterable[str] = (),
    bold_rows: Collection[int] = (),
) -> None:
    """Print columns of cells as a table that fits the terminal.

    The first column and those in `text` are aligned to the left, and those in `text` are wrapped
    where they are too long. While the table is too wide, the
    columns in `drop` are removed in order: no figure is cut, and --json has all of them.
    """
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    # Widths are measured with what the console shows for control characters.
    kept = {escape_control(n): list(map(escape_control, cells)) for n, cells in columns.items()}
    for name in drop:
        widths = [max(map(len, (header, *cells))) for header, cells in kept.items()]
        if sum(widths) + 3 * len(widths) > get_console().width:
            kept.pop(name, None)
    table = Table(box=SIMPLE, title=Text(title) if title else None, title_justify="left")
    table.title_style = "bold"
    for position, name in enumerate(kept):
        is_text = position == 0 or name in text
        longest = max(map(len, (name, *kept[name])))
        # Names of rows are cut beyond 24 characters; a wrapped column takes what is left.
        least = min(24, longest) if position == 0 else len(name)
        table.add_column(
            Text(name),
            justify="left" if is_text else "right",
            no_wrap=name not in text,
            overflow="fold" if name in text else "ellipsis",
            min_width=None if name in text else least,
        )
    for position, cells in enumerate(zip(*kept.values(), strict=True)):
        table.add_row(*map(Text, cells), style="bold" if position in bold_rows else None)
    show(table)


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.1%}"


def _gain(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{100 * (after - before):+.1f}"


def _interval(bounds: Sequence[float] | None, *, sign: str = "") -> str:
    if bounds is None:  # the score is not a fraction of rows
        return "-"
    low, high = (f"{100 * bound:{sign}.1f}" for bound in bounds)
    return f"{low} to {high}" if sign else f"{low}-{high}"


def _show_p(value: float) -> str:
    """Return a short p-value; the JSON has all digits."""
    return "<0.001" if value < 0.001 else f"{value:.2g}"
