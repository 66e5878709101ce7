"""`wegeft eval` of a classifier: its scores, its samples file and its result file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wegeft_cli.checkpoints.files import write_text_atomic
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.workflows.class_evaluate import PROTOCOL, evaluate_classes
from wegeft_cli.workflows.compare import compare_scores
from wegeft_cli.workflows.launch import is_in_group
from wegeft_cli.workflows.reporter import Reporter
from wegeft_cli.workflows.run_folder import describe_environment
from wegeft_cli.workflows.score_files import choose_samples_path, choose_scores_path, write_line


def evaluate_classifier(
    path: str | Path,
    recipe: Recipe | None,
    *,
    splits: Sequence[str],
    data_dir: Path | None,
    limit: int | None,
    batch_size: int | None,
    output: Path | None,
    compare_base: bool,
    base: str | None,
    foreign: Mapping[str, Any],
    reporter: Reporter,
) -> dict[str, Any]:
    """Score a classifier and write what `wegeft eval` writes.

    Args:
        path: An adapter, run or model folder.
        recipe: The run's recipe, where it belongs to a run.
        splits: As `evaluate_classes` takes them.
        data_dir: As `evaluate_classes` takes it.
        limit: Only the first so many rows of each split.
        batch_size: Rows at a time.
        output: The result file; None lets it lie beside the samples.
        compare_base: Score the base too.
        base: The base's folder or hub id, where it is not as recorded.
        foreign: Options of language models, by name; none may be given.
        reporter: Where words and progress go.

    Returns:
        The command's JSON object.

    Raises:
        UserError: If an option is for language models, or as `evaluate_classes`.
        ExceptionGroup: If there are several faults.
    """
    refuse_foreign(foreign)
    results, base_results, lines = evaluate_classes(
        path,
        recipe,
        splits=splits,
        data_dir=data_dir,
        limit=limit,
        batch_size=batch_size,
        compare_base=compare_base,
        base=base,
        reporter=reporter,
    )
    result: dict[str, Any] = {"results": results}
    if base_results is not None:
        result["base_results"] = base_results
        samples: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for line in lines:
            samples.setdefault((line["model"], line["task"]), []).append(line)
        result["comparison"] = [
            None
            if row["num_correct"] is None
            else compare_scores(
                row["task"],
                PROTOCOL,
                samples["base", row["task"]],
                samples["target", row["task"]],
            )
            for row in results
        ]
    samples_path = choose_samples_path(path, output, [row["task"] for row in results], PROTOCOL)
    result |= {"samples_path": str(samples_path), "target": str(path), **describe_environment()}
    write_text_atomic(samples_path, "".join(write_line(line) for line in lines))
    output = output or choose_scores_path(samples_path)
    write_text_atomic(output, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def refuse_foreign(foreign: Mapping[str, Any]) -> None:
    """Refuse options that say nothing to a classifier, and several processes.

    Args:
        foreign: Options by name.

    Raises:
        UserError: If one was given.
        ExceptionGroup: If several were.
    """
    raise_all(
        [
            UserError(
                f"{value!r} is for language models; this is a classifier",
                key=f"--{name.replace('_', '-')}",
                hint="remove it",
            )
            for name, value in foreign.items()
            if value
        ]
    )
    if is_in_group():
        raise UserError(
            "a classifier is scored by one process",
            key="--num-processes",
            hint="leave it out, and start the command without a launcher",
        )
