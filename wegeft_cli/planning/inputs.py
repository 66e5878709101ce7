"""The files and Hub names that a recipe refers to, and whether they are on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wegeft_cli.data.sources.paths import find_local
from wegeft_cli.evaluation.benchmarks.groups import OWN_DATA, expand_groups
from wegeft_cli.evaluation.benchmarks.registry import find_folder
from wegeft_cli.recipe.catalog import find_recipe
from wegeft_cli.recipe.parameter_budget import BUDGET_KEY, read_budget
from wegeft_cli.recipe.schema import Recipe

_HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")
_HUB = "not found here; it would be taken from the hub, which is not asked"
_LATER = "not found here; it must be there when it is used"


@dataclass(frozen=True)
class Input:
    """Something that the recipe names and a run would read."""

    key: str
    path: str
    found: bool
    """Whether it is on this machine."""
    note: str
    """What it is, or what is missing; never a fault of the recipe."""

    @property
    def may_be_on_hub(self) -> bool:
        """Whether it is missing here and may be an id on the hub."""
        return self.note == _HUB


def list_inputs(recipe: Recipe, recipe_dir: Path) -> Iterator[Input]:
    """Yield the model, the start adapter, a counted recipe, and every data source and test set."""
    yield _find_model(recipe.model.name_or_path)
    start = recipe.adapter.init_from
    if start is not None:
        place = find_local(start, recipe_dir)
        note = _LATER if place is None else f"at {place}"
        yield Input("adapter.init_from", start, place is not None, note)
    counted = read_budget(recipe.adapter.match_params).params
    if isinstance(counted, str):
        file = find_local(counted, recipe_dir) or find_recipe(counted)
        note = _LATER if file is None else f"at {file}"
        yield Input(BUDGET_KEY, counted, file is not None, note)
    for part in ("train", "validation", "test"):
        for position, source in enumerate(getattr(recipe.data, part)):
            key = f"data.{part}[{position}].path"
            local = find_local(source.path, recipe_dir)
            if local is None:
                yield Input(key, source.path, False, _explain_missing(source.path))
            else:
                yield Input(key, source.path, True, f"at {local}")
    for name in dict.fromkeys([*recipe.eval.tasks, *recipe.train.eval_tasks]):
        if name.startswith(OWN_DATA):
            file = Path(name.removeprefix(OWN_DATA)).expanduser()
            yield Input(
                "eval.tasks", name, file.exists(), f"at {file}" if file.exists() else _LATER
            )
    if recipe.eval.data_dir is not None:
        for name in expand_groups(recipe.eval.tasks):
            place_in = find_folder(name)
            if place_in is None:
                continue
            folder = Path(recipe.eval.data_dir).expanduser() / place_in
            found = folder.is_dir()
            note = f"at {folder}" if found else _LATER
            yield Input("eval.data_dir", str(folder), found, note)


def _find_model(name_or_path: str) -> Input:
    key, path = "model.name_or_path", Path(name_or_path).expanduser()
    if path.is_file():
        return Input(key, name_or_path, True, "a file")
    if (path / "config.json").is_file():
        return Input(key, name_or_path, True, "a model folder")
    if path.is_dir():
        return Input(key, name_or_path, False, "a folder without config.json")
    return Input(key, name_or_path, False, _explain_missing(name_or_path))


def _explain_missing(path: str) -> str:
    is_hub_id = _HUB_ID.fullmatch(path) is not None and not Path(path).suffix.startswith(".json")
    return _HUB if is_hub_id else _LATER
