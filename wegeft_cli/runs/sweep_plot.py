"""Pictures by matplotlib, where it is installed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from wegeft_cli.recipe.grid import name_value, short_names
from wegeft_cli.storage.json_files import is_number

_WIDTH, _HEIGHT = 4.5, 3.6  # inches of a panel
_DPI = 150
_LOG_RATIO = 10  # an axis whose ends differ by this factor is logarithmic

Point = tuple[float, float | None]


def draw_sweep(
    values: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[Point | None]]
) -> bytes | None:
    """Draw the figures of a sweep's rows, one panel each.

    Along the axis goes the key with the most values, of numbers if there is one; each combination
    of the others is a line.

    Returns:
        A PNG file's bytes; None without matplotlib or without anything to draw.
    """
    panels = {name: points for name, points in panels.items() if any(points)}
    try:
        # Not pyplot: it would choose a backend for the whole process, and may want a screen.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not panels:
        return None
    figure = Figure(figsize=(_WIDTH * len(panels), _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    key = _choose_axis(values)
    lines = _group_lines(values, key)
    for place, (name, points) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        _draw_panel(axes, key, values, lines, points)
        axes.set_title(name.replace("_", " "))
        if len(lines) > 1 and place == 1:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _choose_axis(values: Sequence[Mapping[str, Any]]) -> str | None:
    """Choose the key along the axis; None where only seeds differ."""
    counts = {key: len({name_value(row[key]) for row in values}) for key in values[0]}
    varied = [key for key, count in counts.items() if count > 1]
    if not varied:
        return None
    return max(varied, key=lambda key: (all(is_number(row[key]) for row in values), counts[key]))


def _group_lines(values: Sequence[Mapping[str, Any]], key: str | None) -> dict[str, list[int]]:
    """Group the rows by their values of all keys but the axis's: label -> positions."""
    short = short_names(values[0])
    lines: dict[str, list[int]] = {}
    for position, row in enumerate(values):
        label = ", ".join(f"{short[k]} {name_value(v)}" for k, v in row.items() if k != key)
        lines.setdefault(label, []).append(position)
    return lines


def _draw_panel(
    axes: Any,
    key: str | None,
    values: Sequence[Mapping[str, Any]],
    lines: Mapping[str, list[int]],
    points: Sequence[Point | None],
) -> None:
    is_numeric = key is not None and all(is_number(row[key]) for row in values)
    ticks = list(dict.fromkeys("" if key is None else name_value(row[key]) for row in values))
    for label, positions in lines.items():
        along, means, spreads = [], [], []
        for position in positions:
            point = points[position]
            if point is None:
                continue
            row = values[position]
            name = "" if key is None else name_value(row[key])
            along.append(float(row[key]) if is_numeric and key else float(ticks.index(name)))
            means.append(point[0])
            spreads.append(point[1] or 0.0)
        order = sorted(range(len(along)), key=along.__getitem__)
        axes.errorbar(
            [along[i] for i in order],
            [means[i] for i in order],
            yerr=[spreads[i] for i in order],
            marker="o",
            capsize=3,
            linestyle="-" if is_numeric else "none",
            label=label,
        )
    if key is not None:
        axes.set_xlabel(key)
    if not is_numeric:
        axes.set_xticks(range(len(ticks)), ticks)
        return
    numbers = [row[key] for row in values if key]
    if min(numbers) > 0 and max(numbers) / min(numbers) >= _LOG_RATIO:
        axes.set_xscale("log")
