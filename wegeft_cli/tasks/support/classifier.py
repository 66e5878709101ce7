"""What a classifier needs beside a model: its processor, its collator, its scores."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wegeft_cli.data.text.tokenizer import copy_backend
from wegeft_cli.errors import BaseModelError, UserError
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.models.image_processor import ImageTransform
from wegeft_cli.models.loading import load_tokenizer_of
from wegeft_cli.models.module_names import unwrap
from wegeft_cli.recipe.schema import ModelSection, Recipe
from wegeft_cli.tasks.support.classification_metrics import (
    count_confusion,
    describe_per_class,
    measure_classes,
    measure_regression,
)
from wegeft_cli.training.classification_loss import ClassifierOutputs, ClassLoss

_SHORT = 16
"""Tokens of a row that no model is too deep for."""


def load_padding_tokenizer(section: ModelSection) -> Any:
    """Load a base's tokenizer; one without a padding token pads with its end of text.

    Raises:
        UserError: If there is none, or it has nothing to pad with.
    """
    tokenizer = load_tokenizer_of(section)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise BaseModelError(
                "the tokenizer has neither a padding token nor an end of text, and rows of unequal "
                "length need one",
                hint="set pad_token in the folder's tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def digest_tokenizer(tokenizer: Any) -> str | None:
    """Return a hash of a fast tokenizer's content; None of a slow one."""
    if not tokenizer.is_fast:
        return None
    return hashlib.sha256(copy_backend(tokenizer).to_str().encode()).hexdigest()


def build_transform(recipe: Recipe, processor: Any, config: Any) -> ImageTransform:
    """Build the transform of a recipe's images.

    Raises:
        UserError: If mean and channels do not agree.
    """
    num_channels = getattr(config, "num_channels", 3)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    if len(mean) != num_channels or num_channels not in (1, 3):
        raise BaseModelError(
            f"the base's images have {num_channels} channels, and its image processor knows the "
            f"mean of {len(mean)}",
            hint="fix preprocessor_config.json",
        )
    own: Any = getattr(config, "image_size", 224)
    own = own[0] if isinstance(own, list | tuple) else own
    size = int(recipe.data.image_size or _read_size(processor) or own)
    return ImageTransform(size, recipe.data.image_transform, mean, std)


def _read_size(processor: Any) -> int | None:
    """The edge of the square that a processor cuts or makes, if it is one."""
    for name in ("crop_size", "size"):
        size = getattr(processor, name, None)
        height = size.get("height") if isinstance(size, dict) else getattr(size, "height", None)
        if height:
            return int(height)
    patches = getattr(processor, "max_num_patches", None)  # SigLIP 2: images of any shape
    return math.isqrt(patches) * int(processor.patch_size) if patches else None


@dataclass(frozen=True)
class ClassScore:
    """What a classifier's answers came to.

    Args:
        metrics: Figures by name.
        per_class: As `describe_per_class`; empty of a regression.
        num_correct: Rows answered rightly; None of a regression.
        n: Rows.
        predicted: Each row's answer as a class number, or a number, by row.
        confidence: Each row's probability of its answer, by row; empty of a regression.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    num_correct: int | None
    n: int
    predicted: dict[int, float]
    confidence: dict[int, float]


def score_answers(answers: ClassifierOutputs, head: HeadSpec) -> ClassScore:
    """Score what a model answered."""
    logits = torch.stack(answers.logits)
    if not head.labels:
        numbers = logits.squeeze(-1).tolist()
        metrics = measure_regression(numbers, answers.labels)
        predicted = dict(zip(answers.rows, numbers, strict=True))
        return ClassScore(metrics, [], None, len(numbers), predicted, {})
    chosen = logits.argmax(-1).tolist()
    labels = [int(label) for label in answers.labels]
    counts = count_confusion(chosen, labels, len(head.labels))
    best = logits.softmax(-1).amax(-1).tolist()
    return ClassScore(
        metrics=measure_classes(chosen, labels, len(head.labels)),
        per_class=describe_per_class(counts, head.labels),
        num_correct=int(counts.trace()),
        n=len(labels),
        predicted=dict(zip(answers.rows, map(float, chosen), strict=True)),
        confidence=dict(zip(answers.rows, best, strict=True)),
    )


def gather_metrics(
    loss: ClassLoss, head: HeadSpec, gather: Callable[[Any], list[Any]]
) -> dict[str, float]:
    """Return `eval_<metric>` of a validation over all processes; empty without validation rows.

    `loss` holds this process's answers; `gather` returns the values of all processes.
    """
    shares = gather(loss.pop_outputs())
    everything = ClassifierOutputs(
        [row for share in shares for row in share.rows],
        [each for share in shares for each in share.logits],
        [label for share in shares for label in share.labels],
    )
    if not everything.rows:
        return {}
    metrics = score_answers(everything, head).metrics
    return {f"eval_{name}": value for name, value in metrics.items()}


def check_shortest(model: nn.Module, length: int, place: str) -> None:
    """Check that a text classifier can read its shortest row, without weights.

    Funnel halves a row several times and fails where nothing is left.

    Args:
        model: The model, which may be on the meta device.
        length: Tokens of the row.
        place: Where the row is, for the message.

    Raises:
        UserError: If the model fails on it and not on a longer one.
    """
    if length >= _SHORT or not (reason := _fails_on(model, length)):
        return
    if _fails_on(model, _SHORT):
        return  # it does not run without weights
    least = next(n for n in range(length + 1, _SHORT + 1) if not _fails_on(model, n))
    raise UserError(
        f"a row of {length} tokens is too short for {type(unwrap(model)).__name__}, which reads "
        f"{least} or more ({reason:.80})",
        key=place,
        hint=f"remove rows of fewer than {least} tokens, or take another model",
    )


def _fails_on(model: nn.Module, length: int) -> str:
    """Return the error of a forward pass over a row of some length; empty if there is none."""
    ids = torch.zeros((1, length), dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # any error of a model's code
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""


def choose_metric(recipe: Recipe | None, head: HeadSpec) -> str:
    """Give the name of the figure that is the score."""
    name = "auto" if recipe is None else recipe.eval.metric
    if name != "auto":
        return name
    return "accuracy" if head.labels else "pearson"


def check_metrics(recipe: Recipe, head: HeadSpec) -> None:
    """Refuse a watched or chosen metric that these classes do not have.

    Raises:
        UserError: If F1 of one class is asked for, and there are not two.
    """
    for key, name in (
        ("eval.metric", recipe.eval.metric),
        ("train.metric_for_best_model", recipe.train.metric_for_best_model.removeprefix("eval_")),
    ):
        if name == "f1" and len(head.labels) != 2:
            raise UserError(
                f"f1 is that of the second of two classes, and there are {len(head.labels)}",
                key=key,
                hint="use f1_macro",
            )
