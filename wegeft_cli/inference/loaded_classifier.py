"""A classifier from its run, its adapter or its model folder, with what tells how it is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import UserError
from wegeft_cli.methods.registry import put_adapter
from wegeft_cli.methods.wegeft.save_load import tell_base
from wegeft_cli.models.heads import HeadSpec, read_labels
from wegeft_cli.models.loading import load_config, load_model
from wegeft_cli.recipe.schema import DataSection, ModelSection, ProblemType, Recipe, TaskName
from wegeft_cli.tasks.base import Task
from wegeft_cli.tasks.registry import find_task, task_of_config, task_of_head


@dataclass(frozen=True)
class FoundClassifier:
    """What is known of a classifier before it is loaded.

    Args:
        adapter: Its adapter; None for a model.
        head: What it tells apart.
        recipe: The run's recipe, or one that holds what is known without it; its `model` is what
            will be loaded: the adapter's base, or the model.
    """

    adapter: Adapter | None
    head: HeadSpec
    recipe: Recipe

    @property
    def adapter_dir(self) -> Path | None:
        """The adapter's folder; None for a model."""
        return None if self.adapter is None else self.adapter.folder


@dataclass(frozen=True)
class OpenedClassifier:
    """A classifier to ask.

    Args:
        model: In evaluation mode, on the CPU.
        processor: Its tokenizer or image processor.
        head: What it tells apart.
        recipe: The run's recipe, or one that holds what is known without it.
    """

    model: nn.Module
    processor: Any
    head: HeadSpec
    recipe: Recipe


def task_of_path(path: str | Path, recipe: Recipe | None) -> Task:
    """Return the task of an adapter, run or model folder, or of a hub id.

    `recipe` is the run's, where the path belongs to one. A path that cannot be read counts as a
    language model, whose loading reports the fault.
    """
    if recipe is not None:
        return find_task(recipe.task)
    folder = Path(path)
    with contextlib.suppress(UserError):
        if (folder / "config.json").is_file():
            return task_of_config(load_config(str(folder)))
        if folder.is_dir():
            head = Adapter.open(folder).head
            return task_of_head(None) if head is None else find_task(head["task"])
    return task_of_head(None)


def find_classifier(
    path: str | Path, recipe: Recipe | None, *, base: str | None = None
) -> FoundClassifier:
    """Find out what a classifier is, without loading it.

    Args:
        path: An adapter, run or model folder.
        recipe: The run's recipe, where it belongs to a run.
        base: The base's folder or hub id, where it is not as recorded.

    Returns:
        What is known of it.

    Raises:
        UserError: If it is none of these, or is damaged.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        config = load_config(str(folder))
        head = _head_of_config(config, task_of_config(config).name)
        known = recipe or _recipe_of_head(head, {})
        section = replace(known.model, name_or_path=str(folder), revision=None)
        return FoundClassifier(None, head, replace(known, model=section))
    adapter = Adapter.open(folder)
    head, values = read_head_spec(adapter)
    known = recipe or _recipe_of_head(head, values)
    section = replace(
        known.model,
        name_or_path=base or adapter.base,
        revision=None if base else adapter.revision,
    )
    return FoundClassifier(adapter, head, replace(known, model=section))


def load_classifier(
    found: FoundClassifier,
    *,
    base: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> OpenedClassifier:
    """Load a classifier.

    Args:
        found: What it is.
        base: The base as the user named it, for the message where it is another one.
        warn: Told where nothing can tell whether the base is the adapter's.

    Returns:
        The classifier.

    Raises:
        UserError: If it is damaged, or its base is another one.
    """
    head, section = found.head, found.recipe.model
    task = find_task(head.task)
    if found.adapter is None:
        model = _load(section, head)
        processor = task.load_processor(section)
        task.prepare_base(model, head, processor)
        return OpenedClassifier(model, processor, head, found.recipe)
    with tell_base(base, found.adapter.folder):
        model = _load(section, head)
        processor = task.load_processor(section)
    task.prepare_base(model, head, processor)
    model = put_adapter(model, found.adapter, section, warn=warn)
    return OpenedClassifier(model.eval(), processor, head, found.recipe)


def read_head_spec(adapter: Adapter) -> tuple[HeadSpec, dict[str, Any]]:
    """Return a classifier's head, and all that its `head.json` holds."""
    values = adapter.head
    if values is None:
        raise UserError(
            "this adapter has no head.json, which lists a classifier's classes",
            file=str(adapter.folder),
            hint="copy the adapter's folder as a whole",
        )
    labels = tuple(str(name) for name in values["labels"])
    return HeadSpec(values["task"], labels, values["problem_type"]), values


def _load(section: ModelSection, head: HeadSpec) -> nn.Module:
    return load_model(
        section.name_or_path,
        revision=section.revision,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        head=head,
    )


def _head_of_config(config: Any, task: str) -> HeadSpec:
    problem = getattr(config, "problem_type", None) or "single_label_classification"
    labels = () if problem == "regression" else read_labels(config)
    return HeadSpec(task, labels, problem, keeps_base_head=True)


def _recipe_of_head(head: HeadSpec, values: dict[str, Any]) -> Recipe:
    """Give a recipe that holds what is known of an adapter or model outside of its run."""
    data = DataSection(
        problem_type=cast(ProblemType, head.problem_type),
        image_size=values.get("image_size"),
        image_transform=values.get("image_transform", DataSection.image_transform),
        max_length=values.get("max_length", DataSection.max_length),
    )
    return Recipe(task=cast(TaskName, head.task), data=data)
