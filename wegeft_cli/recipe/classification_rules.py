"""Rules of the tasks: keys that a task does not read, and what classification needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import (
    CLASS_METRICS,
    METRICS,
    REGRESSION_METRICS,
    DataSection,
    EvalSection,
    LoggingSection,
    Recipe,
    TrainSection,
)

_CAUSAL, _IMAGE = "causal_lm", "image_classification"
_LANGUAGE_ONLY = (
    "data.template", "data.loss_on", "data.packing", "data.streaming", "data.cache_dir",
    "train.eval_tasks", "train.use_liger_kernel", "logging.sample_prompts", "eval.tasks",
    "eval.max_new_tokens", "eval.protocol", "model.load_in_4bit", "model.load_in_8bit",
    "train.strategy", "train.compile",
)  # fmt: skip
_CLASSES_ONLY = ("data.test", "data.problem_type", "eval.metric")
_IMAGES_ONLY = ("data.image_size", "data.image_transform", "model.drop_path_rate")
_NOT_FOR_IMAGES = ("train.neftune_noise_alpha", "train.group_by_length", "data.max_length")


def validation_metrics(recipe: Recipe) -> tuple[str, ...]:
    """Name the figures that a recipe's classifier is measured by; none for a language model.

    Args:
        recipe: The typed recipe.

    Returns:
        Names as in `eval.metric`; in a validation they are `eval_<name>`.
    """
    if recipe.task == _CAUSAL:
        return ()
    return REGRESSION_METRICS if recipe.data.problem_type == "regression" else CLASS_METRICS


def check_recipe(recipe: Recipe) -> Iterator[Fault]:
    """Check what only some tasks read, and what classification needs.

    Args:
        recipe: The typed recipe.

    Yields:
        Each rule that is broken.
    """
    if recipe.task == _CAUSAL:
        yield from _refuse(recipe, (*_CLASSES_ONLY, *_IMAGES_ONLY))
    elif recipe.task == _IMAGE:
        yield from _refuse(recipe, (*_LANGUAGE_ONLY, *_NOT_FOR_IMAGES))
        if recipe.data.problem_type == "regression":
            message = (
                "'regression' is for sequence_classification; `task` is 'image_classification'"
            )
            yield "data.problem_type", message, "use `single_label_classification`"
    else:
        yield from _refuse(recipe, (*_LANGUAGE_ONLY, *_IMAGES_ONLY))
    if recipe.task != _IMAGE:
        for key, source in _list_sources(recipe):
            if source.image_dir is not None:
                yield (
                    f"{key}.image_dir",
                    f"{source.image_dir!r} is of no use to {recipe.task}",
                    ("remove it"),
                )
    if recipe.task != _CAUSAL:
        for key, source in _list_sources(recipe):
            if source.format != "auto":
                message = f"{source.format!r} is a form of language rows; `task` is {recipe.task!r}"
                yield f"{key}.format", message, "leave it out, and name columns in `columns`"
            if source.weight is not None:
                message = f"mixtures are for causal_lm; `task` is {recipe.task!r}"
                yield f"{key}.weight", message, "remove it"
        metric, known = recipe.eval.metric, validation_metrics(recipe)
        if metric in METRICS and metric not in known:
            message = f"{metric!r} does not measure a {recipe.data.problem_type}"
            yield "eval.metric", message, f"use one of {', '.join(known)}"


def _list_sources(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for part in ("train", "validation", "test"):
        for position, source in enumerate(getattr(recipe.data, part)):
            yield f"data.{part}[{position}]", source


def _refuse(recipe: Recipe, keys: tuple[str, ...]) -> Iterator[Fault]:
    defaults: dict[str, Any] = {
        "data": DataSection(),
        "train": TrainSection(),
        "eval": EvalSection(),
        "logging": LoggingSection(),
        "model": type(recipe.model)(),
    }
    for key in keys:
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        if value != getattr(defaults[section], name):
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            what = "" if isinstance(value, list | dict) else f"{shown:.60} "
            message = f"{what}is not read by `task` {recipe.task!r}"
            yield key, message, "remove it"
