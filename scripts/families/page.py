"""Writes the results of the matrix into docs/models.md, below the line `MARKER`."""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from families.matrix import Row, count_outcomes
from families.outcomes import FAILED, OK, REFUSED
from families.stages import STAGES

TITLES = {
    "causal_lm": "Language models",
    "sequence_classification": "Text classifiers",
    "image_classification": "Image classifiers",
}
SHOWN = {OK: "ok", REFUSED: "refused", FAILED: "**failed**"}
PACKAGES = ("transformers", "peft", "torch")
LONGEST = 300

MARKER = "<!-- Below: written by `make families`. -->"


def write_page(rows: Sequence[Row], page: Path, command: str) -> None:
    """Replace what is below the marker of the page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    parts = [
        page.read_text(encoding="utf-8").partition(MARKER)[0] + MARKER + "\n",
        f"{time.strftime('%Y-%m-%d')}, {versions}, `{command}`.\n",
        _count_table(rows),
    ]
    for task, title in TITLES.items():
        found = [row for row in rows if row["task"] == task]
        parts += [f"### {title} ({len(found)})\n", _table(found), *_messages(found)]
    page.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def _count_table(rows: Sequence[Row]) -> str:
    counts = count_outcomes(rows)
    lines = ["| stage | ok | refused | failed |", "|---|---:|---:|---:|"]
    for stage in STAGES:
        found = counts.get(stage, {})
        lines.append(
            f"| {stage} | {' | '.join(str(found.get(k, 0)) for k in (OK, REFUSED, FAILED))} |"
        )
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> str:
    lines = [f"| family | {' | '.join(STAGES)} |", f"|---{'|---' * len(STAGES)}|"]
    for row in rows:
        cells = [_cell(row["stages"].get(stage)) for stage in STAGES]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any] | None) -> str:
    return SHOWN[found["outcome"]] if found else "-"


def _messages(rows: Sequence[Row]) -> list[str]:
    """Return one line per message, with the families and stages that got it."""
    heard: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for stage, found in row["stages"].items():
            is_own = not found["message"].startswith("nothing was")
            is_names = stage == "published" and "matches no linear layer" in found["message"]
            if found["outcome"] != OK and is_own and not is_names:
                text = _generalize(found["message"])
                heard.setdefault(text, {}).setdefault(row["name"], []).append(stage)
            elif stage == "fallback" and found["outcome"] == OK:
                text = f"trains with `{found['figures']['overrides'][0]}`"
                heard.setdefault(text, {}).setdefault(row["name"], []).append(stage)
    lines = []
    for text, families in heard.items():
        stages = dict.fromkeys(stage for found in families.values() for stage in found)
        names = ", ".join(families)
        lines.append(f"- {names} ({', '.join(stages)}): {text}")
    return [*lines, ""]


def _generalize(message: str) -> str:
    """Shorten a message, without run folders and source lines, in one line of Markdown."""
    text = re.sub(r"/\S*/family-\w+/| \[[^\]]*\.py:\d+\]$", "", " ".join(message.split()))
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " ..."
