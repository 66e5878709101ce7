"""The tasks, found by folder: a module of this package that defines `TASK` adds one."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import wegeft_cli.tasks as folder
from wegeft_cli.errors import UserError
from wegeft_cli.methods.registry import find_method
from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import AdapterSection, Recipe
from wegeft_cli.tasks.base import Task, refuse_keys

if TYPE_CHECKING:
    from torch import nn

    from wegeft_cli.models.heads import HeadSpec

_PACKAGE = folder.__name__
_WITHOUT_HEAD = "causal_lm"  # the task of a model that records none


@cache
def _load(name: str) -> Task | None:
    """Return the task that a module of the folder defines, if it defines one."""
    task: Task | None = getattr(importlib.import_module(f"{_PACKAGE}.{name}"), "TASK", None)
    if task is not None:
        task.name = name
    return task


def _module_names() -> list[str]:
    return [found.name for found in pkgutil.iter_modules(folder.__path__) if not found.ispkg]


def all_tasks() -> dict[str, Task]:
    """Return every task by its name, sorted."""
    found = {name: _load(name) for name in _module_names()}
    return {name: task for name, task in found.items() if task is not None}


def task_names() -> tuple[str, ...]:
    """Return the names that a recipe's `task` may have."""
    return tuple(all_tasks())


def find_task(name: str) -> Task:
    """Return the task of a name, as in a recipe's `task` or in `head.json`.

    Raises:
        UserError: If there is no such task.
    """
    task = _load(name) if name in _module_names() else None
    if task is None:
        hint = f"use one of {', '.join(task_names())}"
        raise UserError(f"there is no task {name!r}", key="task", hint=hint)
    return task


def task_of_config(config: Any) -> Task:
    """Return the task that a saved model's configuration is for, by its architecture.

    An architecture of no other task counts as a causal language model.
    """
    names = " ".join(getattr(config, "architectures", None) or ())
    for task in all_tasks().values():
        if task.has_head and task.auto_class.removeprefix("AutoModel") in names:
            return task
    return task_of_head(None)


def task_of_head(head: HeadSpec | None) -> Task:
    """Return the task that a model's head is of; a model without a new head generates text."""
    if head is not None:
        return find_task(head.task)
    return find_task(_WITHOUT_HEAD)


def adapter_section(recipe: Recipe, model: nn.Module) -> tuple[AdapterSection, list[str]]:
    """Return the recipe's `adapter` for a model, and notes on names that are read as others.

    It holds the model's present module names, and the new head among the modules to save.
    """
    from wegeft_cli.models.file_names import with_current_names

    section, notes = with_current_names(recipe.adapter, model)
    return find_task(recipe.task).adapter_section(section, model), notes


def inject_adapter(
    model: nn.Module, recipe: Recipe, section: AdapterSection | None = None
) -> nn.Module:
    """Prepare a base for training by the recipe's method, the task's new head included.

    `section` replaces the recipe's `adapter`. It names the model's modules.
    """
    from wegeft_cli.models.running_statistics import align_gradients, hold_statistics

    task = find_task(recipe.task)
    if section is None:
        section, _ = adapter_section(recipe, model)
    method = find_method(section.type)
    model = method.inject(model, section, task_type=task.peft_task_type, seed=recipe.seed)
    hold_statistics(model)
    align_gradients(model)
    return model


def check_recipe(recipe: Recipe) -> Iterator[Fault]:
    """Yield each rule of the recipe's task that the recipe breaks."""
    tasks = all_tasks()
    if recipe.task in tasks:
        yield from tasks[recipe.task].check(recipe)
        return
    ignored = Counter(key for task in tasks.values() for key in task.ignored_keys)
    yield from refuse_keys(recipe, tuple(key for key, count in ignored.items() if count > 1))


def validation_metrics(recipe: Recipe) -> tuple[str, ...]:
    """Return the metrics of a validation beside its loss, as named in `eval.metric`."""
    is_known = recipe.task in task_names()
    return find_task(recipe.task).validation_metrics(recipe) if is_known else ()
