"""Load a recipe: a YAML file, the files it extends, and overrides become one typed recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.catalog import find_recipe, hint_names, list_recipes
from wegeft_cli.recipe.grid import count_runs
from wegeft_cli.recipe.importing.tools import find_tool
from wegeft_cli.recipe.keys import SWEEP, KeyPath, find_nearest, format_key, parse_key
from wegeft_cli.recipe.merged import FileValues, MergedValues, ReadErrors, describe
from wegeft_cli.recipe.parameter_budget import BUDGET_KEY
from wegeft_cli.recipe.reader import DROPPED, ValueReader
from wegeft_cli.recipe.rules import METHOD_RULES, check_recipe, load_rules
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.schema_keys import (
    explain_swept,
    find_alias,
    kind_at,
    section_kinds,
    strip_optional,
)
from wegeft_cli.recipe.warnings import list_warnings
from wegeft_cli.recipe.yaml_source import (
    Document,
    has_interpolation,
    iterate_entries,
    read_document,
)
from wegeft_cli.version import VERSION

_EXTENDS = "extends"
_LEAST_FOREIGN_KEYS = 4
_MAX_FILES = 8


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, and notes and places from reading it."""

    recipe: Recipe
    path: Path
    """The file that was read; for a shipped recipe, the shipped file."""
    notes: tuple[str, ...] = ()
    """For example "`sequence_len` is read as `data.max_length`"."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Where each key was set, by dotted key: `file:line:column`, or an override."""

    def find_place(self, key: str) -> str:
        """Return where a key or the nearest key around it was set, or the file."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return str(self.path)


@dataclass
class Settings:
    """The merged values of a recipe, and the errors and notes of reading them."""

    file: Path
    merged: MergedValues
    errors: ReadErrors

    def places(self) -> dict[str, str]:
        """Return the place of each key that was set."""
        return {format_key(path): place for path, place in self.merged.places.items()}


def load_recipe(
    path: str | Path | LoadedRecipe, overrides: Sequence[str] = (), *, need_data: bool = True
) -> LoadedRecipe:
    """Load a recipe, or raise all of its faults at once.

    Args:
        path: A YAML file, the name of a shipped recipe, or a loaded recipe without overrides,
            which is returned as it is.
        overrides: `key=value` with dotted keys (`data.train[0].limit=5`) and YAML values. They
            replace values of the file; a later override replaces an earlier one.
        need_data: Whether `data.train` is required, as for training.

    Returns:
        The typed recipe, with all defaults and every `${key}` resolved.

    Raises:
        UserError: If the recipe has one fault: file, line, column, key, message and hint.
        ExceptionGroup: If it has several; a group of `UserError`.
    """
    if isinstance(path, LoadedRecipe):
        if overrides:
            raise UserError(
                "apply to a file, and this recipe is loaded already",
                key="overrides",
                hint="load_recipe(path, overrides) applies them",
            )
        return path
    settings = read_settings(path, overrides)
    recipe = build_recipe(settings, need_data=need_data)
    raise_all(settings.errors.faults)
    notes = [*settings.errors.notes, *list_warnings(recipe)]
    if recipe.sweep:
        num_runs = count_runs(recipe.sweep)
        notes.append(f"`sweep` has {num_runs} runs for `wegeft sweep`; it is ignored here")
    return LoadedRecipe(recipe, settings.file, tuple(notes), settings.places())


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Merge a file, the files it extends and the overrides.

    A file that cannot be read raises at once, with the errors found so far.
    """
    errors = ReadErrors()
    file = _find_file(path)
    files = _read_chain(file, (), errors)
    merged = MergedValues(place=str(file))
    for values in files or ():
        merged.add_file(values)
    for override in overrides:
        _apply_override(override, merged, errors)
    if files is None:
        # A part of a recipe could break rules that the whole recipe keeps.
        raise_all(errors.faults)
    if not merged.values.get("output_dir"):
        merged.values["output_dir"] = f"runs/{file.stem}"
    return Settings(file, merged, errors)


def build_recipe(settings: Settings, *, need_data: bool = True) -> Recipe:
    """Return the typed recipe and add the faults of its rules to the errors of the settings.

    The recipe must not be used if there are errors.
    """
    merged, errors = settings.merged, settings.errors
    _drop_unread_keys(merged, errors)
    _check_rank(merged, errors)
    recipe = _to_recipe(merged, errors)
    for fault in check_recipe(recipe, where=merged.find_place, need_data=need_data):
        key = parse_key(fault.key or "")
        is_misspelled = key not in merged.places and errors.is_suggested(key)
        if not errors.has_failed(key) and not is_misspelled:
            errors.faults.append(fault)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return YAML that `load_recipe` reads as an equal recipe, with every key."""
    values = escape_interpolation(asdict(recipe))
    if recipe.adapter.match_params is not None:
        del values["adapter"]["r"]  # not chosen yet
    header = f"# Resolved by wegeft-cli {VERSION}, every key with its value; it repeats the run.\n"
    return header + OmegaConf.to_yaml(OmegaConf.create(values))


def _find_file(path: str | Path) -> Path:
    """Return the file of a path or of a shipped recipe's name."""
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
    raise UserError(message, file=str(path), hint=_hint_files(file) or hint_names(str(path)))


