"""Render a report as one HTML file without network access; text in it is never executed.

Every text goes through Jinja's escaping, or into a JSON block in which `<`, `>` and `&` are written
as escapes. A Content Security Policy lets only this file's own scripts run, by their hashes, and
nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from wegeft_cli.analysis.report_page import charts, overview
from wegeft_cli.analysis.report_page.lines import Chart, draw_curves, list_curve_series
from wegeft_cli.analysis.report_page.methods_chart import draw_methods
from wegeft_cli.artifacts.sweep_table import SweepTable
from wegeft_cli.storage.json_files import to_finite

_MOST_TOKEN_ROWS = 12
_STILL_SAMPLES = 10  # shown without JavaScript; the page turns further
_STILL_WIDTH = 520
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render_page(
    runs: Sequence[Mapping[str, Any]],
    *,
    sweeps: Sequence[SweepTable] = (),
    benches: Sequence[Mapping[str, Any]] = (),
    title: str,
    made: str,
    mark: str,
) -> str:
    """Return the page as HTML; `made` states its origin and `mark` is the file's beginning."""
    import jinja2
    import vl_convert

    curves = draw_curves(runs)
    scores = charts.draw_scores(runs)
    methods = [draw_methods(number, bench) for number, bench in enumerate(benches)]
    inspections = [_prepare_inspection(number, run) for number, run in enumerate(runs)]
    drawn = [*curves, *([scores] if scores else [])]
    drawn += [chart for chart in methods if chart is not None]
    drawn += [chart for found in inspections for chart in found["charts"] + found["ablations"]]
    answers = _collect_answers(runs)
    bundle: Any = vl_convert.javascript_bundle  # None is its default, which its types lack
    library = bundle(None)
    script = _read("page.js") + _read("charts.js") + _read("samples.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = overview.format_number
    template = environment.from_string(_read("page.html.jinja"))
    return mark + template.render(
        title=title,
        made=made,
        runs=runs,
        summary=overview.summarize(runs),
        sweeps=[(sweep, overview.describe_sweep(sweep)) for sweep in sweeps],
        benches=[
            (bench, overview.describe_bench(bench), chart)
            for bench, chart in zip(benches, methods, strict=True)
        ],
        facts=overview.list_facts(runs),
        differing=overview.compare_recipes(runs),
        curves=curves,
        curve_series=list_curve_series(runs),
        scores=scores,
        inspections=inspections,
        pictures={chart["name"]: _draw_still(chart) for chart in drawn},
        data=_to_script({"charts": drawn, "answers": answers}),
        policy=_make_policy([library, script]),
        library=library,
        library_name=f"Vega, Vega-Lite and Vega-Embed from vl-convert-python "
        f"{version('vl-convert-python')} (BSD-3-Clause)",
        script=script,
        style=_read("page.css"),
        answers=answers,
        first_answers=answers[:_STILL_SAMPLES],
    )


def _draw_still(chart: Chart) -> str:
    """Draw a chart as SVG, which the page shows until its script draws the chart, or without it.

    Text and axes have the color of the page's text, so the picture fits light and dark. The
    renderer escapes the texts of the specification.
    """
    if chart["is_matrix"]:
        return charts.draw_matrix_still(chart)
    import vl_convert

    text = {"labelColor": "currentColor", "titleColor": "currentColor"}
    lines = {"gridColor": "currentColor", "domainColor": "currentColor"}
    config = {
        "aria": False,  # the picture has one description as a whole
        "background": "transparent",
        "font": "sans-serif",
        "view": {"stroke": None},
        "axis": {**text, **lines, "tickColor": "currentColor", "gridOpacity": 0.15},
    }
    spec = {**to_finite(chart["spec"]), "width": _STILL_WIDTH, "config": config}
    return vl_convert.vegalite_to_svg(spec)


def _read(name: str) -> str:
    return (files("wegeft_cli.analysis.report_page") / name).read_text(encoding="utf-8")


def _to_script(value: Any) -> str:
    """Return JSON that is safe inside a script element, for any text in it."""
    return json.dumps(to_finite(value), allow_nan=False, ensure_ascii=True).translate(_ESCAPES)


def _make_policy(scripts: Sequence[str]) -> str:
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode() for text in scripts
    ]
    allowed = " ".join(f"'sha256-{text}'" for text in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _prepare_inspection(number: int, run: Mapping[str, Any]) -> dict[str, Any]:
    """Build the charts and tables of one run's inspection."""
    found = run["inspection"]
    drawn = [
        charts.draw_ablation(number, place, each) for place, each in enumerate(run["ablations"])
    ]
    if found is None:
        return {"charts": [], "ablations": drawn, "tokens": [], "maps": [], "found": None}
    modules = sorted(found["modules"], key=lambda row: -(row.get("relative_change") or 0))
    tokens = [row for row in modules if row.get("role") == "writes" and row.get("tokens")]
    return {
        "charts": charts.draw_inspection(number, found),
        "ablations": drawn,
        "tokens": tokens[:_MOST_TOKEN_ROWS],
        "maps": _draw_maps(found),
        "found": found,
    }


def _draw_maps(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Draw the token-clustering maps, if there are any and matplotlib is installed."""
    if not found.get("maps"):
        return []
    try:
        from wegeft_cli.analysis.plots import draw_inspection
    except ImportError:
        return []
    pictures = draw_inspection({"modules": [], "top_k": 0, "cosines": [], "maps": found["maps"]})
    return [
        (each["image"], base64.b64encode(pictures[f"maps-{number}"]).decode())
        for number, each in enumerate(found["maps"])
    ]


def _collect_answers(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Collect the answers to one question side by side: base and tuned, for each run."""
    questions: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for run in runs:
        for answer in run["answers"]:
            texts = {k: str(answer.get(k, "")) for k in ("task", "protocol", "index", "prompt")}
            key = (texts["task"], texts["protocol"], texts["index"], texts["prompt"])
            question = questions.setdefault(
                key, {**texts, "answer": str(answer.get("answer", "")), "by": {}}
            )
            question["by"][f"{run['name']}: {answer.get('model', '')}"] = {
                "output": str(answer.get("output", "")),
                "prediction": _format_prediction(answer.get("prediction")),
                "correct": answer["correct"],
                "valid": bool(answer.get("valid", True)),
            }
    return list(questions.values())


def _format_prediction(value: Any) -> str | None:
    if value is None:
        return None
    return f"{value:g}" if isinstance(value, float) else str(value)
