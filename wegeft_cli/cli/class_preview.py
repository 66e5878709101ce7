"""The preview of a classifier's rows on the terminal: rows, classes, lengths or sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wegeft_cli.cli.commands.preview import plain, show_bars, tell_span
from wegeft_cli.cli.console import show

if TYPE_CHECKING:
    from wegeft_cli.planning.class_preview import ClassPreview

_MOST_CLASSES = 30


def print_classes(result: ClassPreview) -> None:
    """Show a classifier's preview.

    Args:
        result: The preview.
    """
    for row in result.rows:
        show(plain(f"row {row['number']}  {row['label']}  {_tell_size(row)}"), style="bold")
        text = row.get("read")
        show(plain(str(row["input"]) if text is None else text), soft_wrap=True)
    if result.rows:
        show("")
    beside = [
        f"{count:,} {name}"
        for name, count in (
            ("validation", result.num_validation_rows),
            ("test", result.num_test_rows),
        )
        if count
    ]
    more = f", {' and '.join(beside)} beside them" if beside else ""
    show(f"{result.num_rows:,} training rows{more}", highlight=False)
    if result.values is not None:
        told = ", ".join(f"{name} {value:g}" for name, value in result.values.items())
        show(f"they learn a number: {told}", highlight=False)
    if result.classes:
        _show_classes(result)
    if result.edge is not None:
        _show_sizes(result)
    else:
        _show_lengths(result)


def _tell_size(row: dict[str, Any]) -> str:
    if "read" in row:
        return f"{row['length']} tokens"
    width, height = row["size"]
    return f"{width} x {height} pixels, {row['mode']}"


def _show_classes(result: ClassPreview) -> None:
    shown = result.classes[:_MOST_CLASSES]
    show_bars(("class", "training rows"), [(each["label"], each["train"]) for each in shown])
    left = len(result.classes) - len(shown)
    if left:
        show(f"and {left} further classes; --json has all", style="dim", highlight=False)
    counts = [each["train"] for each in result.classes]
    largest = max(counts)
    show(
        f"{len(counts)} classes of {min(counts):,} to {largest:,} training rows; always answering "
        f"the commonest is right in {largest / sum(counts):.1%} of them",
        highlight=False,
    )


def _show_sizes(result: ClassPreview) -> None:
    sizes = ", ".join(
        f"{each['size'][0]} x {each['size'][1]} ({each['images']:,} images)"
        for each in result.sizes
    )
    show(f"commonest sizes: {sizes}", highlight=False)
    show(
        f"the model sees {result.edge} x {result.edge} pixels "
        f"(data.image_transform: {result.image_transform}), {result.lengths['max']} patches",
        highlight=False,
    )


def _show_lengths(result: ClassPreview) -> None:
    show_bars(
        ("tokens", "rows"),
        [(tell_span(bar), bar["rows"]) for bar in result.histogram],
    )
    told = result.lengths
    show(
        f"half have at most {told['p50']} tokens, 95% at most {told['p95']}, the longest "
        f"{told['max']}; data.max_length is {result.max_length}",
        highlight=False,
    )
