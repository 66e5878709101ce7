"""Names of layers in the files of a base, which may lack or have the model's prefix."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wegeft_cli.artifacts.adapter_files import AdapterFiles


def spell_name(name: str, prefix: str) -> tuple[str, str, str]:
    """Return a module name as it is, without the model's prefix, and with it.

    Args:
        prefix: The model's `base_model_prefix`; may be empty.
    """
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"


def match_stored_names(
    modules: Mapping[str, str], stored: Collection[str], prefix: str
) -> dict[str, str]:
    """Map a model's module names to those in the base's files.

    GPT-2's files, for one, say `h.0.attn.c_attn` where the model says `transformer.h.0....`.

    Args:
        stored: Names of the base's tensors; empty where they are not known.
    """
    return {
        name: next((s for s in spell_name(name, prefix) if f"{s}.{tensor}" in stored), name)
        for name, tensor in modules.items()
    }


def name_as_in_files(files: AdapterFiles) -> AdapterFiles:
    """Return an adapter with the names of the base's files, where the adapter records them."""
    names = files.manifest.checkpoint_names
    modules = {
        names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight"): entries
        for name, entries in files.manifest.modules.items()
    }
    tensors = {names.get(name, name): tensor for name, tensor in files.saved_modules.items()}
    return replace(files, manifest=replace(files.manifest, modules=modules), saved_modules=tensors)


def has_all_tensors(files: AdapterFiles, stored: Mapping[str, object]) -> bool:
    """Return whether the base's files hold every tensor that the adapter changes, by its name."""
    changed = [*(f"{name}.weight" for name in files.manifest.modules), *files.saved_modules]
    return all(name in stored for name in changed)
