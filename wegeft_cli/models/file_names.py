"""Names of tensors in a base's files, which stay when transformers renames a model's modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from wegeft_cli.models.module_names import ends_with, unwrap
from wegeft_cli.recipe.schema import AdapterSection

_WEIGHT = ".weight"
# What transformers does to matrices of the files that it puts together unchanged.
_STACKING = frozenset({"MergeModulelist", "Concatenate"})


class FileNames:
    """The way between a model's tensors and those of its base's files, by transformers' renaming.

    A tensor that transformers makes of several tensors of the files, or splits, has no name there.

    Args:
        model: A model of transformers, on any device. Another module's tensors are not renamed.
    """

    def __init__(self, model: nn.Module) -> None:
        base = unwrap(model)
        self._own = dict.fromkeys(base.state_dict(), True)
        self._modules = [name for name, _ in base.named_modules() if name]
        self._prefix: str = getattr(base, "base_model_prefix", "")
        self._renamings, self._converters = _list_transforms(base)

    def to_model(self, name: str) -> str | None:
        """Return the model's name of a tensor of the files; None if there is no such tensor."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._own
        )
        return renamed if pattern is None and renamed in self._own else None

    def module_of(self, name: str) -> str | None:
        """Return the model's name of a layer of the files; None if there is no such layer."""
        found = self.to_model(name + _WEIGHT)
        return None if found is None else found.removesuffix(_WEIGHT)

    @cached_property
    def layers(self) -> dict[str, str]:
        """Each renamed layer of the model -> its name in the files."""
        from transformers.core_model_loading import rename_source_key

        # A transform in reverse knows nothing of a prefix, which the files may have or lack.
        steps = [step.reverse_transform() for step in reversed(self._renamings) if _is_plain(step)]
        converters = [step.reverse_transform() for step in self._converters]
        found: dict[str, str] = {}
        for name in self._modules:
            if name + _WEIGHT in self._own:
                # In reverse the converters come first.
                file_name, pattern = rename_source_key(name + _WEIGHT, [], converters)
                file_name, _ = rename_source_key(file_name, steps, [])
                if pattern is None and file_name != name + _WEIGHT:
                    found[name] = file_name.removesuffix(_WEIGHT)
        return found

    def find_pieces(self, stored: Iterable[str]) -> dict[str, list[str]]:
        """Map the model's tensors to those of the files that transformers stacks into each.

        Matrices of one kind follow each other by their numbers, and kinds in the order of their
        rows: gate of experts 0, 1, ..., then up. A tensor that is made in another way, such as by
        transposing, has no pieces.
        """
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        places = {
            pattern: place
            for step in self._converters
            if {type(each).__name__ for each in step.operations} <= _STACKING
            for place, pattern in enumerate(step.source_patterns)
        }
        pieces: dict[str, list[tuple[int, str]]] = {}
        for name in sorted(stored, key=dot_natural_key):
            renamed, pattern = rename_source_key(
                name, self._renamings, self._converters, self._prefix, self._own
            )
            if pattern in places and renamed in self._own:
                pieces.setdefault(renamed, []).append((places[pattern], name))
        return {
            renamed: [name for _, name in sorted(found, key=lambda piece: piece[0])]
            for renamed, found in pieces.items()
        }

    def match(self, stored: Iterable[str]) -> dict[str, str]:
        """Map the model's tensors to those of the files that have other names."""
        pairs = ((self.to_model(name), name) for name in stored)
        return {own: name for own, name in pairs if own is not None and own != name}


def _list_transforms(model: Any) -> tuple[list[Any], list[Any]]:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    if not isinstance(model, PreTrainedModel):
        return [], []
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    return renamings, [step for step in steps if isinstance(step, WeightConverter)]


def _is_plain(step: Any) -> bool:
    return type(step).__name__ != "PrefixChange"  # older versions have none


_KNOWN: WeakKeyDictionary[nn.Module, FileNames] = WeakKeyDictionary()


def file_names(model: nn.Module) -> FileNames:
    """Return a model's `FileNames`, which are made once."""
    if model not in _KNOWN:
        _KNOWN[model] = FileNames(model)
    return _KNOWN[model]


def with_current_names(
    section: AdapterSection, model: nn.Module
) -> tuple[AdapterSection, list[str]]:
    """Return the recipe's `adapter` with the names of the files replaced by those of the model.

    A name that matches a module of the model stays. The second value holds a note for each other
    name that matches layers of the files.
    """
    found = _CurrentNames(model)
    targets = section.target_modules
    if isinstance(targets, str):
        targets = targets if targets == "all-linear" else found.by_expression(targets)
    else:
        targets = found.by_names(targets)
    groups = section.groups
    if groups is not None:
        groups = {group: found.by_names(names) for group, names in groups.items()}
    saved = found.by_names(section.modules_to_save)
    section = replace(section, target_modules=targets, groups=groups, modules_to_save=saved)
    return section, list(found.notes)


