"""Line charts of a report: training curves over steps, and figures of modules over layers.

Each chart carries its Vega-Lite specification and what the page needs to redraw it: the fields of
its points, and whether the controls above the curves apply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's colors, distinct for any kind of color vision; lines also differ in dashes.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6FDF", "#7F7F7F")
SOLID = [1, 0]
DASHES = (SOLID, [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [10, 4], [4, 1], [3, 6])
_MOST_MARKED = 60  # points of a series that are drawn as points too
_DOTS = {
    "transform": [{"filter": "datum.marked === true"}],
    "mark": {"type": "point", "filled": True, "opacity": 1, "size": 30},
}
_TRAINING, _VALIDATION = "training", "validation"

_CURVE_TITLES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Throughput (tokens per second)",
    "peak_memory_gib": "Peak memory (GiB)",
}
_LOSSES = ("loss", "eval_loss")  # training and validation, of one chart
_NOISY = ("grad_norm", "tokens_per_second")  # smoothed with the loss

Chart = dict[str, Any]
Series = dict[str, Any]


def make_chart(name: str, title: str, spec: dict[str, Any], columns: Sequence[str]) -> Chart:
    """Return a chart; `columns` are the fields of its table and of its CSV file."""
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": title,
        "width": "container",
        **spec,
    }
    # Sections of the page have short names too.
    return {
        "name": f"chart-{name}",
        "title": title,
        "spec": whole,
        "columns": list(columns),
        "has_table": True,
        "renderer": "svg",
        "legend": [],
        "is_matrix": False,
        "along": None,  # the field of a line's horizontal axis
        "by": None,  # the field that names the line
        "is_curve": False,  # the controls above the curves apply
        "is_noisy": False,  # and smoothing does
    }


def style_series(names: Sequence[str]) -> list[Series]:
    """Return the color and the dashes of each line; the first 64 pairs differ."""
    count = len(PALETTE)
    return [
        {
            "name": name,
            "color": PALETTE[place % count],
            "dash": DASHES[(place + place // count) % len(DASHES)],
        }
        for place, name in enumerate(names)
    ]


def draw_curves(runs: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Draw the curves, all runs in each chart: losses first, then validation, then the others."""
    names = [run["name"] for run in runs]
    charts = [_draw_losses(runs, names)]
    metrics = dict.fromkeys(name for run in runs for name in run["validation"])
    for name in metrics:
        if name not in _LOSSES:
            rows = _rows(runs, "validation", name)
            charts.append(_draw_curve(name, f"Validation: {name}", rows, names))
    for name, title in _CURVE_TITLES.items():
        chart = _draw_curve(name, title, _rows(runs, "curves", name), names)
        charts.append({**chart, "is_noisy": name in _NOISY})
    return [chart for chart in charts if chart["spec"]["data"]["values"]]


def list_curve_series(runs: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Return the legend of the curves: runs, or the two losses of a single run."""
    if len(runs) > 1:
        return style_series([run["name"] for run in runs])
    is_validated = any(run["validation"].get(_LOSSES[1]) for run in runs)
    return style_series([_TRAINING, _VALIDATION]) if is_validated else []


def _draw_losses(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Chart:
    """Draw training and validation loss in one chart; points mark the validations."""
    kinds = ((_TRAINING, "curves", _LOSSES[0]), (_VALIDATION, "validation", _LOSSES[1]))
    rows = [
        {**row, "kind": kind, **({"marked": True} if kind == _VALIDATION else {})}
        for kind, table, name in kinds
        for row in _rows(runs, table, name)
    ]
    is_validated = any(row["kind"] == _VALIDATION for row in rows)
    title = "Loss: training, and validation with points" if is_validated else "Training loss"
    by, series = ("run", names) if len(runs) > 1 else ("kind", [_TRAINING, _VALIDATION])
    chart = draw_lines(
        "curve-loss", title, rows, along="step", by=by, series=series, are_marked=False
    )
    if len(runs) > 1:
        chart["spec"]["layer"][0]["encoding"]["detail"] = {"field": "kind"}
    columns = ["run", "kind", "step", "value"]
    return {**chart, "is_curve": True, "is_noisy": True, "columns": columns}


def _draw_curve(name: str, title: str, rows: list[dict[str, Any]], names: Sequence[str]) -> Chart:
    chart = draw_lines(f"curve-{name}", title, rows, along="step", by="run", series=names)
    return {**chart, "is_curve": True}


def _rows(runs: Sequence[Mapping[str, Any]], table: str, name: str) -> list[dict[str, Any]]:
    return [
        {"run": run["name"], "step": step, "value": value}
        for run in runs
        for step, value in run[table].get(name, ())
    ]


def draw_lines(
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    *,
    along: str,
    by: str,
    series: Sequence[str],
    are_marked: bool = True,
) -> Chart:
    """Draw one line for each value of `by` in `series`, over the field `along`.

    Few points are marked by dots too, unless `are_marked` is false. The legend is HTML above the
    charts: a symbol of Vega's would be cut by its own dashes, and long names would not wrap.
    """
    if are_marked and len(rows) <= _MOST_MARKED * len(series):
        rows = [{**row, "marked": True} for row in rows]
    styles = style_series(series)
    scale = {"domain": [each["name"] for each in styles]}
    shared = {"field": by, "type": "nominal", "legend": None}
    color = {**shared, "scale": {**scale, "range": [each["color"] for each in styles]}}
    dash = {**shared, "scale": {**scale, "range": [each["dash"] for each in styles]}}
    spec = {
        "data": {"name": "rows", "values": rows},
        "encoding": {
            "x": {
                "field": along,
                "type": "quantitative",
                "axis": {"tickMinStep": 1, "labelFlush": False},
            },
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": None,
                "scale": {"zero": False},
            },
            "color": color,
        },
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1.7}, "encoding": {"strokeDash": dash}},
            *([_DOTS] if any("marked" in row for row in rows) else []),
        ],
        "height": 220,
    }
    columns = [by, along, "value"]
    return {**make_chart(name, title, spec, columns), "along": along, "by": by, "legend": styles}
