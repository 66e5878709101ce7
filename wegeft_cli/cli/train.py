"""`wegeft train`: a recipe becomes an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from wegeft_cli.cli.console import RichReporter, console, print_json
from wegeft_cli.cli.options import JsonOption, OverridesArgument, RecipeArgument
from wegeft_cli.errors import EXIT_INTERRUPTED


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|PATH",
            help="Go on from the newest whole checkpoint of the run, or from one checkpoint.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and stop before the weights.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the recipe's adapter and write it to its output folder."""
    from wegeft_cli.workflows.stop import StopRequest

    with StopRequest() as should_stop:
        from wegeft_cli.workflows.train import train as run

        result = run(
            recipe,
            overrides or [],
            resume=resume,
            dry_run=dry_run,
            should_stop=should_stop,
            reporter=RichReporter(),
        )
    if as_json:
        print_json(result.to_json())
    elif result.status == "checked":
        console.print(
            f"[green]ready[/]: {result.num_steps} steps, "
            f"{result.trainable_parameters:,} trainable parameters"
        )
    elif result.status == "finished":
        console.print(
            f"[green]finished[/]: {result.num_steps} steps, final loss {result.final_loss:.4f}, "
            f"{result.trainable_parameters:,} trainable parameters"
        )
        console.print(f"adapter: {result.adapter_dir}", highlight=False, soft_wrap=True)
        console.print("next: wegeft merge, wegeft eval --task NAME", style="dim", highlight=False)
    if result.status == "interrupted":
        if not as_json:
            console.print(
                f"[yellow]interrupted[/] at step {result.num_steps}, saved; "
                "go on with --resume auto"
            )
        raise typer.Exit(EXIT_INTERRUPTED)
