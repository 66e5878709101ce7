"""`wegeft eval`: a model, or given outputs, become scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wegeft_cli.cli.console import RichReporter, get_console, print_json, show
from wegeft_cli.cli.options import (
    BaseOption,
    DataDirOption,
    JsonOption,
    LimitOption,
    TargetArgument,
)


def evaluate(
    target: TargetArgument = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="Task by name; may be given several times."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", metavar="NAME", help="Prompt, decoding and scoring rules."),
    ] = None,
    data_dir: DataDirOption = None,
    limit: LimitOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", min=1, help="Prompts generated at a time."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", metavar="N", min=1, help="Longest answer; left out: the protocol's."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the JSON object to this file too."
        ),
    ] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Score the base model too, side by side.")
    ] = False,
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples", metavar="FILE", help="Score these outputs (JSONL) without any model."
        ),
    ] = None,
    base: BaseOption = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Run the code that the model writes, in a sandbox."
        ),
    ] = False,
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", metavar="N", min=1, help="Answers to each code problem."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", metavar="T", min=0.0, help="Of code's draws; 0 is greedy."),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url",
            metavar="URL",
            help="An OpenAI-compatible address that judges answers; nothing is sent without it.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option("--judge-model", metavar="NAME", help="The judge's name at that address."),
    ] = None,
    judgments: Annotated[
        Path | None,
        typer.Option(
            "--judgments", metavar="FILE", help="Score this judgment file, without any model."
        ),
    ] = None,
    list_tasks: Annotated[
        bool, typer.Option("--list", help="List the tasks and protocols, and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model on test sets, by a named protocol, and log every sample."""
    from wegeft_cli.workflows import evaluate as workflow

    if list_tasks:
        _print_tasks(workflow.list_tasks(), as_json)
        return
    result = workflow.evaluate(
        target,
        tasks=task or [],
        protocol=protocol,
        data_dir=data_dir,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        output=output,
        compare_base=compare_base,
        samples=samples if judgments is None else judgments,
        base=base,
        options={
            "allow_code_execution": allow_code_execution,
            "num_samples": num_samples,
            "temperature": temperature,
            "judge_url": judge_url,
            "judge_model": judge_model,
            "is_judged": judgments is not None,
        },
        reporter=RichReporter(),
    )
    if as_json:
        print_json(result)
        return
    _print_scores(result)


def _print_scores(result: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    rows = result["results"]
    columns = {
        "task": [row["task"] for row in rows],
        "protocol": [row["protocol"] for row in rows],
        "correct": [_count(row) for row in rows],
        "score": [_share(row["score"]) for row in rows],
        "95 % interval": [_interval(row["ci95"]) for row in rows],
        "invalid": [str(row["n_invalid"]) for row in rows],
    }
    if base_rows := result.get("base_results"):
        columns["base"] = [_share(base["score"]) for base in base_rows]
        columns["gain"] = [
            _gain(row["score"], base["score"]) for row, base in zip(rows, base_rows, strict=True)
        ]
    # A narrow terminal shows less rather than cut figures; --json and --output hold all.
    for name in ("95 % interval", "protocol", "invalid"):
        widths = [max(map(len, (title, *cells))) for title, cells in columns.items()]
        if sum(widths) + 3 * len(widths) > get_console().width:
            del columns[name]
    table = Table(box=SIMPLE)
    for name in columns:
        justify: Literal["left", "right"] = "left" if name in ("task", "protocol") else "right"
        table.add_column(name, no_wrap=True, justify=justify)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    show(table)
    if result.get("samples_path"):
        show(
            f"every sample: {result['samples_path']}", highlight=False, soft_wrap=True, style="dim"
        )


def _count(row: dict[str, Any]) -> str:
    """Rows answered rightly, or just rows where answers are neither right nor wrong."""
    return (
        f"{row['n']} rows" if row["num_correct"] is None else f"{row['num_correct']} / {row['n']}"
    )


def _share(score: float | None) -> str:
    return "not judged" if score is None else f"{score:.1%}"


def _interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"{100 * bounds[0]:.1f}-{100 * bounds[1]:.1f}"


def _gain(score: float | None, base: float | None) -> str:
    return "" if score is None or base is None else f"{100 * (score - base):+.1f}"


def _print_tasks(listing: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(listing)
        return
    from rich.box import SIMPLE
    from rich.table import Table

    tasks = Table("task", "file under --data-dir", "answers", box=SIMPLE)
    for row in listing["tasks"]:
        tasks.add_row(row["name"], row["file"], row["kind"])
    show(tasks)
    for row in listing["protocols"]:
        show(f"[bold]{row['name']}[/]  {row['description']}", highlight=False)