def _hint_files(missing: Path) -> str | None:
    """Return a hint with the YAML files near a missing one."""
    if missing.suffix not in (".yaml", ".yml") or not missing.parent.is_dir():
        return None
    near = sorted(file for file in missing.parent.glob("[!.]*.y*ml") if file.is_file())
    files = {file.stem: f"{file}" for file in near}
    shipped = {recipe.name: recipe.name for recipe in list_recipes()}
    best = find_nearest(missing.stem, [*files, *shipped])
    if best is not None:
        return f"did you mean `{(shipped | files)[best]}`?"
    listed = ", ".join(file.name for file in near[:_MAX_FILES])
    found = f"YAML files in {missing.parent.resolve()}: {listed or 'none'}"
    return f"{found}; `wegeft recipes copy quickstart {missing}` writes one to edit"


def _read_chain(
    file: Path, children: tuple[Path, ...], errors: ReadErrors
) -> list[FileValues] | None:
    """Read a file and those it extends, the base first; None if one of them is unreadable."""
    document = _read_file(file, errors.faults)
    if document is None:
        return None
    parents: list[FileValues] | None = []
    extends = _take_extends(document, errors)
    if extends is not None:
        name, place = extends
        parents = _read_parent(name, place, file, children, errors)
    values = ValueReader(document, errors).read_file()
    tool = find_tool(document.values, least=_LEAST_FOREIGN_KEYS)
    if tool is not None and errors.faults:
        hint = f"`wegeft recipes import {file} --output NEW.yaml` converts it"
        errors.faults.append(
            UserError(f"this is a recipe of {tool.title}", file=str(file), hint=hint)
        )
    return None if parents is None else [*parents, values]


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


def _take_extends(document: Document, errors: ReadErrors) -> tuple[str, str] | None:
    """Remove `extends` from a document and return its name and place, or None."""
    for key, value in iterate_entries(document.node):
        if key.value != _EXTENDS:
            continue
        document.node.value[:] = [entry for entry in document.node.value if entry[0] is not key]
        name, place = document.values.pop(_EXTENDS), document.place(key)
        if isinstance(name, str) and name:
            return name, place
        if id(value) not in document.failed_nodes:
            message = f"expected the name or path of a recipe, got {describe(name)}"
            errors.add((_EXTENDS,), message, place)
    return None


def _read_parent(
    name: str, place: str, child: Path, children: tuple[Path, ...], errors: ReadErrors
) -> list[FileValues] | None:
    file = child.parent / Path(name).expanduser()
    if not file.is_file():
        shipped = find_recipe(name)
        if shipped is None:
            message = f"no file {str(file)!r}, and no shipped recipe called {name!r}"
            errors.add((_EXTENDS,), message, place, hint_names(name))
            return None
        file = shipped
    family = (*children, child)
    if file.resolve() in [member.resolve() for member in family]:
        message = " extends ".join(str(member) for member in (*family, file))
        errors.add((_EXTENDS,), f"is circular: {message}", place, "remove one of them")
        return None
    return _read_chain(file, family, errors)


def _drop_unread_keys(merged: MergedValues, errors: ReadErrors) -> None:
    """Let an override or a sweep of `adapter.type` turn a recipe into its own baseline.

    Keys of the file that the new method does not read are dropped, with a note. Keys that an
    override sets stay, and so do those of a file that itself sets the method: the rules check them.
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
        errors.notes.append(f"`{key}` is ignored: {kind!r} does not read it")


def _check_rank(merged: MergedValues, errors: ReadErrors) -> None:
    """Add an error if one file, or the overrides, choose the rank in two ways."""
    adapter = merged.values.get("adapter")
    if not isinstance(adapter, dict) or adapter.get("match_params") is None or "r" not in adapter:
        return
    message = f"chooses the rank, and contradicts `adapter.r` {adapter['r']}"
    place = merged.find_place(BUDGET_KEY)
    errors.add(parse_key(BUDGET_KEY), message, place, "keep one of the two")


def _to_recipe(merged: MergedValues, errors: ReadErrors) -> Recipe:
    """Resolve `${key}` and turn nested values into the typed recipe."""
    schema = OmegaConf.structured(Recipe)
    invalid = [(path, _pop_value(merged.values, path)) for path in _find_invalid(merged.values)]
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
            errors.add(path, f"{written!r} cannot be resolved: {_first_line(error)}", place)
            unresolved.append(path)
    for path in reversed(unresolved):  # from the end, so that list positions stay valid
        _pop_value(merged.values, path)
    if unresolved:
        config = OmegaConf.merge(schema, merged.values)
    recipe = OmegaConf.to_object(config)
    assert isinstance(recipe, Recipe)
    # OmegaConf would stop at the first invalid choice: put them back for the rules to find all.
    for path, value in invalid:
        object.__setattr__(_get_value(recipe, path[:-1]), str(path[-1]), value)
    return recipe


def _find_invalid(values: dict[str, Any]) -> list[KeyPath]:
    """Return the keys whose value is none of the key's choices."""
    return [
        path
        for path, value in _walk({key: each for key, each in values.items() if key != SWEEP}, ())
        if get_origin(kind := strip_optional(kind_at(path))[0]) is Literal
        and value not in get_args(kind)
        and not has_interpolation(value)
    ]


