"""`wegeft recipes`: list, show and copy the shipped recipes; import other tools' recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wegeft_cli.cli.arguments import JsonOption
from wegeft_cli.cli.completion import complete_recipe
from wegeft_cli.cli.console import get_console, note, print_json, show, warn
from wegeft_cli.cli.lazy import Command, Group

if TYPE_CHECKING:
    from wegeft_cli.recipe.importing.importer import ImportedRecipe

recipes_app = typer.Typer(
    cls=Group,
    help="List, show and copy the shipped recipes, import others, print the JSON Schema.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Name of a shipped recipe.", autocompletion=complete_recipe
    ),
]


@recipes_app.command("list", cls=Command)
def list_all(as_json: JsonOption = False) -> None:
    """List the shipped recipes with their titles."""
    from rich.table import Table
    from rich.text import Text

    from wegeft_cli.recipe.catalog import list_recipes

    recipes = list_recipes()
    if as_json:
        found = [{"name": r.name, "title": r.title, "path": str(r.path)} for r in recipes]
        print_json({"recipes": found})
        return
    width = max((len(recipe.name) for recipe in recipes), default=0)
    if not get_console().is_terminal:  # one line each, for grep
        for recipe in recipes:
            show(Text(f"{recipe.name:<{width}}  {recipe.title}"), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    for recipe in recipes:
        table.add_row(Text(recipe.name, "bold", no_wrap=True), Text(recipe.title))
    show(table)


@recipes_app.command("show", cls=Command)
def show_recipe(name: NameArgument) -> None:
    """Print a recipe with its header."""
    from wegeft_cli.recipe.catalog import read_recipe_text

    show(read_recipe_text(name), end="", markup=False, highlight=False, soft_wrap=True)


@recipes_app.command("copy", cls=Command)
def copy(
    name: NameArgument,
    destination: Annotated[
        str | None,  # a Path would lose the slash of a folder
        typer.Argument(metavar="DESTINATION", help="File or folder. Default: the working folder."),
    ] = None,
) -> None:
    """Copy a recipe to edit it. An existing file is not overwritten."""
    from wegeft_cli.recipe.catalog import copy_recipe

    written = copy_recipe(name, destination or ".")
    show(str(written), markup=False, highlight=False, soft_wrap=True)


@recipes_app.command("schema", cls=Command)
def print_schema(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the schema to this file, which must not exist. Default: print it.",
        ),
    ] = None,
) -> None:
    """Print the JSON Schema of a recipe, by which editors complete and check its keys."""
    import json

    from wegeft_cli.recipe.catalog import write_new_file
    from wegeft_cli.recipe.json_schema import build_schema

    text = json.dumps(build_schema(), indent=1, ensure_ascii=False) + "\n"
    if output is None:
        show(text, end="", markup=False, highlight=False, soft_wrap=True)
        return
    write_new_file(output, text)
    show(f"schema: {output}", highlight=False, soft_wrap=True, markup=False)


@recipes_app.command("import", cls=Command)
def import_recipe(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Recipe of axolotl, LLaMA-Factory, TRL (`trl sft`) or torchtune, or PEFT's "
            "adapter_config.json.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the new recipe to this file, which must not exist. Default: print it.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert another tool's recipe, and list what differs or has no counterpart."""
    from wegeft_cli.recipe.catalog import write_new_file
    from wegeft_cli.recipe.importing.importer import import_recipe as run

    result = run(file)
    if output is not None:
        write_new_file(output, result.text)
    if as_json:
        print_json(result.to_json())
        return
    _report_import(result)
    if output is None:
        show(result.text, end="", markup=False, highlight=False, soft_wrap=True)
    else:
        show(f"recipe: {output}", highlight=False, soft_wrap=True, markup=False)
        if not result.missing:
            show(f"next: wegeft validate {output}", style="dim", highlight=False, soft_wrap=True)


def _report_import(result: ImportedRecipe) -> None:
    """Print the result of an import to standard error."""
    note(
        f"{result.tool}: {result.num_keys} keys read, {len(result.converted)} keys written, "
        f"{len(result.differs)} differ, {len(result.dropped)} have no counterpart, "
        f"{len(result.unneeded)} are not needed"
    )
    for remark in result.differs:
        note(f"differs: {remark}")
    for remark in result.dropped:
        warn(f"no counterpart: {remark}")
    for remark in result.missing:
        warn(f"set before training: {remark}")
