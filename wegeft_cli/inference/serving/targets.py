"""The models that a server offers, by name, resolved before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import find_recipe_of
from wegeft_cli.errors import UserError
from wegeft_cli.inference.form_choice import choose_form
from wegeft_cli.inference.loaded_model import ModelTarget, find_target
from wegeft_cli.inference.prompt_format import PromptForm
from wegeft_cli.models.base_folder import find_base_folder
from wegeft_cli.models.loading import name_quantization

BASE = "base"
"""The name of the adapters' base."""
_PARTS = ("adapter", "merged")
"""Folders of a run that a server names after the run."""


@dataclass(frozen=True)
class NamedTarget:
    """A model, and the name by which a client asks for it."""

    name: str
    target: ModelTarget

    def choose_form(self, tokenizer: Any) -> PromptForm:
        """Return the prompt form that `wegeft generate` uses."""
        return choose_form(None, self.target.path, self.target.recipe, tokenizer)


def read_targets(
    target: str | Path | None, adapters: Sequence[str], base: str | None
) -> list[NamedTarget]:
    """Resolve what a server is to offer: one model, or adapters of one base.

    Args:
        target: An adapter, run or model folder, or a hub id. Default: the newest finished run,
            unless there are adapters.
        adapters: `NAME=PATH` each.
        base: The base's folder or hub id, if it is not where the adapters record it.

    Raises:
        UserError: If a path or a name is at fault, or the bases differ.
    """
    named: list[tuple[str, str | Path]] = []
    if target is not None or not adapters:
        path = find_target(target)
        named.append((_name_of(path), path))
    named += [_split(text) for text in adapters]
    names = [name for name, _ in named]
    for name in names:
        if name == BASE or names.count(name) > 1:
            raise UserError(
                f"the name {name!r} is used twice" if name != BASE else "`base` names the base",
                key="--adapter",
                hint="give each adapter a name of its own: --adapter NAME=PATH",
            )
    found = [
        NamedTarget(name, ModelTarget.resolve(path, find_recipe_of(path), base=base).require_text())
        for name, path in named
    ]
    if len(found) > 1:
        for one in found:
            _check_shared(found[0].target, one.target)
    return found


def _split(text: str) -> tuple[str, str | Path]:
    name, sign, path = text.partition("=")
    if not (name.strip() and sign and path):
        raise UserError(
            f"{text!r} is not NAME=PATH", key="--adapter", hint="such as --adapter math=runs/math"
        )
    return name.strip(), find_target(path)


def _name_of(path: str | Path) -> str:
    folder = Path(path)
    if not folder.exists():
        return str(path)  # a hub id
    folder = folder.resolve()
    return folder.parent.name if folder.name in _PARTS else folder.name


def _check_shared(first: ModelTarget, other: ModelTarget) -> None:
    """Refuse a second model, or an adapter of another base."""
    for one in (first, other):
        if one.adapter is None:
            raise UserError(
                "this is a model, and several names need adapters of one base",
                file=str(one.path),
                key="--adapter",
                hint="serve it alone; --base names the adapters' base",
            )
    if _base_of(first) != _base_of(other):
        raise UserError(
            f"its base is {other.section.name_or_path}, and the first adapter's is "
            f"{first.section.name_or_path}: the adapters of one server share a base",
            file=str(other.path),
            key="--adapter",
            hint="start a second server with another --port",
        )


def _base_of(target: ModelTarget) -> tuple[str, str | None]:
    section = target.section
    folder = find_base_folder(section.name_or_path, section.revision)
    name = section.name_or_path if folder is None else str(folder.resolve())
    return name, name_quantization(section)
