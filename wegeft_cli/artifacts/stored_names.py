"""Names of layers in the files of a base, which may lack or have the model's prefix."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wegeft_cli.artifacts.adapter_files import AdapterFiles
    from wegeft_cli.artifacts.manifest import AdapterManifest

# A stacked weight is made of the matrices of one or two projections, such as gate and up.
_MOST_PIECES = 3


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
        names.get(name, name)
        if entries[0].experts
        else names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight"): entries
        for name, entries in files.manifest.modules.items()
    }
    tensors = {names.get(name, name): tensor for name, tensor in files.saved_modules.items()}
    return replace(files, manifest=replace(files.manifest, modules=modules), saved_modules=tensors)


def has_all_tensors(files: AdapterFiles, stored: Mapping[str, object]) -> bool:
    """Return whether the base's files hold every tensor that the adapter changes, by its name."""
    layers = (tensors_of_layer(files.manifest, name, stored) for name in files.manifest.modules)
    changed = [*chain.from_iterable(layers), *files.saved_modules]
    return all(name in stored for name in changed)


def tensors_of_layer(
    manifest: AdapterManifest, name: str, stored: Collection[str]
) -> tuple[str, ...]:
    """Return the tensors of the base's files that hold an adapted layer's weight.

    The files of many bases hold each expert's matrices as tensors of their own.
    """
    experts = manifest.modules[name][0].experts
    if not experts:
        return (f"{name}.weight",)
    if name in stored:
        return (name,)
    firsts = [manifest.checkpoint_names.get(piece_key(name, i)) for i in range(_MOST_PIECES)]
    return tuple(
        _with_expert(first, number)
        for first in firsts
        if first is not None
        for number in range(experts)
    ) or (name,)


def describe_pieces(name: str, pieces: Collection[str]) -> dict[str, str]:
    """Record the tensors of which the files make a stacked weight: those of its first expert."""
    firsts = [piece for piece in pieces if _with_expert(piece, 0) == piece]
    return {piece_key(name, i): first for i, first in enumerate(sorted(firsts))}


def piece_key(name: str, place: int) -> str:
    """Return the key of a record of a stacked weight's pieces."""
    return f"{name}.{place}"


def _with_expert(name: str, number: int) -> str:
    """Replace the last number in a tensor's name, which counts the experts."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part.isdigit()]
    if places:
        parts[places[-1]] = str(number)
    return ".".join(parts)
