"""`wegeft bench`: compare methods on the same data, batches, steps and evaluation."""

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
    from wegeft_cli.runs.bench.result import BenchResult
    from wegeft_cli.runs.bench.table import BenchRow

_TITLES = {
    "score": ("score", 4, 1.0),
    "validation_loss": ("validation loss", 4, 1.0),
    "trainable_parameters": ("parameters", 0, 1.0),
    "adapter_bytes": ("adapter KiB", 1, 2.0**-10),
    "peak_memory_gib": ("peak GiB", 2, 1.0),
    "step_seconds": ("step ms", 1, 1000.0),
    "merge_seconds": ("merge s", 2, 1.0),
}
"""Figure -> title, digits and factor."""


def bench(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAME,NAME",
            help="Methods by adapter.type, or LABEL=TYPE for a second form of one method.",
        ),
    ] = "wegeft,lora",
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            metavar="N|LIST",
            help="Number of seeds from the recipe's on, or the seeds (42,43,44).",
        ),
    ] = "3",
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            metavar="KEY=V,V",
            help="Values to choose from for each method by validation loss, such as "
            "train.learning_rate=1e-4,3e-4,1e-3; LABEL:KEY=V,V for one method. Repeatable. "
            "They are combined with the recipe's sweep. Default: none.",
        ),
    ] = None,
    search_seeds: Annotated[
        int,
        typer.Option(
            "--search-seeds",
            metavar="N",
            min=1,
            help="Seeds of each combination of the search; their mean validation loss decides.",
        ),
    ] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="LABEL:KEY=VALUE",
            help="Setting of one method, such as lora:adapter.r=16. Repeatable.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="LABEL",
            help="Method of the ratios and the paired test. Default: lora, else the first.",
        ),
    ] = None,
    jobs: JobsOption = 1,
    print_commands: PrintCommandsOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every method and stop before training.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare methods on the same data, batches, steps and evaluation. Rerun to resume."""
    from wegeft_cli.distributed.signals import StopRequest

    with StopRequest(announce_stop) as should_stop:
        from wegeft_cli.runs.bench.bench import bench as run

        result = run(
            recipe,
            overrides or [],
            methods=[name for name in methods.split(",") if name.strip()],
            seeds=seeds,
            search=search or [],
            search_seeds=search_seeds,
            settings=settings or [],
            baseline=baseline,
            jobs=jobs,
            dry_run=dry_run,
            only_commands=print_commands,
            should_stop=should_stop,
            reporter=RichReporter(),
        )
    if as_json:
        print_json(result.to_json())
    elif result.status == "listed":
        show_commands(result.commands, "wegeft bench")
    elif result.status == "checked":
        show(f"[green]ready[/]: {len(result.methods)} methods, {len(result.seeds)} seeds each")
    else:
        _print_rows(result)
        _print_end(result)
    exit_by_status(result.status)


def _print_rows(result: BenchResult) -> None:
    from wegeft_cli.recipe.grid import name_value

    rows = result.methods
    columns: dict[str, list[str]] = {"method": [row.method for row in rows]}
    keys = dict.fromkeys(key for row in rows for key in row.values)
    for key in keys:
        name = key.rpartition(".")[2].replace("_", " ")
        columns[name] = [name_value(row.values[key]) if key in row.values else "-" for row in rows]
    columns["seeds"] = [f"{len(row.seeds)}/{row.num_seeds}" for row in rows]
    for name, (title, _, _) in _TITLES.items():
        if not any(name in row.figures for row in rows):
            continue
        columns[title] = [_format(name, row) for row in rows]
        columns[f"{title} x"] = [_format_ratio(row.ratios.get(name)) for row in rows]
    columns["p (t)"] = [_format_p(row.test.t_test_p if row.test else None) for row in rows]
    columns["p (flip)"] = [_format_p(row.test.sign_flip_p if row.test else None) for row in rows]
    other = "validation loss" if result.metric == "score" else "score"
    dropped = ["p (flip)", "merge s x", "merge s", "peak GiB x", f"{other} x", other, "step ms x"]
    dropped += ["adapter KiB x", "adapter KiB", "peak GiB", "step ms", "parameters x", "p (t)"]
    show_table(
        columns,
        drop=[*dropped, "seeds"],
        bold_rows=[number for number, row in enumerate(rows) if row.method == result.baseline],
    )


def _format(name: str, row: BenchRow) -> str:
    if name not in row.figures:
        return "-"
    figure, (_, digits, factor) = row.figures[name], _TITLES[name]
    mean = f"{factor * figure.mean:,.{digits}f}"
    is_compared = name in ("score", "validation_loss")
    if figure.std is None or not is_compared:
        return mean
    return f"{mean} ± {factor * figure.std:.{digits}f}"


def _format_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}"


def _format_p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _print_end(result: BenchResult) -> None:
    plain: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False}
    show(f"x: divided by {result.baseline}, over the seeds of both", style="dim", **plain)
    for row in result.methods:
        if row.test is not None:
            show(
                f"p of {row.method}: {_format_p(row.test.t_test_p)} (t-test), "
                f"{_format_p(row.test.sign_flip_p)} (exact sign flips, at least "
                f"{row.test.least_sign_flip_p:.2g}), paired over {row.test.n} seeds against "
                f"{result.baseline}",
                style="dim",
                **plain,
            )
    for row in result.methods:
        for text in row.notes:
            show(f"{row.method}: {text}", **plain)
    if result.status == "interrupted":
        show("interrupted; run the same command to resume", **plain)
    show(f"table: {result.output_dir / 'bench.json'}", style="dim", **plain)
    if result.plot is not None:
        show(f"plot: {result.plot}", style="dim", **plain)
