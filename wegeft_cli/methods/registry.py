"""Moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from wegeft_cli.artifacts.adapter import read_adapter_type
from wegeft_cli.artifacts.in_place_files import INPLACE_TYPE, load_inplace_files
from wegeft_cli.artifacts.manifest import PEFT_TYPE
from wegeft_cli.errors import UserError
from wegeft_cli.methods.in_place import put_parameters, select_parameters, unfreeze
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import check_base, load_adapter
from wegeft_cli.models.heads import (
    with_head,
)
from wegeft_cli.models.loading import find_base_folder
from wegeft_cli.recipe.schema import ModelSection, Recipe
from wegeft_cli.recipe.values import INPLACE_TYPES

TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "image_classification": None,
}
"""PEFT's names of the tasks; it has none for images."""


def inject_adapter(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Put what learns into the base: generators, or a baseline's; a classifier's head with it."""
    section = with_head(recipe.adapter, model, recipe.task)
    if section.type in INPLACE_TYPES:
        chosen = select_parameters(model, section.type, section.modules_to_save)
        unfreeze(model, [name for names in chosen.values() for name in names])
        return model
    if section.type == "wegeft":
        inject_generators(
            model,
            rank=section.r,
            alpha=section.alpha,
            target_modules=section.target_modules,
            share=section.share,  # type: ignore[arg-type]
            groups=section.groups,
            side=section.side,  # type: ignore[arg-type]
            init=section.init,  # type: ignore[arg-type]
            dropout=section.dropout,
            view=section.view,  # type: ignore[arg-type]
            modules_to_save=section.modules_to_save,
            seed=recipe.seed,
        )
        return model
    from wegeft_cli.methods.peft import inject_peft

    return inject_peft(
        model,
        section.type,
        rank=section.r,
        alpha=section.alpha,
        target_modules=section.target_modules,
        options=section.peft,
        modules_to_save=section.modules_to_save,
        task_type=TASK_TYPES[recipe.task],
    )


def put_adapter(
    model: nn.Module,
    adapter_dir: Path,
    section: ModelSection,
    *,
    warn: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """Put an adapter of any kind onto its base.

    Args:
        model: The base, with a classifier's head where the adapter has one.
        adapter_dir: The adapter's folder.
        section: Where the base came from.
        warn: Told where nothing can tell whether the base is the adapter's.

    Returns:
        The model: the same one, or PEFT's around it.

    Raises:
        UserError: If the adapter is damaged, or belongs to another base.
    """
    kind, *_ = read_adapter_type(adapter_dir)
    base_dir = find_base_folder(section.name_or_path, section.revision)
    if kind == PEFT_TYPE:
        load_adapter(model, adapter_dir, base_dir=base_dir, warn=warn)
        return model
    if kind == INPLACE_TYPE:
        manifest, tensors = load_inplace_files(adapter_dir)
        if base_dir is not None:
            check_base(manifest, base_dir, adapter_dir, warn=warn)
        try:
            put_parameters(model, tensors)
        except UserError as fault:
            fault.file = str(adapter_dir)
            raise
        return model
    from wegeft_cli.methods.peft import load_peft

    return load_peft(model, adapter_dir)
