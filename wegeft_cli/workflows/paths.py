"""The recipe that a run keeps: one that leads to the same files from anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from wegeft_cli.data.sources import find_local
from wegeft_cli.data.templates import is_template_file
from wegeft_cli.recipe.load import LoadedRecipe
from wegeft_cli.recipe.schema import DataSource, Recipe


def keep_recipe(loaded: LoadedRecipe) -> Recipe:
    """Give the recipe of one run as its folder keeps it.

    Args:
        loaded: The recipe and where it was read.

    Returns:
        It, with every path that is on this machine written out from the root (the folder
        `data.cache_dir` is made where it is not), and without the `sweep`, of which one run knows
        nothing.
    """
    recipe, beside = loaded.recipe, loaded.path.parent
    model, adapter, data, measured = recipe.model, recipe.adapter, recipe.data, recipe.eval

    def found(sources: list[DataSource]) -> list[DataSource]:
        return [replace(source, path=_write_out(source.path, beside)) for source in sources]

    template = data.template
    return replace(
        recipe,
        model=replace(model, name_or_path=_write_out(model.name_or_path)),
        adapter=replace(
            adapter, init_from=adapter.init_from and _write_out(adapter.init_from, beside)
        ),
        data=replace(
            data,
            train=found(data.train),
            validation=found(data.validation),
            template=_write_out(template, beside) if is_template_file(template) else template,
            cache_dir=data.cache_dir and _absolute(Path(data.cache_dir).expanduser()),
        ),
        eval=replace(measured, data_dir=measured.data_dir and _write_out(measured.data_dir)),
        sweep={},
    )


def _write_out(path: str, beside: Path | None = None) -> str:
    """Write out a path that is found; else it may be a hub's name, and stays."""
    place = find_local(path, beside)
    return path if place is None else _absolute(place)


def _absolute(place: Path) -> str:
    """Give a path from the root; a link in its last place stays one, whose name tells the kind."""
    return str(place.parent.resolve() / place.name)
