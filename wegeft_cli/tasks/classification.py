"""What a classifier needs beside a model: its processor, its collator, its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wegeft_cli.data.batches.labelled import Collator, ImageCollator, TextCollator
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import UserError
from wegeft_cli.models.heads import HeadSpec, image_options
from wegeft_cli.models.image_processor import ImageTransform
from wegeft_cli.models.loading import load_image_processor, load_tokenizer
from wegeft_cli.recipe.schema import ModelSection, Recipe
from wegeft_cli.tasks.classification_metrics import (
    count_confusion,
    describe_per_class,
    measure_classes,
    measure_regression,
)
from wegeft_cli.training.classification_loss import Answers, ClassLoss


def load_processor(section: ModelSection, task: str) -> Any:
    """Load what goes with a base: its tokenizer, or for images its image processor.

    Args:
        section: The recipe's `model`.
        task: The recipe's task.

    Returns:
        Either. A tokenizer without a padding token pads a classifier's rows with its end of text,
        as the language models' own examples do.

    Raises:
        UserError: If there is none, or a classifier's tokenizer has nothing to pad with.
    """
    load = load_image_processor if task == "image_classification" else load_tokenizer
    loaded = load(
        section.name_or_path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    if task == "sequence_classification" and loaded.pad_token_id is None:
        if loaded.eos_token is None:
            raise UserError(
                "the tokenizer has neither a padding token nor an end of text, and rows of unequal "
                "length need one",
                key="model.name_or_path",
                hint="set pad_token in the folder's tokenizer_config.json",
            )
        loaded.pad_token = loaded.eos_token
    return loaded


def build_transform(recipe: Recipe, processor: Any, config: Any) -> ImageTransform:
    """Build the transform of a recipe's images.

    Args:
        recipe: The recipe: size and kind.
        processor: The base's: mean, deviation, and the size where the recipe names none.
        config: The base's configuration: channels.

    Returns:
        The transform.

    Raises:
        UserError: If mean and channels do not agree.
    """
    num_channels = getattr(config, "num_channels", 3)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    if len(mean) != num_channels or num_channels not in (1, 3):
        raise UserError(
            f"the base's images have {num_channels} channels, and its image processor knows the "
            f"mean of {len(mean)}",
            key="model.name_or_path",
            hint="mend preprocessor_config.json",
        )
    own: Any = getattr(config, "image_size", 224)
    own = own[0] if isinstance(own, list | tuple) else own
    size = int(recipe.data.image_size or _read_size(processor) or own)
    return ImageTransform(size, recipe.data.image_transform, mean, std)


def build_collator(
    recipe: Recipe, processor: Any, config: Any, model: nn.Module | None
) -> Collator:
    """Build what makes the model's inputs.

    Args:
        recipe: The recipe.
        processor: The base's tokenizer or image processor.
        config: The base's configuration.
        model: The model; the meta device will do.

    Returns:
        The collator.
    """
    if recipe.task != "image_classification":
        return TextCollator(processor)
    transform = build_transform(recipe, processor, config)
    options = {} if model is None else image_options(model, transform.size)
    return ImageCollator(transform, options)


def _read_size(processor: Any) -> int | None:
    """The edge of the square that a processor cuts or makes, if it is one."""
    for name in ("crop_size", "size"):
        size = getattr(processor, name, None)
        height = size.get("height") if isinstance(size, dict) else getattr(size, "height", None)
        if height:
            return int(height)
    return None


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


def score_answers(answers: Answers, head: HeadSpec) -> ClassScore:
    """Score what a model answered.

    Args:
        answers: The answers.
        head: The model's head.

    Returns:
        The score.
    """
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


def gather_metrics(loss: ClassLoss, head: HeadSpec, processes: Processes) -> dict[str, float]:
    """Give a validation's metrics over all processes, after its loss was measured.

    Args:
        loss: Holds this process's answers.
        head: The model's head.
        processes: The processes of the run.

    Returns:
        `eval_<metric>` -> value; empty without validation rows.
    """
    shares = processes.gather(loss.take_answers())
    everything = Answers(
        [row for share in shares for row in share.rows],
        [each for share in shares for each in share.logits],
        [label for share in shares for label in share.labels],
    )
    if not everything.rows:
        return {}
    metrics = score_answers(everything, head).metrics
    return {f"eval_{name}": value for name, value in metrics.items()}


def choose_metric(recipe: Recipe | None, head: HeadSpec) -> str:
    """Give the name of the figure that is the score.

    Args:
        recipe: The run's recipe, if there is one.
        head: The model's head.

    Returns:
        A name of `eval.metric`.
    """
    name = "auto" if recipe is None else recipe.eval.metric
    if name != "auto":
        return name
    return "accuracy" if head.labels else "pearson"


def check_metrics(recipe: Recipe, head: HeadSpec) -> None:
    """Refuse a watched or chosen metric that these classes do not have.

    Args:
        recipe: The recipe.
        head: The model's head.

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
