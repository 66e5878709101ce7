"""`wegeft eval` of a classifier: its scores, its samples file and its result file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.environment import describe_environment
from wegeft_cli.distributed.processes import evaluation_processes
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation.benchmarks.classification import PROTOCOL, SPLITS, evaluate_classes
from wegeft_cli.evaluation.compare import compare_scores
from wegeft_cli.evaluation.result_files import choose_samples_path, choose_scores_path, write_line
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.storage.atomic import write_text_atomic


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
    processes = evaluation_processes()
    if processes.rank:
        reporter = SilentReporter()
    results, base_results, lines = evaluate_classes(
        path,
        recipe,
        splits=splits,
        data_dir=data_dir,
        limit=limit,
        batch_size=batch_size,
        compare_base=compare_base,
        base=base,
        processes=processes,
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
    if processes.is_main:
        write_text_atomic(samples_path, "".join(write_line(line) for line in lines))
        output = output or choose_scores_path(samples_path)
        write_text_atomic(output, json.dumps(result, indent=2, allow_nan=False) + "\n")
    processes.leave()
    return result


def refuse_samples(samples: Path, names: Sequence[str]) -> None:
    """Refuse to score a classifier's answers from a file.

    Args:
        samples: The file, as given.
        names: The tasks, as typed.

    Raises:
        UserError: If the file or the tasks are a classifier's.
    """
    if _is_of_classifier(samples) or (names and set(names) <= set(SPLITS)):
        raise UserError(
            "answers of a classifier are scored as it gives them, not out of a file",
            key="--samples",
            hint="score the run: wegeft eval RUN --task test; its samples file tells each row",
        )


def _is_of_classifier(samples: Path) -> bool:
    try:
        with samples.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
    except (OSError, ValueError, RecursionError):
        return False  # what reads the file tells
    return isinstance(first, dict) and first.get("protocol") == PROTOCOL


def refuse_foreign(foreign: Mapping[str, Any]) -> None:
    """Refuse options that say nothing to a classifier.

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
