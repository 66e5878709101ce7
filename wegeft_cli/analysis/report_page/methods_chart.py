"""The chart of a bench: the compared figure of each method over its trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wegeft_cli.analysis.report_page.lines import PALETTE, SOLID, Chart, make_chart
from wegeft_cli.storage.json_files import is_number

_PARAMETERS = "trainable_parameters"
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_HEIGHT = 280


def draw_methods(number: int, bench: Mapping[str, Any]) -> Chart | None:
    """Draw a bench's methods, with the deviation over their seeds; None without any figure."""
    metric = str(bench["metric"])
    title = metric.replace("_", " ")
    rows = _list_points(bench["methods"], metric)
    if not rows:
        return None
    names = [row["method"] for row in rows]
    # The first 24 pairs of a color and a shape differ.
    colors = [PALETTE[place % len(PALETTE)] for place in range(len(names))]
    shapes = [
        _SHAPES[(place + place // len(PALETTE)) % len(_SHAPES)] for place in range(len(names))
    ]
    shared = {"field": "method", "type": "nominal"}
    x = {
        "field": "parameters",
        "type": "quantitative",
        "scale": {"type": "log", "nice": False, "padding": 24},
        "axis": {
            "title": "trainable parameters",
            "format": "~s",
            "labelOverlap": "greedy",
            "labelSeparation": 6,
        },
    }
    y = {"type": "quantitative", "scale": {"zero": False}, "title": title}
    color = {**shared, "scale": {"domain": names, "range": colors}, "legend": None}
    shape = {**shared, "scale": {"domain": names, "range": shapes}, "legend": None}
    fields = ("method", "parameters", "mean", "deviation", "seeds")
    spec = {
        "data": {"values": rows},
        "encoding": {"x": x, "color": color},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {"y": {"field": "low", **y}, "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "opacity": 1, "size": 80},
                "encoding": {
                    "y": {"field": "mean", **y},
                    "shape": shape,
                    "tooltip": [{"field": name} for name in fields],
                },
            },
        ],
        "height": _HEIGHT,
    }
    chart = make_chart(
        f"bench-{number}", f"{title.capitalize()} and trainable parameters", spec, fields
    )
    legend = [
        {"name": name, "color": color, "dash": SOLID, "shape": shape}
        for name, color, shape in zip(names, colors, shapes, strict=True)
    ]
    return {**chart, "legend": legend}


def _list_points(methods: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return the point and the bar of each method that has both figures."""
    rows = []
    for method in methods:
        size, figure = method["figures"].get(_PARAMETERS), method["figures"].get(metric)
        if not (_is_mean(size) and _is_mean(figure)) or size["mean"] <= 0:
            continue
        spread = figure["std"] if is_number(figure.get("std")) else 0.0
        rows.append(
            {
                "method": str(method["method"]),
                "parameters": size["mean"],
                "mean": figure["mean"],
                "deviation": spread,
                "low": figure["mean"] - spread,
                "high": figure["mean"] + spread,
                "seeds": figure.get("n"),
            }
        )
    return rows


def _is_mean(figure: object) -> bool:
    return isinstance(figure, dict) and is_number(figure.get("mean"))
