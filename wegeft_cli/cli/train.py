"""`wegeft train`: a recipe becomes an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from wegeft_cli.cli.console import RichReporter, note, print_json, show
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

    def tell_stop() -> None:
        note("stopping: the step under way is finished and saved (Ctrl-C again leaves at once)")

    with StopRequest(tell_stop) as should_stop:
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
        show(
            f"[green]ready[/]: {result.num_steps} steps, "
            f"{result.trainable_parameters:,} trainable parameters"
        )
    elif result.status == "finished":
        show(
            f"[green]finished[/]: {result.num_steps} steps, final loss {result.final_loss:.4f}, "
            f"{result.trainable_parameters:,} trainable parameters"
        )
        show(f"adapter: {result.adapter_dir}", highlight=False, soft_wrap=True)
        show("next: wegeft merge, wegeft eval --task NAME", style="dim", highlight=False)
    if result.status == "interrupted":
        if not as_json:
            show(
                f"[yellow]interrupted[/] at step {result.num_steps}, saved; "
                "go on with --resume auto"
            )
        raise typer.Exit(EXIT_INTERRUPTED)
