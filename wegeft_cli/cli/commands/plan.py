"""`wegeft plan`: estimate the cost of a recipe before weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wegeft_cli.cli.arguments import JsonOption, OverridesArgument, RecipeArgument
from wegeft_cli.cli.console import RichReporter, print_json, show
from wegeft_cli.cli.start import open_recipe
from wegeft_cli.cli.tables import show_table
from wegeft_cli.storage.sizes import GIB, format_size

if TYPE_CHECKING:
    from wegeft_cli.planning.plan import Plan


def plan(
    recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False
) -> None:
    """Estimate parameters, steps and memory. A folder with only config.json is enough."""
    loaded = open_recipe("plan", recipe, overrides)
    from wegeft_cli.planning.plan import plan as run

    result = run(loaded, reporter=RichReporter())
    if as_json:
        print_json(result.to_json())
        return
    show_groups(result)
    _show_steps(result)
    _show_memory(result)
    for reason in result.unknown:
        show(f"unknown: {reason}", style="dim", highlight=False, soft_wrap=True)


def show_groups(result: Plan) -> None:
    """Print the trained parameters by group, the chosen rank and what is omitted."""
    groups = result.groups
    columns = {
        "trainable group": [group.name for group in groups],
        "layers": [f"{group.num_layers}" for group in groups],
        "width": ["" if group.width is None else f"{group.width:,}" for group in groups],
        "parameters": [f"{group.num_parameters:,}" for group in groups],
    }
    show_table(columns)
    show(
        f"{result.trainable_parameters:,} of {result.base_parameters:,} parameters "
        f"({result.trainable_parameters / result.base_parameters:.3%})"
    )
    if result.scale is not None:
        show(f"scale of the weight change: s = {result.scale:.4g}")
    if result.matched is not None:
        found = result.matched
        off = found.trainable_parameters / found.budget - 1
        show(
            f"rank {found.r}: {found.trainable_parameters:,} parameters for a budget of "
            f"{found.budget:,} ({off:+.1%})"
        )
    for omission in result.omitted:
        show(f"not adapted: {omission}", style="dim", highlight=False, soft_wrap=True)


def _show_steps(result: Plan) -> None:
    if result.num_steps is not None:
        rows = "" if result.num_rows is None else f" over {result.num_rows:,} rows"
        show(f"{result.num_steps:,} optimizer steps{rows}")
    if result.lengths is not None:
        p50, p95, longest = (result.lengths[name] for name in ("p50", "p95", "max"))
        show(f"tokens per row: median {p50:,}, 95th percentile {p95:,}, maximum {longest:,}")
    largest = result.largest_batch
    show(
        f"largest batch: {largest['sequences']:,} x {largest['length']:,} positions, "
        f"{largest['labels']:,} labels"
    )
    if result.flops_per_step is not None and result.train_flops is not None:
        show(
            f"{_format_flops(result.flops_per_step)} per step, "
            f"{_format_flops(result.train_flops)} in total"
        )


def _show_memory(result: Plan) -> None:
    parts = {
        name.replace("_", " "): "unknown" if gib is None else format_size(gib * GIB)
        for name, gib in result.memory_gib.items()
        if gib != 0
    }
    parts[f"free on this {result.device} now"] = format_size(result.available_gib * GIB)
    columns = {
        "memory on each device, estimated": list(parts),
        "": list(parts.values()),
    }
    show_table(columns, bold_rows=[list(parts).index("total")])
    disk = "" if result.disk_gib is None else f", {format_size(result.disk_gib * GIB)} at most"
    each = format_size(result.checkpoint_gib * GIB)
    show(f"checkpoints: {each} each{disk}; {format_size(result.free_disk_gib * GIB)} free")


def _format_flops(value: float) -> str:
    """Return a number of operations with a unit: `3.2 TFLOP`."""
    units = ["", "k", "M", "G", "T", "P", "E", "Z"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}FLOP"
