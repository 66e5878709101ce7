"""The named parts of an adapter: groups, layers, modules, directions, saved modules."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import torch

from wegeft_cli.analysis.weight_changes import find_layer
from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.manifest import ModuleEntry
from wegeft_cli.errors import UserError

KINDS = ("group", "layer", "module", "direction", "saved")
_FORMS = "group:NAME, layer:N, layer:N-M, module:FULL_NAME, direction:GROUP:N or saved:FULL_NAME"


@dataclass(frozen=True)
class Element:
    """A named part of an adapter.

    Args:
        kind: group, layer, module, direction or saved.
        name: The group, or the full module name; empty for a layer.
        number: The first layer, or the direction: a column of phi and its row of psi, from 0.
        last: The last layer.
    """

    kind: str
    name: str = ""
    number: int = 0
    last: int = 0

    @property
    def text(self) -> str:
        """The part as the user types it."""
        if self.kind == "layer":
            span = f"-{self.last}" if self.last != self.number else ""
            return f"layer:{self.number}{span}"
        if self.kind == "direction":
            return f"direction:{self.name}:{self.number}"
        return f"{self.kind}:{self.name}"

    def covers(self, module: str, entry: ModuleEntry) -> bool:
        """Return whether the part includes a whole module; a direction never does."""
        if self.kind == "group":
            return entry.group == self.name
        if self.kind == "module":
            return module == self.name
        layer = find_layer(module)
        return self.kind == "layer" and layer is not None and self.number <= layer <= self.last


def find_element(text: str, files: AdapterFiles) -> Element:
    """Parse a part's name; raise UserError if the adapter has no such part."""
    kind, _, name = text.partition(":")
    manifest = files.manifest
    if kind == "layer" and (found := re.fullmatch(r"(\d+)(?:-(\d+))?", name)):
        first = int(found[1])
        element = Element("layer", number=first, last=int(found[2] or first))
        layers = list_layers(files)
        if not any(element.number <= layer <= element.last for layer in layers):
            told = f"{layers[0]} to {layers[-1]}" if layers else "none"
            raise UserError(f"the adapter has the layers {told}", key=text)
        return element
    if kind == "direction" and (found := re.fullmatch(r"([A-Za-z0-9_-]+):(\d+)", name)):
        _check_name(found[1], list(files.factors), "group", text)
        number = int(found[2])
        if number >= manifest.r:
            raise UserError(f"its directions are 0 to {manifest.r - 1}", key=text)
        return Element("direction", found[1], number)
    known = {
        "group": list(files.factors),
        "module": list(manifest.modules),
        "saved": list(manifest.modules_to_save),
    }
    if kind not in known or not name:
        raise UserError("is no name of a part", key=text, hint=_FORMS)
    _check_name(name, known[kind], kind, text)
    return Element(kind, name)


def list_elements(files: AdapterFiles, kind: str, limit: int | None = None) -> list[Element]:
    """List an adapter's parts of one kind in the adapter's order.

    Directions are sorted by `||phi[:, i]|| ||psi[i]||`, and `limit` keeps the largest ones.
    """
    if kind == "layer":
        return [Element("layer", number=layer, last=layer) for layer in list_layers(files)]
    if kind == "direction":
        sized = [
            (float(size), Element("direction", group, number))
            for group, (phi, psi) in files.factors.items()
            for number, size in enumerate(
                torch.linalg.vector_norm(phi, dim=0) * torch.linalg.vector_norm(psi, dim=1)
            )
        ]
        sized.sort(key=lambda each: -each[0])
        return [element for _, element in sized[:limit]]
    names = {
        "group": list(files.factors),
        "module": list(files.manifest.modules),
        "saved": list(files.manifest.modules_to_save),
    }[kind]
    return [Element(kind, name) for name in names]


def list_layers(files: AdapterFiles) -> list[int]:
    """List the numbers of the layers that an adapter changes, ascending."""
    found = (find_layer(name) for name in files.manifest.modules)
    return sorted({layer for layer in found if layer is not None})


def _check_name(name: str, known: list[str], kind: str, text: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known[:8]) or 'none'}"
    raise UserError(f"the adapter has no {kind} {name!r}", key=text, hint=hint)