def current_names(model: nn.Module, asked: Any) -> Any:
    """Return names or an expression of an adapter's config by the model's names."""
    found = _CurrentNames(model)
    if isinstance(asked, str):
        return asked if asked == "all-linear" else found.by_expression(asked)
    fits = isinstance(asked, list) and all(isinstance(name, str) for name in asked)
    return found.by_names(asked) if fits else asked


class _CurrentNames:
    """The names in use, and what was found under earlier ones."""

    def __init__(self, model: nn.Module) -> None:
        self.notes: dict[str, None] = {}
        self._model = model
        self._modules = [name for name, _ in model.named_modules() if name]

    def by_names(self, asked: Sequence[str]) -> list[str]:
        """Replace the last parts of earlier names, such as `query`."""
        result: list[str] = []
        for entry in asked:
            name, colon, part = entry.partition(":")
            if any(ends_with(module, name) for module in self._modules):
                result.append(entry)
                continue
            current = self._search(name, partial(ends_with, last_parts=name))
            result += [each + colon + part for each in current] or [entry]
        return list(dict.fromkeys(result))

    def by_expression(self, text: str) -> str | list[str]:
        """Replace an expression over earlier names by the layers that it matches."""
        try:
            expression = re.compile(text)
        except re.error:
            return text  # reported where targets are found
        if any(expression.fullmatch(module) for module in self._modules):
            return text
        return self._search(text, lambda file: bool(expression.fullmatch(file))) or text

    def _search(self, asked: str, matches: Callable[[str], bool]) -> list[str]:
        """Return the shortest names of the layers whose names in the files match."""
        layers = file_names(self._model).layers
        hits = {module for module, file in layers.items() if matches(file)}
        if not hits:
            return []
        names = shorten_names(hits, self._modules)
        shown = ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if names[3:] else "")
        self.notes[f"`{asked}` is read as {shown}, its name in this version of transformers"] = None
        return names


def shorten_names(wanted: Collection[str], known: Iterable[str]) -> list[str]:
    """Return ends of module names that match these modules and no others, else full names."""
    known = list(known)
    result: list[str] = []
    for name in known:
        if name not in wanted or any(ends_with(name, short) for short in result):
            continue
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        result.append(
            next(
                end for end in ends
                if all(other in wanted for other in known if ends_with(other, end))
            )
        )  # fmt: skip
    return result


def rename_tensors(
    model: nn.Module, tensors: Mapping[str, Any], known: Collection[str]
) -> dict[str, Any]:
    """Return tensors by the model's names; a name that matches neither way stays.

    `known` are the model's own names.
    """
    names = file_names(model)
    return {
        name if name in known else names.to_model(name) or name: value
        for name, value in tensors.items()
    }


def rename_layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Map tensor names below layers of the files to the model's: `...query.lora_A.weight`.

    A name that begins with no renamed layer stays.
    """
    current = {file: module for module, file in file_names(model).layers.items()}
    renamed: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        starts = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        start = next((start for start in starts if start in current), None)
        renamed[name] = name if start is None else current[start] + name.removeprefix(start)
    return renamed


def rename_checkpoint(
    model: nn.Module,
    tensors: Mapping[str, Mapping[str, Any]],
    own: Sequence[str],
    saved: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Return a checkpoint's tensors by the present names of the trained parameters.

    Args:
        model: The model with its adapter.
        tensors: File of the checkpoint -> name -> tensor.
        own: The trained parameters in the optimizer's order.
        saved: The checkpoint's parameters in that order; empty in an older one.

    Returns:
        The tensors, unchanged unless every parameter has a name of its own under an earlier one.
    """
    unchanged = {file: dict(values) for file, values in tensors.items()}
    known = set(own)
    if known == set(tensors["parameters"]):
        return unchanged
    current = {earlier: name for name in own for earlier in (*_earlier_names(model, name), name)}
    order = [current.get(name) for name in saved or tensors["parameters"]]
    if set(order) != known or (saved and order != list(own)):
        return unchanged
    return {
        file: {current.get(name, name): tensor for name, tensor in values.items()}
        for file, values in unchanged.items()
    }


def _earlier_names(model: nn.Module, name: str) -> list[str]:
    """Return what a parameter's name is with the layers' names in the files."""
    layers = file_names(model).layers
    for module, file in layers.items():
        for dot in (".", "-"):  # modules that are trained whole are keyed with dashes
            own, earlier = module.replace(".", dot), file.replace(".", dot)
            if f".{own}." in f".{name}.":
                return [name.replace(own, earlier, 1)]
    # A sharing group is called by the last part of its layers' names.
    found: list[str] = []
    for kind in name.split("."):
        files = {f.rpartition(".")[2] for m, f in layers.items() if m.rpartition(".")[2] == kind}
        if len(files) == 1:
            found.append(name.replace(f".{kind}.", f".{files.pop()}.", 1))
    return found
