"""Which parts of an adapter carry a behaviour: a task scored with one of them off at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.analysis.adapter_parts import KINDS, Element, list_elements
from wegeft_cli.analysis.class_ablate import open_split, without_head
from wegeft_cli.analysis.edit import edit_files
from wegeft_cli.analysis.output_files import check_output, check_plots, save_ablation, write_json
from wegeft_cli.artifacts.adapter import (
    Adapter,
    AdapterFiles,
)
from wegeft_cli.artifacts.run_directory import find_recipe_of
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import Asked, EvalJob, TaskRequest
from wegeft_cli.evaluation.class_scores import refuse_foreign
from wegeft_cli.evaluation.evaluate import read_jobs
from wegeft_cli.evaluation.score import TaskScore, result_dict
from wegeft_cli.inference.loaded_classifier import is_classifier
from wegeft_cli.inference.loaded_model import OpenedTarget, open_target
from wegeft_cli.methods.registry import require_generators
from wegeft_cli.methods.wegeft.inject import disable_generators, remove_generators
from wegeft_cli.methods.wegeft.save_load import attach_files
from wegeft_cli.models.device_memory import generation_memory_errors
from wegeft_cli.recipe.schema import EvalSection
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.statistics import mcnemar_exact

DEFAULT_DIRECTIONS = 16


def ablate(
    adapter: str | Path | None = None,
    *,
    by: str = "group",
    task: str | None = None,
    protocol: str | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    top: int | None = None,
    base: str | None = None,
    plots: Path | None = None,
    output: Path | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Score a task with each part of an adapter switched off, one at a time, and rank the parts.

    A part off is the adapter that `edit(drop=[part])` would write. The rows are the same every
    time, so answers are compared one by one: `lost` became wrong without the part, `gained` became
    right, and `p_value` is that of the exact sign test of the two (McNemar). With many parts some
    p-values are small by chance. `base` is the base alone; of a classifier, whose base has no head
    for these classes, it is the base with the head that was learned.

    Args:
        adapter: An adapter or run folder; None takes the newest finished run under runs/.
        by: group, layer, module, direction, or saved (modules that were trained whole).
        task: Task by name, or of a classifier test or validation; None takes the first of the
            run's recipe.
        protocol: Prompt, decoding and scoring rules by name.
        data_dir: Folder with `<set>/test.json`.
        limit: Only the first so many rows.
        batch_size: Prompts generated at a time.
        max_new_tokens: Longest answer.
        top: Of directions, only so many, the largest first; None takes 16.
        base: The base's folder or hub id, where it is not as recorded.
        plots: Folder for the picture, where matplotlib is installed (`wegeft-cli[plot]`).
        output: A file that holds the JSON object, written anew after every part.
        reporter: Where words and progress go.

    Returns:
        The JSON object of `wegeft inspect --ablate`: adapter, by, num_parts, whole and base (as
        rows of `wegeft eval`), parts (part, score, change, num_correct, n, n_invalid, ci95, lost,
        gained, p_value), those whose loss costs most first.

    Raises:
        UserError: If the adapter is not WeGeFT's, has no such parts, or task or data are at fault.
    """
    reporter = reporter or SilentReporter()
    if by not in KINDS:
        raise UserError(f"got {by!r}", key="--ablate", hint=f"one of {', '.join(KINDS)}")
    if plots is not None:
        check_plots()
    if output is not None:
        check_output(output)
    opened_adapter = Adapter.open(adapter)
    adapter_dir = opened_adapter.folder
    hint = "train it by adapter.type: wegeft to switch parts off"
    require_generators(opened_adapter, "only WeGeFT's parts can be switched off", hint=hint)
    files = opened_adapter.files
    elements = list_elements(files, by, DEFAULT_DIRECTIONS if top is None else top)
    if not elements:
        raise UserError(f"the adapter has no {by} to switch off", key="--ablate")
    recipe = find_recipe_of(adapter_dir)
    score: Callable[[str], TaskScore]
    classifies = is_classifier(adapter_dir, recipe)
    if classifies:
        refuse_foreign({"protocol": protocol, "max_new_tokens": max_new_tokens})
        model, score = open_split(
            adapter_dir,
            recipe,
            split=task,
            data_dir=data_dir,
            limit=limit,
            batch_size=batch_size,
            base=base,
            reporter=reporter,
        )
        elements = without_head(elements, model)
    else:
        settings = recipe.eval if recipe is not None else EvalSection()
        names = [task] if task is not None else list(settings.tasks)[:1]
        request = TaskRequest("", protocol, data_dir, limit, max_new_tokens, settings)
        job = read_jobs(names, request)[0]
        opened = open_target(adapter_dir, recipe, base=base, warn=reporter.warn)
        model = opened.model
        score = _asking(job, opened, batch_size or settings.batch_size, reporter)

    def switch(files: AdapterFiles) -> None:
        remove_generators(model)
        attach_files(model, files, adapter_dir)
        model.eval()

    whole = score("whole")
    if whole.score is None:
        raise UserError(f"{job.name} gives no score of its own to compare", key="--task")
    if classifies:
        switch(_without_factors(files))
        without = score("base")
    else:
        with disable_generators(model):
            without = score("base")
    result: dict[str, Any] = {
        "adapter": str(adapter_dir),
        "by": by,
        "num_parts": len(elements),
        "whole": result_dict(whole),
        "base": result_dict(without),
        "parts": [],
    }
    for element in elements:
        remaining = edit_files(files, [(element, 0.0)])
        if remaining.manifest.modules:
            switch(remaining)
            found = score(element.text)
        elif remaining.saved_modules:
            switch(_without_factors(files))  # what it trained whole stays
            found = score(element.text)
        else:
            found = without
        result["parts"].append(_compare(element, found, whole))
        result["parts"].sort(key=lambda row: row["change"])
        if output is not None:
            write_json(output, result)
    if plots is not None:
        result["plots"] = [str(path) for path in save_ablation(result, plots)]
    return result


def _asking(
    job: EvalJob, opened: OpenedTarget, batch_size: int, reporter: Reporter
) -> Callable[[str], TaskScore]:
    """Give what scores a language model as it then is, given a title."""

    def score(title: str) -> TaskScore:
        with reporter.progress(f"{title}: {job.name}", job.num_rows) as advance:
            asked = Asked(batch_size, lambda done, total: advance(done), reporter.warn, title=title)
            with generation_memory_errors():
                return job.run(opened.model, opened.tokenizer, asked)

    return score


def _without_factors(files: AdapterFiles) -> AdapterFiles:
    """Give the adapter with every psi at zero: what it trained whole is all that it changes."""
    factors = {group: (phi, torch.zeros_like(psi)) for group, (phi, psi) in files.factors.items()}
    return AdapterFiles(files.manifest, factors, files.saved_modules)


def _compare(element: Element, found: TaskScore, whole: TaskScore) -> dict[str, Any]:
    before = [sample["correct"] for sample in whole.samples]
    after = [sample["correct"] for sample in found.samples]
    lost, gained = _count(before, after), _count(after, before)
    row = result_dict(found)
    kept = {key: row[key] for key in ("score", "num_correct", "n", "n_invalid", "ci95")}
    return {
        "part": element.text,
        **kept,
        "change": (found.score or 0.0) - (whole.score or 0.0),
        "lost": lost,
        "gained": gained,
        "p_value": mcnemar_exact(lost, gained),
    }


def _count(one: Sequence[bool], two: Sequence[bool]) -> int:
    return sum(a and not b for a, b in zip(one, two, strict=True))
