"""The charts of a report as Vega-Lite specifications: data and marks, no code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wegeft_cli.analysis.report_page.lines import (
    PALETTE,
    SOLID,
    Chart,
    draw_lines,
    make_chart,
    style_series,
)
from wegeft_cli.storage.json_files import is_number

_ROW = 22  # pixels per bar
_MOST_CELLS = 64  # largest cosine matrix that is drawn
_SHADES = 20  # of a matrix in a page without scripts
POSITIVE, NEGATIVE = PALETTE[0], PALETTE[1]  # of cosines and of changes of a score


def draw_scores(runs: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Draw every score with its 95 % interval."""
    rows = [
        {
            "what": f"{score['task']} ({score['protocol']})",
            "who": f"{run['name']}: {score['model']}",
            "value": score["score"],
            "low": score["ci95"][0],
            "high": score["ci95"][1],
        }
        for run in runs
        for score in run["scores"]
    ]
    if not rows:
        return None
    who = list(dict.fromkeys(row["who"] for row in rows))
    y = {"type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 140}}
    shared: dict[str, Any] = {"y": {"field": "what", **y}, "color": _color("who", who)}
    if is_named := len(who) > len(PALETTE):  # colors repeat: each model is a line of its own
        rows = [{**row, "line": f"{row['who']}, {row['what']}"} for row in rows]
        y["axis"] = {"labelLimit": 240}
        shared["y"] = {"field": "line", **y}
    else:
        shared["yOffset"] = {"field": "who", "type": "nominal", "sort": who}
    x: dict[str, Any] = {"type": "quantitative", "scale": {"domain": [0, 1]}}
    x["axis"] = {"format": "%", "title": "score"}
    layers = [
        {
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {**shared, "x": {"field": "low", **x}, "x2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 70},
            "encoding": {
                **shared,
                "x": {"field": "value", **x},
                "shape": {"field": "who", "type": "nominal", "sort": who, "legend": None},
                "tooltip": [
                    {"field": "what", "title": "task"},
                    {"field": "who", "title": "model"},
                    {"field": "value", "title": "score", "format": ".1%"},
                    {"field": "low", "title": "95 % from", "format": ".1%"},
                    {"field": "high", "title": "to", "format": ".1%"},
                ],
            },
        },
    ]
    height = _ROW * (len(rows) if is_named else len(who) * len({row["what"] for row in rows}))
    spec = {"data": {"values": rows}, "layer": layers, "height": height}
    columns = ["what", "who", "value", "low", "high"]
    chart = make_chart("scores", "Scores with 95 % intervals", spec, columns)
    legend = [] if is_named else [{**each, "dash": SOLID} for each in style_series(who)]
    return {**chart, "legend": legend}


def draw_inspection(number: int, found: Mapping[str, Any]) -> list[Chart]:
    """Draw size, novelty and rank of each module's change, and the cosines between layers."""
    modules = found["modules"]
    kinds = list(dict.fromkeys(row["kind"] for row in modules))
    panels = (
        ("relative_change", "Relative size of the change, ||dW|| / ||W||"),
        ("novel", f"Novel share: outside W's {found.get('top_k')} leading left directions"),
        ("effective_rank", "Effective rank of the change"),
    )
    charts = []
    for key, title in panels:
        rows = [
            {"kind": row["kind"], "layer": _layer(row, place), "value": row[key]}
            for place, row in enumerate(modules)
            if is_number(row.get(key))
        ]
        if rows:
            name = f"inspect-{number}-{key}"
            charts.append(draw_lines(name, title, rows, along="layer", by="kind", series=kinds))
    for place, cosines in enumerate(found["cosines"]):
        if len(cosines["matrix"]) <= _MOST_CELLS:
            charts.append(_draw_cosines(f"inspect-{number}-cosine-{place}", cosines))
    return charts


def draw_ablation(number: int, place: int, found: Mapping[str, Any]) -> Chart:
    """Draw how a score changes without each part."""
    rows = [
        {"part": row["part"], "change": row["change"], "lost": row["lost"], "gained": row["gained"]}
        for row in found["parts"]
    ]
    spec = {
        "data": {"values": rows},
        "mark": {"type": "bar"},
        "encoding": {
            "y": {"field": "part", "type": "nominal", "sort": None, "title": None},
            "x": {
                "field": "change",
                "type": "quantitative",
                "axis": {"format": "+%", "title": "change of the score without the part"},
            },
            "color": {
                "condition": {"test": "datum.change < 0", "value": NEGATIVE},
                "value": POSITIVE,
            },
            "tooltip": [{"field": name} for name in ("part", "change", "lost", "gained")],
        },
        "height": _ROW * len(rows),
    }
    title = f"{found['whole']['task']} with one {found['by']} off at a time"
    return make_chart(
        f"ablation-{number}-{place}", title, spec, ["part", "change", "lost", "gained"]
    )


def _draw_cosines(name: str, cosines: Mapping[str, Any]) -> Chart:
    """Draw a matrix; opacity is the size of a cosine, so that 0 has the page's color."""
    rows = [
        {"first": i, "second": j, "cosine": round(value, 4)}
        for i, line in enumerate(cosines["matrix"])
        for j, value in enumerate(line)
        if is_number(value)
    ]
    axis = {"type": "ordinal", "axis": {"labelOverlap": True, "labelAngle": 0}}
    spec = {
        "data": {"values": rows},
        "transform": [{"calculate": "abs(datum.cosine)", "as": "size"}],
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": "first", "title": "layer", **axis},
            "y": {"field": "second", "title": "layer", **axis},
            "color": {
                "condition": {"test": "datum.cosine < 0", "value": NEGATIVE},
                "value": POSITIVE,
            },
            "opacity": {
                "field": "size",
                "type": "quantitative",
                "scale": {"domain": [0, 1], "range": [0, 1]},
                "legend": None,
            },
            "tooltip": [
                {"field": "first"},
                {"field": "second"},
                {"field": "cosine", "format": ".3f"},
            ],
        },
        "height": 230,
    }
    title = f"{cosines['kind']}: cosine between layers' changes"
    chart = make_chart(name, title, spec, ["first", "second", "cosine"])
    # Thousands of cells: on a canvas, and in the CSV file instead of a table.
    return {**chart, "renderer": "canvas", "has_table": False, "is_matrix": True}


def draw_matrix_still(chart: Chart) -> str:
    """Draw a matrix as a small SVG: Vega's has an element for each of thousands of cells."""
    shades: dict[tuple[str, int], list[str]] = {}
    rows = chart["spec"]["data"]["values"]
    for row in rows:
        color = NEGATIVE if row["cosine"] < 0 else POSITIVE
        cells = shades.setdefault((color, round(_SHADES * abs(row["cosine"]))), [])
        cells.append(f"M{row['first']} {row['second']}h1v1h-1z")
    side = 1 + max((row["first"] for row in rows), default=0)
    paths = "".join(
        f'<path fill="{color}" opacity="{shade / _SHADES}" d="{"".join(cells)}"/>'
        for (color, shade), cells in shades.items()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="230" height="230" '
        f'viewBox="0 0 {side} {side}" shape-rendering="crispEdges">{paths}</svg>'
    )


def _color(field: str, series: Sequence[str]) -> dict[str, Any]:
    styles = style_series(series)
    return {
        "field": field,
        "type": "nominal",
        "scale": {
            "domain": [each["name"] for each in styles],
            "range": [each["color"] for each in styles],
        },
        "legend": None,
    }


def _layer(row: Mapping[str, Any], place: int) -> int:
    return place if row.get("layer") is None else row["layer"]
