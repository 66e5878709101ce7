"""`wegeft preview`: show training rows as the model reads them."""

from __future__ import annotations

from typing import Annotated

import typer

from wegeft_cli.cli.arguments import JsonOption, OverridesArgument, RecipeArgument
from wegeft_cli.cli.console import RichReporter, print_json


def preview(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[
        int,
        typer.Option("--rows", metavar="N", min=0, help="First rows to show per source or class."),
    ] = 2,
    row: Annotated[
        int | None,
        typer.Option(
            "--row",
            metavar="INDEX",
            min=0,
            help="Show only this row of the training set, counted from 0 over all sources.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows as the model reads them, and statistics of all rows, without weights."""
    from wegeft_cli.planning.preview import preview as run

    result = run(recipe, overrides or [], num_rows=rows, row=row, reporter=RichReporter())
    if as_json:
        print_json(result.to_json())
        return
    from wegeft_cli.cli.preview_page import print_preview

    print_preview(result)
