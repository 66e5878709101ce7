"""`wegeft edit`: remove or scale parts of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wegeft_cli.cli.arguments import AdapterArgument, JsonOption
from wegeft_cli.cli.console import print_json, show
from wegeft_cli.errors import UserError


def edit(
    adapter: AdapterArgument = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            "--drop",
            metavar="PART",
            help="Remove a part: group:NAME, layer:N, layer:N-M, module:FULL_NAME, "
            "direction:GROUP:N or saved:FULL_NAME. Repeatable.",
        ),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(
            "--scale",
            metavar="PART=FACTOR",
            help="Multiply the scale of a part, such as layer:3=0.5. Repeatable.",
        ),
    ] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="Write the original that an edited adapter holds.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Output folder. Default: ADAPTER-edited or ADAPTER-restored.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter with parts removed or scaled. The original is kept in it."""
    factors = dict(_read_factor(text) for text in scale or [])
    from wegeft_cli.analysis.edit import edit as run

    result = run(adapter, drop=drop or [], scale=factors, restore=restore, output=output)
    if as_json:
        print_json(result.to_json())
        return
    done = "restored" if restore else "edited"
    show(
        f"[green]{done}[/]: {result.num_modules} modules in {result.num_groups} groups, "
        f"{result.trainable_parameters:,} parameters"
    )
    show(f"adapter: {result.output_dir}", highlight=False, soft_wrap=True, markup=False)


def _read_factor(text: str) -> tuple[str, float]:
    part, _, factor = text.rpartition("=")
    try:
        if part:
            return part, float(factor)
    except ValueError:
        pass
    raise UserError(
        f"got {text!r}", key="--scale", hint="write PART=FACTOR, such as group:q_proj=0.5"
    )
