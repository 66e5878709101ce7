"""A YAML file, what it extends and the overrides become one typed recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.catalog import find_recipe, hint_names
from wegeft_cli.recipe.grid import count_runs
from wegeft_cli.recipe.keys import KeyPath, format_key, parse_key
from wegeft_cli.recipe.layers import Merged, apply_override
from wegeft_cli.recipe.rules import METHOD_RULES, check_recipe, load_rules
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.typed_values import Findings, Layer, LayerReader, describe
from wegeft_cli.recipe.yaml_source import (
    Document,
    has_interpolation,
    iterate_entries,
    read_document,
)
from wegeft_cli.version import VERSION

_EXTENDS = "extends"


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and what was noticed while reading it."""

    recipe: Recipe
    path: Path
    """The file that was read; of a shipped recipe, the shipped file."""
    notes: tuple[str, ...] = ()
    """Foreign spellings that were read: "`sequence_len` is read as `data.max_length`"."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Where each key was set, by dotted key: `file:line:column`, or an override."""

    def find_place(self, key: str) -> str:
        """Tell where a key was set, or the nearest key above it, or the file."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return str(self.path)


@dataclass
class Settings:
    """All layers of a recipe, and what reading them brought to light."""

    file: Path
    merged: Merged
    findings: Findings

    def tell_places(self) -> dict[str, str]:
        """Give the place of each key that was set."""
        return {format_key(path): place for path, place in self.merged.places.items()}


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, need_data: bool = True
) -> LoadedRecipe:
    """Read a recipe, or tell everything that is wrong with it at once.

    Args:
        path: A YAML file, or the name of a shipped recipe.
        overrides: `key=value` with dotted keys (`data.train[0].limit=5`) and YAML values; they win
            over the file, the later over the earlier.
        need_data: Whether `data.train` is required, as it is for a command that trains.

    Returns:
        The typed recipe, with every default filled in and every `${key}` resolved.

    Raises:
        UserError: If one thing is wrong, with file, line, column, key and a hint.
        ExceptionGroup: Of several `UserError`.
    """
    settings = read_settings(path, overrides)
    recipe = settle(settings, need_data=need_data)
    notes = settings.findings.notes
    if recipe.sweep:
        num_runs = count_runs(recipe.sweep)
        notes.append(f"`sweep` holds {num_runs} runs for `wegeft sweep`; this is the recipe alone")
    return LoadedRecipe(recipe, settings.file, tuple(notes), settings.tell_places())


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Lay a file, what it extends and the overrides over one another.

    Args:
        path: A YAML file, or the name of a shipped recipe.
        overrides: `key=value`.

    Returns:
        The settings with the faults found so far, to be settled.

    Raises:
        UserError: If a file cannot be read; nothing can be said of the rest then.
        ExceptionGroup: If there are other faults beside it.
    """
    findings = Findings()
    file = _find_file(path)
    layers = _read_chain(file, (), findings)
    merged = Merged(place=str(file))
    for layer in layers or ():
        merged.add_layer(layer)
    for override in overrides:
        apply_override(override, merged, findings)
    if layers is None:
        # Half a recipe would break rules that the whole one keeps.
        raise_all(findings.faults)
    if not merged.values.get("output_dir"):
        merged.values["output_dir"] = f"runs/{file.stem}"
    return Settings(file, merged, findings)


