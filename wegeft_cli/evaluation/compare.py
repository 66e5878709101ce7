"""`wegeft compare`: two results of `wegeft eval` on the same rows, with a paired test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError, disk_errors, raise_all
from wegeft_cli.evaluation.text.json_rows import raise_faults, read_bytes, read_json_lines
from wegeft_cli.statistics import compare_paired
from wegeft_cli.storage.json_files import parse_json, shorten

_RESULT_TYPES: Mapping[str, tuple[type, ...]] = {
    "task": (str,),
    "protocol": (str,),
    "score": (int, float, type(None)),
    "n": (int,),
}
_SAME = ("template_hash", "data_sha256", "n")
_REPORTED = ("base_fingerprint", "base_quantization", "adapter_fingerprint", "generation")


def compare_scores(
    task: str,
    protocol: str,
    a: Sequence[Mapping[str, Any]],
    b: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return task, protocol and the paired test of two models' samples (`index`, `correct`)."""
    verdicts = [{sample["index"]: bool(sample["correct"]) for sample in side} for side in (a, b)]
    return {"task": task, "protocol": protocol, **asdict(compare_paired(*verdicts))}


def compare(path_a: Path, path_b: Path) -> dict[str, Any]:
    """Compare two result files, task by task.

    Only results with the same protocol, template, rows and settings are compared.

    Args:
        path_a: A file of `wegeft eval --output`; its samples file must exist.

    Returns:
        The JSON object of `wegeft compare`: a, b, tasks (each with n, both, only_a, only_b,
        neither, score_a, score_b, difference, ci95, p_value), not_compared (answers that are
        neither right nor wrong), only_in_a, only_in_b.

    Raises:
        UserError: If a file is no result, has lost its samples, or has nothing in common with the
            other; and if a task's prompts or rows differ.
        ExceptionGroup: If there are several such faults.
    """
    results = [_read_results(path) for path in (path_a, path_b)]
    shared = [name for name in results[0] if name in results[1]]
    if not shared:
        listed = [", ".join(f"{task} ({protocol})" for task, protocol in r) for r in results]
        raise UserError(
            f"no task is in both under the same protocol: {listed[0]}; and {listed[1]}",
            file=str(path_b),
            hint="scores of different tasks or protocols are not comparable",
        )
    raise_all(
        [
            fault
            for name in shared
            for fault in _find_differences(name, results[0][name], results[1][name], path_b)
        ]
    )
    samples = [_read_samples(path) for path in (path_a, path_b)]
    tasks, not_compared = [], []
    for name in shared:
        rows_a = _rows_of(samples[0], name, path_a)
        rows_b = _rows_of(samples[1], name, path_b)
        if any(row.get("correct") is None for row in (*rows_a, *rows_b)):
            not_compared.append(list(name))
            continue
        if {row["index"] for row in rows_a} != {row["index"] for row in rows_b}:
            raise UserError(f"the samples of `{name[0]}` are of other rows", file=str(path_b))
        compared = compare_scores(*name, rows_a, rows_b)
        compared |= {"score_a": results[0][name]["score"], "score_b": results[1][name]["score"]}
        differing = [
            key for key in _REPORTED if results[0][name].get(key) != results[1][name].get(key)
        ]
        tasks.append({**compared, "differs": differing})
    return {
        "a": str(path_a),
        "b": str(path_b),
        "tasks": tasks,
        "not_compared": not_compared,
        "only_in_a": [list(name) for name in results[0] if name not in results[1]],
        "only_in_b": [list(name) for name in results[1] if name not in results[0]],
    }


def _find_differences(
    name: tuple[str, str], a: Mapping[str, Any], b: Mapping[str, Any], path_b: Path
) -> list[UserError]:
    """Return an error for another test set, prompt, or number of rows."""
    words = {"template_hash": "prompt", "data_sha256": "test file", "n": "number of rows"}
    return [
        UserError(
            f"`{name[0]}` ({name[1]}) was asked with another {words[key]}: {a.get(key)} and "
            f"{b.get(key)}",
            file=str(path_b),
            key=key,
            hint="score both models again on the same rows",
        )
        for key in _SAME
        if a.get(key) != b.get(key)
    ]


def _read_results(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the results by (task, protocol)."""
    rows = _read_object(path).get("results")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and _RESULT_TYPES.keys() <= row.keys() for row in rows
    ):
        raise UserError(
            "this is no result of `wegeft eval`", file=str(path), hint="make one with --output FILE"
        )
    for position, row in enumerate(rows):
        for key, types in _RESULT_TYPES.items():
            if type(row[key]) not in types:
                raise UserError(
                    f"has the wrong type: {shorten(row[key])}",
                    file=str(path),
                    key=f"results[{position}].{key}",
                    hint="make the file with `wegeft eval --output FILE`",
                )
    return {(row["task"], row["protocol"]): row for row in rows}


def _read_object(path: Path) -> dict[str, Any]:
    with disk_errors(path, "read"):
        content = path.read_bytes()
    values = parse_json(content, file=str(path), allow_nan=True)
    return values if isinstance(values, dict) else {}


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """Read the samples of a result: beside it, or at the recorded path."""
    recorded = _read_object(path).get("samples_path")
    known = Path(recorded) if isinstance(recorded, str) else Path()
    for place in (path.with_name(known.name or "samples"), known):
        if known.name and place.is_file():
            break
    else:
        raise UserError(
            f"its samples file {shorten(recorded)} is gone: rows can only be compared with it",
            file=str(path),
            key="samples_path",
            hint="put it beside the result, or score again",
        )
    lines, faults = read_json_lines(read_bytes(place), place)
    raise_faults(faults)
    return [line.value for line in lines]


def _rows_of(
    samples: Sequence[Mapping[str, Any]], name: tuple[str, str], path: Path
) -> list[Mapping[str, Any]]:
    rows = [
        row
        for row in samples
        if (row.get("task"), row.get("protocol")) == name and row.get("model") != "base"
    ]
    if not rows or not all(_is_verdict(row) for row in rows):
        raise UserError(
            f"its samples file has no verdicts on `{name[0]}` ({name[1]})",
            file=str(path),
            hint="score again with `wegeft eval --output`",
        )
    return rows


def _is_verdict(row: Mapping[str, Any]) -> bool:
    has_verdict = "correct" in row and type(row["correct"]) in (bool, type(None))
    return has_verdict and type(row.get("index")) is int
