"""Scores of a classifier and of its base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.adapter import read_provenance
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation.benchmarks.base import Benchmark, EvaluationRequest
from wegeft_cli.evaluation.benchmarks.classification import (
    PROTOCOL,
    SPLITS,
    check_splits,
    samples_error,
    split_names,
)
from wegeft_cli.evaluation.benchmarks.registry import load_benchmarks
from wegeft_cli.evaluation.runner import Evaluation, EvaluationCall, EvaluationRunner
from wegeft_cli.inference.loaded_model import LoadedModel, ModelTarget
from wegeft_cli.models.heads import read_labels
from wegeft_cli.models.loading import load_base_config
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.tasks.support.classifier import check_metrics


def evaluate_classifier(
    path: str | Path, recipe: Recipe | None, request: EvaluationRequest, call: EvaluationCall
) -> Evaluation:
    """Score a classifier on the splits that the call names, and its base if the call asks for it.

    Raises:
        UserError: If there is no such split, or it contains a class that the model does not know.
        ExceptionGroup: If several rows are at fault.
    """
    check_splits(call.names)
    target = ModelTarget.resolve(path, recipe, base=call.base)
    head, known = target.classifier()
    check_metrics(known, head)
    base = _find_base(target) if call.compare_base else None
    opened = target.load(call.reporter.warn)
    runner = EvaluationRunner(
        load_splits(opened, call.names, request),
        batch_size_of(opened, request),
        call.processes,
        call.reporter,
    )
    base_scores = None if base is None else runner.score(base.load(), "base")
    return Evaluation((), runner.score(opened, "target"), base_scores=base_scores)


def load_splits(
    opened: LoadedModel, names: Sequence[str], request: EvaluationRequest
) -> list[Benchmark]:
    """Load the splits of a classifier; without names the first that exists."""
    request = replace(request, classifier=opened)
    return load_benchmarks(split_names(names, request), request)


def batch_size_of(opened: LoadedModel, request: EvaluationRequest) -> int:
    """Return the batch size of the request, else that of the recipe's validations."""
    return request.batch_size or opened.classifier()[1].train.per_device_eval_batch_size


def _find_base(target: ModelTarget) -> ModelTarget:
    """Find the base before anything is loaded; its own head must have the same classes."""
    section, (head, recipe) = target.section, target.classifier()
    if target.adapter is None:
        base = target.base or read_provenance(Path(target.path))
        if base is None:
            raise UserError(
                "the base of this model is not recorded",
                key="--base",
                hint="name it with --base",
            )
        section = replace(section, name_or_path=base, revision=None)
    config = load_base_config(section)
    if not head.labels or set(read_labels(config)) != set(head.labels):
        raise UserError(
            f"the base {section.name_or_path!r} has no head for these classes: there is nothing to "
            "compare with",
            key="--compare-base",
            hint="train a linear probe of it instead: adapter.type=linear_probe",
        )
    head = replace(head, labels=read_labels(config), keeps_base_head=True)
    return ModelTarget(section.name_or_path, section, None, head, recipe)


def refuse_samples(samples: Path, names: Sequence[str]) -> None:
    """Raise UserError if a samples file or the benchmarks are a classifier's."""
    if _is_of_classifier(samples) or (names and set(names) <= set(SPLITS)):
        raise samples_error()


def _is_of_classifier(samples: Path) -> bool:
    try:
        with samples.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
    except (OSError, ValueError, RecursionError):
        return False  # the reader of the file reports it
    return isinstance(first, dict) and first.get("protocol") == PROTOCOL


def refuse_foreign(foreign: Mapping[str, Any]) -> None:
    """Raise UserError for each option that has no meaning for a classifier."""
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
