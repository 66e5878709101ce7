"""The charts of a report as Vega-Lite specifications: data and marks, no code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wegeft_cli.storage.json_files import is_number

# Okabe and Ito's colors, distinct for any kind of color vision; lines also differ in dashes.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6FDF", "#7F7F7F")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [10, 4], [4, 1], [3, 6])
_ROW = 22  # pixels per bar
_MOST_CELLS = 64  # largest cosine matrix that is drawn

_CURVE_TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Throughput (tokens per second)",
    "peak_memory_gib": "Peak memory (GiB)",
}

Chart = dict[str, Any]


def draw_curves(runs: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Draw the training curves, all runs in each chart, and the validation curves."""
    charts = []
    for name, title in _CURVE_TITLES.items():
        rows = [
            {"run": run["name"], "step": step, "value": value}
            for run in runs
            for step, value in run["curves"].get(name, ())
        ]
        if rows:
            charts.append(_line_chart(f"curve-{name}", title, rows, "step", "run", _names(runs)))
    metrics = dict.fromkeys(name for run in runs for name in run["validation"])
    for name in metrics:
        rows = [
            {"run": run["name"], "step": step, "value": value}
            for run in runs
            for step, value in run["validation"].get(name, ())
        ]
        title = f"Validation: {name}"
        charts.append(_line_chart(f"curve-{name}", title, rows, "step", "run", _names(runs)))
    return charts


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
    shared = {
        "y": {"field": "what", "type": "nominal", "title": None, "axis": {"labelLimit": 140}},
        "yOffset": {"field": "who", "type": "nominal", "sort": who},
        "color": _colour("who", who),
    }
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
    height = _ROW * len(who) * len({row["what"] for row in rows})
    spec = {"data": {"values": rows}, "layer": layers, "height": height}
    columns = ["what", "who", "value", "low", "high"]
    return _chart("scores", "Scores with 95 % intervals", spec, columns)


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
            charts.append(_line_chart(name, title, rows, "layer", "kind", kinds))
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
                "condition": {"test": "datum.change < 0", "value": PALETTE[1]},
                "value": PALETTE[0],
            },
            "tooltip": [{"field": name} for name in ("part", "change", "lost", "gained")],
        },
        "height": _ROW * len(rows),
    }
    title = f"{found['whole']['task']} with one {found['by']} off at a time"
    return _chart(f"ablation-{number}-{place}", title, spec, ["part", "change", "lost", "gained"])


def _draw_cosines(name: str, cosines: Mapping[str, Any]) -> Chart:
    rows = [
        {"first": i, "second": j, "cosine": value}
        for i, line in enumerate(cosines["matrix"])
        for j, value in enumerate(line)
        if is_number(value)
    ]
    axis = {"type": "ordinal", "axis": {"labelOverlap": True, "labelAngle": 0}}
    spec = {
        "data": {"values": rows},
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": "first", "title": "layer", **axis},
            "y": {"field": "second", "title": "layer", **axis},
            "color": {
                "field": "cosine",
                "type": "quantitative",
                "scale": {"scheme": "blueorange", "domain": [-1, 1], "reverse": True},
            },
            "tooltip": [
                {"field": "first"},
                {"field": "second"},
                {"field": "cosine", "format": ".3f"},
            ],
        },
        "height": 230,
    }
    chart = _chart(name, f"{cosines['kind']}: cosine between layers' changes", spec, [])
    # Thousands of cells: the values are in the JSON, not in a table.
    return {**chart, "renderer": "canvas"}


_LEGEND = {"orient": "top", "title": None, "labelLimit": 260, "columns": 2}


def _line_chart(
    name: str, title: str, rows: list[dict[str, Any]], along: str, by: str, series: Sequence[str]
) -> Chart:
    dashes = [_DASHES[i % len(_DASHES)] for i in range(len(series))]
    is_single = len(series) == 1
    spec = {
        "data": {"values": rows},
        "mark": {"type": "line", "point": {"size": 12 if len(rows) > 60 else 30}, "clip": True},
        "encoding": {
            "x": {"field": along, "type": "quantitative", "axis": {"tickMinStep": 1}},
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": None,
                "scale": {"zero": False},
            },
            "color": _colour(by, series, hidden=is_single),
            "strokeDash": {
                "field": by,
                "type": "nominal",
                "scale": {"domain": list(series), "range": dashes},
                "legend": None if is_single else _LEGEND,
            },
            "tooltip": [{"field": by}, {"field": along}, {"field": "value", "format": ".4~g"}],
        },
        "height": 220,
    }
    return _chart(name, title, spec, [by, along, "value"])


def _colour(field: str, series: Sequence[str], *, hidden: bool = False) -> dict[str, Any]:
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(series))]
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": list(series), "range": colours},
        "legend": None if hidden else _LEGEND,
    }


def _chart(name: str, title: str, spec: dict[str, Any], columns: Sequence[str]) -> Chart:
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": title,
        "width": "container",
        **spec,
    }
    # Sections of the page have short names too.
    return {"name": f"chart-{name}", "title": title, "spec": whole, "columns": list(columns)}


def _names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [run["name"] for run in runs]


def _layer(row: Mapping[str, Any], place: int) -> int:
    return place if row.get("layer") is None else row["layer"]
