"""Rules about what is measured while training: validation, what is best, trackers and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from wegeft_cli.recipe.classifying import list_metrics
from wegeft_cli.recipe.keys import find_nearest
from wegeft_cli.recipe.schema import Recipe

Fault: TypeAlias = tuple[str, str, str | None]
"""Key, message, hint."""

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""What `logging.report_to` may name."""

_LOSS = "eval_loss"


def check_measuring(recipe: Recipe) -> Iterator[Fault]:
    """Check what a run measures, and what it watches of that.

    Args:
        recipe: The typed recipe.

    Yields:
        Each rule that is broken.
    """
    yield from _check_validation(recipe)
    yield from _check_watched(recipe)
    yield from _check_logging(recipe)


def _check_validation(recipe: Recipe) -> Iterator[Fault]:
    train = recipe.train
    measures = _has_rows(recipe) or train.eval_tasks or recipe.logging.sample_prompts
    if train.eval_steps > 0 and not measures:
        message = f"{train.eval_steps} asks for a validation loss, and there are no validation data"
        hint = "set `data.validation` or `data.validation_fraction`, or name `train.eval_tasks`"
        yield "train.eval_steps", message, hint
    for position, name in enumerate(train.eval_tasks):
        if name in train.eval_tasks[:position]:
            yield f"train.eval_tasks[{position}]", f"names {name!r} a second time", "remove it"


def _check_watched(recipe: Recipe) -> Iterator[Fault]:
    train = recipe.train
    metric, key = train.metric_for_best_model, "train.metric_for_best_model"
    metrics = [_LOSS] * _has_rows(recipe) + [f"eval_{name}" for name in train.eval_tasks]
    if _has_rows(recipe):
        metrics += [f"eval_{name}" for name in list_metrics(recipe)]
    hint = "set `data.validation` or `data.validation_fraction`"
    # What the sets of `train.eval_tasks` are called, and which a group has, is known elsewhere.
    if metric != _LOSS and metric not in metrics and not train.eval_tasks:
        # All begin with eval_: what follows tells them apart.
        words = {name.removeprefix("eval_"): name for name in metrics}
        near = words.get(find_nearest(metric.removeprefix("eval_"), list(words)) or "")
        yield (
            key,
            f"{metric!r} is not measured: there is {' and '.join(metrics) or 'nothing'}",
            f"did you mean `{near}`?"
            if near
            else f"name its task in `train.eval_tasks`, or {hint}",
        )
    watching = {
        "train.early_stopping_patience": train.early_stopping_patience is not None,
        "train.load_best_model_at_end": train.load_best_model_at_end,
    }
    for name, is_set in watching.items():
        if is_set and metric == _LOSS and metric not in metrics:
            other = f", or set `{key}: {metrics[0]}`" if metrics else ""
            yield name, "needs validation, and there are no validation data", hint + other
        elif is_set and train.eval_steps == 0:
            message = "needs validation while training, and `train.eval_steps` is 0"
            yield name, message, "set `train.eval_steps`, e.g. 0.1 for ten times"


def _check_logging(recipe: Recipe) -> Iterator[Fault]:
    key, value = "logging.report_to", recipe.logging.report_to
    known = f"none, or a name or a list of names out of {', '.join(TRACKERS)}"
    if not isinstance(value, str | list):
        yield key, f"must be {known}; got {value!r}", None
        return
    names = [value] if isinstance(value, str) else value
    allowed = TRACKERS if isinstance(value, list) and len(value) > 1 else ("none", *TRACKERS)
    for name in names:
        if name not in allowed:
            near = find_nearest(str(name), allowed)
            yield key, f"must be {known}; got {name!r}", f"did you mean `{near}`?" if near else None
    for position, prompt in enumerate(recipe.logging.sample_prompts):
        if not prompt.strip():
            yield f"logging.sample_prompts[{position}]", "is empty", "write a prompt, or remove it"


def _has_rows(recipe: Recipe) -> bool:
    return bool(recipe.data.validation) or recipe.data.validation_fraction > 0
