"""What is measured of a finished run beside its own records: scores, merge time, adapter size."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.adapter_files import WEIGHTS_NAME
from wegeft_cli.artifacts.run_directory import SCORES_END, RunDirectory
from wegeft_cli.artifacts.run_results import BEST, LOWER_IS_BETTER, RunOutcome
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.runs.children import ChildEnd, run_child
from wegeft_cli.storage.atomic import write_text_atomic
from wegeft_cli.storage.json_files import is_number, read_object

SCORE, VALIDATION_LOSS = "score", "validation_loss"
_SCORES_NAME = f"adapter-bench{SCORES_END}"
_SCORED_NAME = "bench-settings.json"
_MERGE_NAME, _MERGED_NAME = "merge.json", "merged-by-bench"
_LOG_NAME = "bench.log"


def validation_loss(outcome: RunOutcome, recipe: Recipe) -> float | None:
    """Return the validation loss of a run's adapter: of the last step, or of the kept one."""
    name = LOWER_IS_BETTER
    if recipe.train.load_best_model_at_end and recipe.train.metric_for_best_model == name:
        name = BEST + name
    return outcome.figures.get(name)


def figures_of(outcome: RunOutcome, recipe: Recipe) -> dict[str, float]:
    """Return the figures of a finished run for the table, as far as they are measured."""
    directory = RunDirectory(outcome.run_dir)
    record = directory.record()
    steps = [line["step_seconds"] for line in directory.metrics() if "step_seconds" in line]
    weights = directory.adapter_dir / WEIGHTS_NAME
    figures: dict[str, Any] = {
        **read_scores(outcome.run_dir),
        VALIDATION_LOSS: validation_loss(outcome, recipe),
        "trainable_parameters": record.get("trainable_parameters"),
        "adapter_bytes": weights.stat().st_size if weights.is_file() else None,
        "peak_memory_gib": outcome.figures.get("peak_memory_gib"),
        # The first steps compile and warm up: the median does not see them.
        "step_seconds": statistics.median(filter(is_number, steps)) if steps else None,
        "merge_seconds": read_object(outcome.run_dir / _MERGE_NAME).get("seconds"),
    }
    return {name: float(value) for name, value in figures.items() if is_number(value)}


def read_scores(run_dir: Path) -> dict[str, float]:
    """Return `score`, the mean of a bench's evaluation, and `score_<task>` of each of its tasks."""
    values = read_object(RunDirectory(run_dir).eval_dir / _SCORES_NAME)
    rows = values.get("results")
    scores = {
        f"{SCORE}_{row['task']}": float(row["score"])
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and "task" in row and is_number(row.get("score"))
    }
    if not scores:
        return {}
    groups = values.get("groups")
    whole = [
        float(group["score"])
        for group in (groups if isinstance(groups, list) else [])
        if isinstance(group, dict) and is_number(group.get("score"))
    ]
    mean = whole[0] if len(whole) == 1 else statistics.fmean(scores.values())
    return {SCORE: mean, **scores} if len(scores) > 1 else {SCORE: mean}


def list_eval_words(recipe: Recipe) -> list[str]:
    """Return the tasks of `wegeft eval` for a recipe's runs; none where it names no test data."""
    if recipe.has_head:
        return ["--task", "test"] if recipe.data.test else []
    return [word for name in recipe.eval.tasks for word in ("--task", name)]


def evaluate_run(run_dir: Path, recipe: Recipe, should_stop: Callable[[], bool]) -> ChildEnd:
    """Score a finished run's adapter, unless that is done."""
    directory = RunDirectory(run_dir)
    words, output = list_eval_words(recipe), directory.eval_dir / _SCORES_NAME
    settings = {"words": words, "eval": asdict(recipe.eval), "test": str(recipe.data.test)}
    record, text = output.with_name(_SCORED_NAME), json.dumps(settings, sort_keys=True)
    is_scored = record.is_file() and record.read_text(encoding="utf-8") == text
    if not words or (is_scored and _is_newer(output, directory)):
        return ChildEnd("finished")
    output.parent.mkdir(exist_ok=True)
    output.unlink(missing_ok=True)
    write_text_atomic(record, text)
    command = ["eval", str(run_dir), *words, "--output", str(output)]
    return run_child(command, run_dir / _LOG_NAME, should_stop)


def merge_run(run_dir: Path, should_stop: Callable[[], bool]) -> ChildEnd:
    """Merge a finished run's adapter once to measure it, unless that is done; keep no model."""
    record, output = run_dir / _MERGE_NAME, run_dir / _MERGED_NAME
    if _is_newer(record, RunDirectory(run_dir)) and is_number(read_object(record).get("seconds")):
        return ChildEnd("finished")
    shutil.rmtree(output, ignore_errors=True)
    command = ["merge", str(run_dir), "--output", str(output), "--json"]
    try:
        return run_child(command, run_dir / _LOG_NAME, should_stop, output=record)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def describe_data(run_dir: Path) -> Mapping[str, Any]:
    """Return what the recorded rows of a run are: equal for all methods of a bench."""
    record = RunDirectory(run_dir).record()
    data = record.get("data")
    kept = ("num_rows", "num_tokens", "num_label_tokens", "num_validation_rows")
    return {name: data.get(name) for name in kept} if isinstance(data, dict) else {}


def _is_newer(file: Path, directory: RunDirectory) -> bool:
    weights = directory.adapter_dir / WEIGHTS_NAME
    return (
        file.is_file()
        and weights.is_file()
        and file.stat().st_mtime >= weights.stat().st_mtime
        and file.stat().st_size > 0
    )
