"""Answers and verdicts in the formats of other tools, beside the samples file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wegeft_cli.checkpoints.files import write_text_atomic
from wegeft_cli.evaluation.scoring import TaskScore

_SAMPLES_END = "-samples"


def write_public_files(
    result: dict[str, Any],
    samples_path: Path,
    scores: Sequence[TaskScore],
    base_scores: Sequence[TaskScore] | None,
) -> None:
    """Write the scores' files, and tell in the result where they are.

    Args:
        result: The JSON object of `wegeft eval`; each result that has files gets a `files` list.
        samples_path: They go beside it and begin like it.
        scores: The target's.
        base_scores: The base's; the names of its files say so.
    """
    stem = samples_path.stem.removesuffix(_SAMPLES_END)
    groups = [("", scores, result["results"])]
    if base_scores is not None:
        groups.append(("base-", base_scores, result["base_results"]))
    for prefix, group, rows in groups:
        for score, row in zip(group, rows, strict=True):
            paths = []
            for end, content in score.files.items():
                path = samples_path.with_name(f"{stem}-{prefix}{end}")
                write_text_atomic(path, content)
                paths.append(str(path))
            if paths:
                row["files"] = paths
