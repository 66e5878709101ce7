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

from wegeft_cli.analysis.report_page import charts
from wegeft_cli.storage.json_files import to_finite

_MOST_TOKEN_ROWS = 12
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render_page(runs: Sequence[Mapping[str, Any]], *, title: str, made: str, mark: str) -> str:
    """Return the page as HTML; `made` states its origin and `mark` is the file's beginning."""
    import jinja2
    import vl_convert

    curves = charts.draw_curves(runs)
    scores = charts.draw_scores(runs)
    inspections = [_prepare_inspection(number, run) for number, run in enumerate(runs)]
    drawn = [*curves, *([scores] if scores else [])]
    drawn += [chart for found in inspections for chart in found["charts"] + found["ablations"]]
    data = {"charts": drawn, "answers": _collect_answers(runs)}
    bundle: Any = vl_convert.javascript_bundle  # None is its default, which its types lack
    library = bundle(None)
    script, style = _read("page.js"), _read("page.css")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _tell_number
    template = environment.from_string(_read("page.html.jinja"))
    return mark + template.render(
        title=title,
        made=made,
        runs=runs,
        facts=_compare_facts(runs),
        differing=_compare_recipes(runs),
        curves=curves,
        scores=scores,
        inspections=inspections,
        data=_to_script(data),
        policy=_make_policy([library, script]),
        library=library,
        library_name=f"Vega, Vega-Lite and Vega-Embed from vl-convert-python "
        f"{version('vl-convert-python')} (BSD-3-Clause)",
        script=script,
        style=style,
        num_answers=len(data["answers"]),
    )


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


def _tell_number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _compare_facts(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return the counts of all runs, one row per fact; facts without any value are omitted."""

    def seconds(run: Mapping[str, Any]) -> Any:
        from datetime import datetime

        try:
            start, end = (
                datetime.fromisoformat(run["run"][k]) for k in ("started_at", "finished_at")
            )
        except (KeyError, TypeError, ValueError):
            return None
        return round((end - start).total_seconds())

    facts: list[tuple[str, Any]] = [
        ("Status", lambda run: run["run"].get("status")),
        ("Error", lambda run: run["run"].get("error")),
        ("Base model", lambda run: run["run"].get("base_model_name_or_path")),
        ("Trainable parameters", lambda run: run["run"].get("trainable_parameters")),
        ("Optimizer steps", lambda run: run["run"].get("num_steps")),
        ("Final loss", lambda run: run["run"].get("final_loss")),
        ("Adapter of step", lambda run: run["run"].get("adapter_step")),
        ("Skipped steps", lambda run: run["run"].get("num_skipped")),
        ("Rows", lambda run: _inner(run, "data", "num_rows")),
        ("Tokens", lambda run: _inner(run, "data", "num_tokens")),
        ("Learned tokens", lambda run: _inner(run, "data", "num_label_tokens")),
        ("Rows cut at max_length", lambda run: _inner(run, "data", "num_truncated")),
        ("Template", lambda run: _inner(run, "data", "template")),
        ("Padding share", lambda run: _inner(run, "waste", "padding_share")),
        ("Seed", lambda run: run["run"].get("seed")),
        ("Processes", lambda run: run["run"].get("num_processes")),
        ("Peak memory (GiB)", lambda run: run["run"].get("peak_memory_gib")),
        ("Seconds from start to end", seconds),
        ("Started", lambda run: run["run"].get("started_at")),
    ]
    rows = [(name, [read(run) for run in runs]) for name, read in facts]
    return [(name, values) for name, values in rows if any(v is not None for v in values)]


def _inner(run: Mapping[str, Any], *keys: str) -> Any:
    value: Any = run["run"]
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _compare_recipes(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the recipe's lines in which several runs differ, by dotted key."""
    if len(runs) < 2:
        return []
    tables = [_flatten(run["recipe"]) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, "-") for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flatten(text: str) -> dict[str, str]:
    """Parse a resolved recipe's lines as dotted keys; lists stay with their key."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        key, colon, value = stripped.partition(":")
        if stripped.startswith("- ") or not colon:
            name = ".".join(part for _, part in path)
            found[name] = f"{found.get(name, '')} {stripped}".strip()
            continue
        while path and path[-1][0] >= indent:
            path.pop()
        path.append((indent, key))
        if value.strip():
            found[".".join(part for _, part in path)] = value.strip()
    return found


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
                "prediction": _tell_prediction(answer.get("prediction")),
                "correct": answer["correct"],
                "valid": bool(answer.get("valid", True)),
            }
    return list(questions.values())


def _tell_prediction(value: Any) -> str | None:
    if value is None:
        return None
    return f"{value:g}" if isinstance(value, float) else str(value)
