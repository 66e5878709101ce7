"""Where the files of an evaluation lie, and what may be written there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import SCORES_END
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.score import TaskScore
from wegeft_cli.storage.atomic import disk_errors, write_text_atomic

SAMPLES_END = "-samples.jsonl"

_RESULT_START = '{\n  "results": ['  # as json.dumps(indent=2) begins it
_SAMPLES_START = '{"model": "'


def check_outputs(output: Path) -> None:
    """Find out before the work begins that --output cannot be written or would replace a file.

    Args:
        output: The result file; the samples file goes beside it.

    Raises:
        UserError: If either cannot be written, or is a file that is no earlier result.
    """
    _check_output(output)
    _check_output(beside(output), is_ours=_SAMPLES_START)


def beside(output: Path) -> Path:
    """Give the samples file that goes with a result file."""
    return output.with_name(f"{output.stem}-samples.jsonl")


def _check_output(output: Path, *, is_ours: str = _RESULT_START) -> None:
    """Find out before the work begins that --output cannot be written or would replace a file."""
    place = output.parent
    while not place.exists():
        place = place.parent
    if output.is_dir() or not place.is_dir():
        what = "this is a folder" if output.is_dir() else f"{str(place)!r} is no folder"
        raise UserError(
            what, file=str(output), key="--output", hint="give a file such as scores.json"
        )
    if not output.exists():
        return
    with disk_errors(output, "read"):
        text = output.read_text(encoding="utf-8", errors="replace")
    if text and not text.startswith(is_ours):
        raise UserError(
            "this file is no earlier result, and nothing else is overwritten",
            file=str(output),
            key="--output",
            hint="give another name",
        )


def choose_samples_path(
    path: str | Path | None, output: Path | None, names: Sequence[str], protocol: str
) -> Path:
    """Choose where the samples go: beside --output, in the run's folder, or under runs/."""
    if output is not None:
        return beside(output)
    name = "-".join([*names, protocol])
    folder = Path(path) if path is not None else Path("runs")
    for candidate in (folder, folder.parent):
        if (candidate / "run.json").is_file():
            return candidate / "eval" / f"{folder.name}-{name}{SAMPLES_END}"
    return Path("runs") / "eval" / f"{folder.name}-{name}{SAMPLES_END}"


def choose_scores_path(samples_path: Path) -> Path:
    """Give the result file that goes with a samples file."""
    return samples_path.with_name(samples_path.name.replace(SAMPLES_END, SCORES_END))


def write_line(sample: Mapping[str, Any]) -> str:
    """Give one line of a samples file."""
    return json.dumps(sample, ensure_ascii=False) + "\n"


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
