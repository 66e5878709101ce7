"""`wegeft compare`: a paired test of two results on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wegeft_cli.cli.arguments import JsonOption
from wegeft_cli.cli.console import print_json
from wegeft_cli.cli.tables import print_comparison


def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A.json", help="Result file of `wegeft eval --output`.")
    ],
    b: Annotated[
        Path, typer.Argument(metavar="B.json", help="Another result file on the same rows.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Compare two results row by row with McNemar's exact paired test."""
    from wegeft_cli.evaluation.compare import compare as workflow

    result = workflow(a, b)
    if as_json:
        print_json(result)
    else:
        print_comparison(result)
