"""`wegeft report`: runs become one page that opens from disk."""

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
            metavar="RUN", help="Run folders, side by side; left out: the newest finished run."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The page; left out: report.html in the run."
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option("--title", metavar="TEXT", help="Title of the page.")
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="What `wegeft eval --output` wrote outside the runs; may be given several times.",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", metavar="N", min=0, help="Answers kept of each model and task; 500."
        ),
    ] = 500,
    no_inspect: Annotated[
        bool, typer.Option("--no-inspect", help="Do not look into the adapters.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page: recipe, curves, scores, answers, weights."""
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
