"""`wegeft sweep`: train every combination of a recipe's `sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from wegeft_cli.cli.arguments import JsonOption, OverridesArgument, RecipeArgument
from wegeft_cli.cli.console import RichReporter, print_json, show
from wegeft_cli.cli.several_runs import (
    JobsOption,
    PrintCommandsOption,
    announce_stop,
    exit_by_status,
    show_commands,
)
from wegeft_cli.cli.tables import show_table

if TYPE_CHECKING:
    from wegeft_cli.artifacts.run_results import Statistic
    from wegeft_cli.runs.sweep import SweepResult


def sweep(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    jobs: JobsOption = 1,
    print_commands: PrintCommandsOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every combination and stop before training.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train every combination of the recipe's `sweep` and compare them. Rerun to resume."""
    from wegeft_cli.distributed.signals import StopRequest

    with StopRequest(announce_stop) as should_stop:
        from wegeft_cli.runs.sweep import sweep as run

        result = run(
            recipe,
            overrides or [],
            jobs=jobs,
            dry_run=dry_run,
            only_commands=print_commands,
            should_stop=should_stop,
            reporter=RichReporter(),
        )
    if as_json:
        print_json(result.to_json())
    elif result.status == "listed":
        show_commands(result.commands, "wegeft sweep")
    elif result.status == "checked":
        show(f"[green]ready[/]: {len(result.runs)} runs, {len(result.rows)} without their seeds")
    else:
        _print_rows(result)
        _print_end(result)
    exit_by_status(result.status)


def _print_rows(result: SweepResult) -> None:
    from wegeft_cli.artifacts.run_results import BEST
    from wegeft_cli.recipe.grid import name_value, short_names

    short = short_names(result.rows[0].values)
    columns = {
        name: [name_value(row.values[key]) for row in result.rows] for key, name in short.items()
    }
    columns["runs"] = [f"{row.num_finished}/{row.num_runs}" for row in result.rows]
    names = dict.fromkeys(name for row in result.rows for name in row.figures)
    if BEST + result.metric in names:
        del names[result.metric]
    for name in names:
        title = {"peak_memory_gib": "GiB"}.get(name, name.replace("_", " "))
        columns[title] = [_format(name, row.figures.get(name)) for row in result.rows]
    scores = [title for title in columns if title.startswith("eval ")]
    show_table(
        columns,
        text=short.values(),
        drop=("seconds", "GiB", "runs", "final loss", *reversed(scores)),
        bold_rows=[number for number, row in enumerate(result.rows) if row.values == result.best],
    )


def _format(name: str, figure: Statistic | None) -> str:
    """Return mean and standard deviation with the digits of this figure."""
    if figure is None:
        return "-"
    digits = {"peak_memory_gib": 2, "seconds": 0}.get(name, 4)
    mean = f"{figure.mean:,.{digits}f}"
    return mean if figure.std is None else f"{mean} ± {figure.std:.{digits}f}"


def _print_end(result: SweepResult) -> None:
    plain: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False}
    if result.best:
        values = ", ".join(f"{key}={value}" for key, value in result.best.items())
        show(f"best {result.metric}: {values}", **plain)
    for run in result.runs:
        if run.status == "failed":
            show(f"failed: {run.name}: {run.error}", style="red", **plain)
    if result.status == "interrupted":
        num_left = sum(run.status != "finished" for run in result.runs)
        show(f"interrupted, {num_left} runs left; run the same command to resume", **plain)
    show(f"table: {result.output_dir / 'sweep.json'}", style="dim", **plain)
    if result.plot is not None:
        show(f"plot: {result.plot}", style="dim", **plain)