def settle(settings: Settings, *, need_data: bool = True, raises: bool = True) -> Recipe:
    """Make the typed recipe of settings, and check its rules.

    Args:
        settings: What was read; takes the faults.
        need_data: Whether `data.train` is required.
        raises: Whether faults are raised; otherwise they stay in the settings' findings.

    Returns:
        The recipe; not to be used if there are faults.

    Raises:
        UserError: If one thing is wrong.
        ExceptionGroup: Of several `UserError`.
    """
    merged, findings = settings.merged, settings.findings
    _leave_out_foreign(merged, findings)
    recipe = _build_recipe(merged, findings)
    for fault in check_recipe(recipe, where=merged.find_place, need_data=need_data):
        key = parse_key(fault.key or "")
        is_misspelt = key not in merged.places and findings.is_misspelt(key)
        if not findings.is_told(key) and not is_misspelt:
            findings.faults.append(fault)
    if raises:
        raise_all(findings.faults)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe so that `load_recipe` reads an equal one.

    Args:
        recipe: Any recipe.

    Returns:
        YAML with every key, defaults too, under one line that says what it is.
    """
    values = escape_interpolation(asdict(recipe))
    header = f"# Resolved by wegeft-cli {VERSION}, every key with its value; it repeats the run.\n"
    return header + OmegaConf.to_yaml(OmegaConf.create(values))


def _find_file(path: str | Path) -> Path:
    """Find the recipe's file: as a path, else as a shipped recipe's name."""
    file = Path(path)
    if file.is_file():
        return file
    shipped = find_recipe(str(path))
    if shipped is not None:
        return shipped
    if file.is_dir():
        inner = file / "recipe.yaml"
        hint = f"did you mean {inner}?" if inner.is_file() else "name a YAML file in it"
        raise UserError("is a folder, not a recipe", file=str(path), hint=hint)
    message = "no such file, and no shipped recipe of this name"
    raise UserError(message, file=str(path), hint=hint_names(str(path)))


def _read_chain(file: Path, children: tuple[Path, ...], findings: Findings) -> list[Layer] | None:
    """Read a file and what it extends, the eldest first; None if one of them is unreadable."""
    document = _read_file(file, findings.faults)
    if document is None:
        return None
    parents: list[Layer] | None = []
    extends = _take_extends(document, findings)
    if extends is not None:
        name, place = extends
        parents = _read_parent(name, place, file, children, findings)
    layer = LayerReader(document, findings).read_file(Recipe)
    return None if parents is None else [*parents, layer]


def _read_file(file: Path, faults: list[UserError]) -> Document | None:
    label = str(file)
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start})"
        faults.append(UserError(message, file=label, hint="save it as UTF-8"))
        return None
    except OSError as error:
        faults.append(UserError(f"cannot be read: {error.strerror}", file=label))
        return None
    return read_document(text, label, faults)


def _take_extends(document: Document, findings: Findings) -> tuple[str, str] | None:
    """Take `extends` out of a file: the name in it and its place, or None."""
    for key, value in iterate_entries(document.node):
        if key.value != _EXTENDS:
            continue
        document.node.value[:] = [entry for entry in document.node.value if entry[0] is not key]
        name, place = document.values.pop(_EXTENDS), document.place(key)
        if isinstance(name, str) and name:
            return name, place
        if id(value) not in document.faulty:
            message = f"expected the name or path of a recipe, got {describe(name)}"
            findings.add((_EXTENDS,), message, place)
    return None


def _read_parent(
    name: str, place: str, child: Path, children: tuple[Path, ...], findings: Findings
) -> list[Layer] | None:
    file = child.parent / Path(name).expanduser()
    if not file.is_file():
        shipped = find_recipe(name)
        if shipped is None:
            message = f"no file {str(file)!r}, and no shipped recipe called {name!r}"
            findings.add((_EXTENDS,), message, place, hint_names(name))
            return None
        file = shipped
    family = (*children, child)
    if file.resolve() in [member.resolve() for member in family]:
        message = " extends ".join(str(member) for member in (*family, file))
        findings.add((_EXTENDS,), f"goes in a circle: {message}", place, "remove one of them")
        return None
    return _read_chain(file, family, findings)


def _leave_out_foreign(merged: Merged, findings: Findings) -> None:
    """Let an override of `adapter.type`, or a sweep of it, make a recipe its own baseline.

    What the file says for its own method alone is left out, and told; what an override says, or a
    file that names the other method itself, is for the rules to judge.
    """
    adapter = merged.values.get("adapter")
    kind = adapter.get("type") if isinstance(adapter, dict) else None
    if ("adapter", "type") not in merged.chosen or not isinstance(kind, str):
        return
    for key in load_rules(METHOD_RULES).unread_keys(kind):
        path = parse_key(key)
        section_name, _, name = key.partition(".")
        section = merged.values.get(section_name)
        if path in merged.chosen or not isinstance(section, dict) or name not in section:
            continue
        del section[name]
        merged.places.pop(path, None)
        findings.notes.append(f"`{key}` is ignored: {kind!r} does not read it")


def _build_recipe(merged: Merged, findings: Findings) -> Recipe:
    """Resolve `${key}` and turn nested settings into the typed recipe."""
    schema = OmegaConf.structured(Recipe)
    config = OmegaConf.merge(schema, merged.values)
    unresolved = []
    for path in _find_interpolated(merged.values, ()):
        node: Any = config
        try:
            for part in path:
                node = node[part]
        except OmegaConfBaseException as error:
            place = merged.find_place(format_key(path))
            written = _get_value(merged.values, path)
            findings.add(path, f"{written!r} cannot be resolved: {_first_line(error)}", place)
            unresolved.append(path)
    for path in reversed(unresolved):  # from the back, so that list positions stay true
        _get_value(merged.values, path[:-1]).pop(path[-1])
    if unresolved:
        config = OmegaConf.merge(schema, merged.values)
    recipe = OmegaConf.to_object(config)
    assert isinstance(recipe, Recipe)
    return recipe


def _find_interpolated(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    if has_interpolation(value):
        yield path
    elif isinstance(value, (dict, list)):
        for part, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _find_interpolated(item, (*path, part))


def _get_value(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def escape_interpolation(value: Any) -> Any:
    """Protect `${` in texts that are meant literally, as OmegaConf reads them back."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, dict):
        return {key: escape_interpolation(item) for key, item in value.items()}
    return [escape_interpolation(item) for item in value] if isinstance(value, list) else value
