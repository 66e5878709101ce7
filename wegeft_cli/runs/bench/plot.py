"""Draw a bench's table: one panel for each figure, one bar for each method."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from wegeft_cli.runs.bench.table import COSTS, BenchRow

TITLES = {
    "score": "score",
    "validation_loss": "validation loss",
    "trainable_parameters": "trainable parameters",
    "adapter_bytes": "adapter, bytes",
    "peak_memory_gib": "peak memory, GiB",
    "step_seconds": "step, seconds",
    "merge_seconds": "merge, seconds",
}
_WIDTH, _DPI = 2.8, 150
_LOG_RATIO = 10


def draw_bench(rows: Sequence[BenchRow], metric: str, baseline: str) -> bytes | None:
    """Return a PNG file's bytes; None without matplotlib or without any figure."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    names = [name for name in (metric, *COSTS) if any(name in row.figures for row in rows)]
    if not names:
        return None
    height = 1.2 + 0.35 * len(rows)
    figure = Figure(figsize=(_WIDTH * len(names), height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), place)
        _draw_panel(axes, rows, name, baseline)
        axes.set_title(TITLES[name], fontsize="medium")
        if place > 1:
            axes.set_yticklabels([])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_panel(axes: Any, rows: Sequence[BenchRow], name: str, baseline: str) -> None:
    places = range(len(rows), 0, -1)
    found = [
        (place, row, row.figures[name])
        for place, row in zip(places, rows, strict=True)
        if name in row.figures
    ]
    means = [figure.mean for _, _, figure in found]
    axes.errorbar(
        means,
        [place for place, _, _ in found],
        xerr=[figure.std or 0.0 for _, _, figure in found],
        fmt="o",
        capsize=3,
    )
    for _, row, figure in found:
        if row.method == baseline:
            axes.axvline(figure.mean, color="gray", linewidth=0.8, linestyle="--")
    if min(means) > 0 and max(means) / min(means) >= _LOG_RATIO:
        axes.set_xscale("log")
    axes.set_yticks(list(places), [row.method for row in rows])
    axes.set_ylim(0.5, len(rows) + 0.5)
    axes.grid(visible=True, axis="x", alpha=0.3)
