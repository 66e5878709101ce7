"""The vocabulary of arguments: one alias for each thing that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.learning_rate=2e-4."),
]
AdapterArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="ADAPTER",
        help="An adapter folder or a run folder; left out: the newest finished run under runs/.",
    ),
]
TargetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TARGET",
        help="An adapter, run or model folder, or a hub id; left out: the newest finished run.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="PATH", help="The base model, where it is not as recorded."),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", metavar="DIR", help="Folder with <set>/test.json; left out: the hub."
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Only the first so many rows of each set."),
]
