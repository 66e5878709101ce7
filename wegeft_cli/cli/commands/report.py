"""`wegeft report`: write an HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wegeft_cli.cli.arguments import JsonOption
from wegeft_cli.cli.console import RichReporter, count, print_json, show


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Folders of runs, sweeps or benches. Default: the newest finished run.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Page to write. Default: report.html in the run."
        ),
    ] = None,
    title: Annotated[
        str | None,
        typer.Option(
            "--title", metavar="TEXT", help="Title of the page. Default: the runs' names."
        ),
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="Result of `wegeft eval --output` outside the runs. Repeatable.",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", metavar="N", min=0, help="Maximum number of answers per model and task."
        ),
    ] = 500,
    no_inspect: Annotated[
        bool, typer.Option("--no-inspect", help="Skip the analysis of the adapters' weights.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page: scores, curves, answers, weights, recipe."""
    from wegeft_cli.analysis.report import report as run

    result = run(
        runs or [],
        output=output,
        title=title,
        evaluations=evaluations or [],
        look_inside=not no_inspect,
        max_samples=samples,
        reporter=RichReporter(),
    )
    if as_json:
        print_json(result.to_json())
        return
    show(
        f"[green]report[/]: {count(len(result.runs), 'run')}, {count(result.num_scores, 'score')}, "
        f"{count(result.num_answers, 'answer')}, {result.num_bytes / 2**20:.1f} MiB"
    )
    show(f"page: {result.output}", highlight=False, soft_wrap=True, markup=False)
