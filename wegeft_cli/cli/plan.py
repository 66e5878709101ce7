"""`wegeft plan`: what a recipe will cost, before any weight is read."""

from __future__ import annotations

from wegeft_cli.cli.console import RichReporter, print_json, show
from wegeft_cli.cli.options import JsonOption, OverridesArgument, RecipeArgument


def plan(
    recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False
) -> None:
    """Count parameters, steps and memory; a folder that holds only config.json will do."""
    from rich.box import SIMPLE
    from rich.table import Table

    from wegeft_cli.workflows.plan import plan as run

    result = run(recipe, overrides or [], reporter=RichReporter())
    if as_json:
        print_json(result.to_json())
        return
    groups = Table("trainable group", "layers", "width", "parameters", box=SIMPLE)
    for column in groups.columns[1:]:
        column.justify = "right"
    for group in result.groups:
        width = "" if group.width is None else f"{group.width:,}"
        groups.add_row(group.name, f"{group.num_layers}", width, f"{group.num_parameters:,}")
    show(groups)
    show(
        f"{result.trainable_parameters:,} of {result.base_parameters:,} parameters "
        f"({result.trainable_parameters / result.base_parameters:.3%})"
    )
    if result.num_steps is not None:
        rows = "" if result.num_rows is None else f" over {result.num_rows:,} rows"
        show(f"{result.num_steps:,} optimizer steps{rows}")
    memory = Table("memory on each device, estimated", "GiB", box=SIMPLE)
    memory.columns[1].justify = "right"
    for name, gib in result.memory_gib.items():
        if name == "total":
            memory.add_section()
        memory.add_row(name.replace("_", " "), f"{gib:.2f}")
    show(memory)
    for reason in result.unknown:
        show(f"unknown: {reason}", style="dim", highlight=False, soft_wrap=True)
