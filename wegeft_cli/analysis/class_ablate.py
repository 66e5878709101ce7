"""A classifier as an ablation asks it: one split, scored as often as parts are switched off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from wegeft_cli.analysis.adapter_parts import Element
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.classification import (
    PROTOCOL,
    Asking,
    check_splits,
    read_splits,
    tell_result,
    tell_samples,
)
from wegeft_cli.evaluation.score import TaskScore
from wegeft_cli.inference.loaded_classifier import find_classifier, load_classifier
from wegeft_cli.models.heads import find_head_modules
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter
from wegeft_cli.tasks.classification import check_metrics


def open_split(
    adapter_dir: Path,
    recipe: Recipe | None,
    *,
    split: str | None,
    data_dir: Path | None,
    limit: int | None,
    batch_size: int | None,
    base: str | None,
    reporter: Reporter,
) -> tuple[nn.Module, Callable[[str], TaskScore]]:
    """Load a classifier and the split that it is to be scored on.

    Args:
        adapter_dir: The adapter's folder.
        recipe: The run's recipe, where it belongs to a run.
        split: test or validation; None takes the first that there is.
        data_dir: Folder that holds them; None takes the recipe's.
        limit: Only the first so many rows.
        batch_size: Rows at a time.
        base: The base's folder or hub id, where it is not as recorded.
        reporter: Where words and progress go.

    Returns:
        The model, and what scores it as it then is, given a title.

    Raises:
        UserError: If there is no such split, or the model gives numbers, which are never right.
        ExceptionGroup: If several rows are at fault.
    """
    splits = [] if split is None else [split]
    check_splits(splits)
    found = find_classifier(adapter_dir, recipe, base=base)
    if not found.head.labels:
        raise UserError(
            "an ablation counts right answers, and this model gives numbers",
            key="--ablate",
            hint="switch a part off by `wegeft edit --drop` and score that adapter",
        )
    check_metrics(found.recipe, found.head)
    opened = load_classifier(found, base=base, warn=reporter.warn)
    ((name, (rows, digest)),) = read_splits(opened, splits, data_dir=data_dir, limit=limit).items()
    size = batch_size or found.recipe.train.per_device_eval_batch_size
    asking = Asking(size, Processes.single(), reporter)

    def score(title: str) -> TaskScore:
        answered = asking.ask(opened, rows, f"{title}: {name}")
        told = tell_result(name, rows, answered, opened, digest)
        return TaskScore(
            task=name,
            protocol=PROTOCOL,
            score=told["score"],
            num_correct=told["num_correct"],
            n=told["n"],
            n_invalid=0,
            ci95=told["ci95"],
            template_hash="",
            data_sha256=digest,
            origin=rows.origin,
            samples=tell_samples(title, name, rows, answered, opened.head),
            extra={"metric": told["metric"], "metrics": told["metrics"]},
        )

    return opened.model, score


def without_head(elements: Sequence[Element], model: nn.Module) -> list[Element]:
    """Leave a classifier's head out of the parts: without it nothing is answered.

    Args:
        elements: The adapter's parts.
        model: The classifier.

    Returns:
        The others.

    Raises:
        UserError: If there are no others.
    """
    heads = set(find_head_modules(model))
    kept = [each for each in elements if each.kind != "saved" or each.name not in heads]
    if not kept:
        raise UserError(
            "only the head was trained whole, and a classifier without it answers nothing",
            key="--ablate",
            hint="switch off a group, layer, module or direction",
        )
    return kept