def _find_interpolated(values: Any, path: KeyPath) -> Iterator[KeyPath]:
    return (here for here, value in _walk(values, path) if has_interpolation(value))


def _walk(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yield each value that is neither a map nor a list, with its key."""
    if not isinstance(value, (dict, list)):
        yield path, value
        return
    for part, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _walk(item, (*path, part))


def _get_value(values: Any, path: KeyPath) -> Any:
    for part in path:
        is_item = isinstance(values, (dict, list))
        values = values[part] if is_item else getattr(values, str(part))
    return values


def _pop_value(values: Any, path: KeyPath) -> Any:
    return _get_value(values, path[:-1]).pop(path[-1])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _apply_override(text: str, merged: MergedValues, errors: ReadErrors) -> None:
    """Merge one `key=value`, whose value is YAML; errors name the override."""
    label = f"override `{text}`"
    key, equals, value = text.partition("=")
    try:
        path = parse_key(key.strip()) if equals else ()
    except ValueError:
        path = ()
    if not path:
        hint = "write key=value, e.g. train.learning_rate=2e-4"
        errors.faults.append(UserError("is not key=value", file=label, hint=hint))
        return
    if path[0] == "extends":
        message = "only a file can set what a recipe extends"
        errors.add(path, message, label, "use that recipe instead, or write a file")
        return
    document = read_document(f"- {value}", label, errors.faults, at=path)
    if document is None or len(document.values) != 1:
        if document is not None:
            errors.add(path, "has more than one value", label, "write a list as [a, b]")
        errors.failed_keys.add(path)
        return
    right = find_alias(path)
    if right is not None:
        errors.notes.append(f"`{format_key(path)}` is read as `{format_key(right)}`")
        path = right
    item, node = document.values[0], document.node.value[0]
    known = [stop for stop in range(1, len(path) + 1) if kind_at(path[:stop]) is None]
    reader = ValueReader(document, errors)
    if known:
        _add_unknown_override(path[: known[0]], path[known[0] :], item, label, reader)
        return
    read = reader.read_value(kind_at(path), item, node, path, label)
    settings = [] if read is DROPPED else [(path, read)]
    settings.extend(reader.take_aliases())
    for target, setting in settings:
        merged.add_setting(target, setting, label, errors)
        merged.chosen.add(target)
    for target in (path, *reader.places):
        merged.set_place(target, label)


def _add_unknown_override(
    path: KeyPath, rest: KeyPath, value: Any, label: str, reader: ValueReader
) -> None:
    """Record that the schema does not have an override's key, which `rest` continues."""
    if path[0] == SWEEP and len(path) == 2:
        message, hint = explain_swept(str(path[1]))
        reader.errors.add(path, message, label, hint)
        return
    kind, _ = strip_optional(kind_at(path[:-1]) if path[:-1] else Recipe)
    around = format_key(path[:-1])
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(path[-1], str):
        reader.add_unknown(path, value, label, tuple(section_kinds(kind)))
    elif isinstance(path[-1], int):
        reader.errors.add(path, f"`{around}` is not a list", label, "remove the brackets")
    elif get_origin(kind) is list:
        message = f"`{around}` is a list: an entry is needed"
        last = str(path[-1])
        inside = (int(last), *rest) if last.isdecimal() else (0, last, *rest)
        reader.errors.add(path, message, label, f"write `{format_key((*path[:-1], *inside))}`")
    else:
        reader.errors.add(path, f"`{around}` has no keys", label, f"write {around}=value")


def escape_interpolation(value: Any) -> Any:
    """Escape `${` in literal texts, as OmegaConf reads them."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, dict):
        return {key: escape_interpolation(item) for key, item in value.items()}
    return [escape_interpolation(item) for item in value] if isinstance(value, list) else value
