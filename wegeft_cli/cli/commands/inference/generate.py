"""`wegeft generate`: answer one prompt or many."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from wegeft_cli.cli.arguments import JsonOption, TargetArgument, is_model_name
from wegeft_cli.cli.console import (
    RichReporter,
    escape_control,
    get_console,
    note,
    print_json,
    show,
    write_piece,
)
from wegeft_cli.cli.generation_options import GenerationOptions, generation_options, stdin_is_pipe
from wegeft_cli.errors import UserError, cut_text


@generation_options
def generate(
    target: TargetArgument = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt to answer. Repeatable."),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="File of prompts (.jsonl, .json, .csv, .parquet), a text file as one prompt, or - "
            "for standard input.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=1, help="Use only the first N rows. Default: all."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the answers to this JSONL file. Default: print them.",
        ),
    ] = None,
    *,
    generation: GenerationOptions,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=PATH",
            help="Adapter or run folder for the rows of --file whose field `adapter` is NAME. "
            "Repeatable; all share one base.",
        ),
    ] = None,
    num_samples: Annotated[
        int,
        typer.Option("--num-samples", "-n", metavar="N", min=1, help="Answers per prompt."),
    ] = 1,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Prompts per batch. Default: eval.batch_size."
        ),
    ] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Also show the base model's answers.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Generate answers to prompts. Decoding is greedy unless a sampling option is set."""
    from wegeft_cli.inference.generate import generate as run

    if target is not None and not prompt and file is None and not is_model_name(target):
        raise UserError(
            f"{target!r} is no adapter, run or model",
            key="TARGET",
            hint=f"a prompt is an option: wegeft generate --prompt {shlex.quote(target)}",
        )
    if not prompt and file is None and stdin_is_pipe():
        file = "-"
    quiet = as_json or output is not None
    stream = None if quiet else _Stream(compare_base)
    result = run(
        target,
        prompts=prompt or [],
        file=file,
        limit=limit,
        template=generation.read_template(),
        system=generation.system,
        decoding=generation.read_decoding(),
        num_samples=num_samples,
        max_new_tokens=generation.max_new_tokens,
        batch_size=batch_size,
        compare_base=compare_base,
        base=generation.base,
        adapters=adapter or [],
        output=output,
        reporter=RichReporter(),
        on_text=stream,
    )
    if as_json:
        print_json(result)
        return
    if stream is not None and stream.who is not None:
        show("")
    elif output is None:
        _show_answers(result)
    _print_end(result)


class _Stream:
    """Prints a single answer while it is generated; two answers get titles."""

    def __init__(self, has_titles: bool) -> None:
        self.has_titles = has_titles
        self.who: str | None = None

    def __call__(self, who: str, piece: str) -> None:
        if who != self.who:
            if self.who is not None:
                show("\n")
            if self.has_titles:
                show(who, style="bold")
            self.who = who
            piece = piece.lstrip() or piece
        write_piece(piece)


def _show_answers(result: dict[str, Any]) -> None:
    rows = result["results"]
    for row in rows:
        if len(rows) > 1:
            sample = f", answer {row['sample'] + 1}" if "sample" in row else ""
            head = " ".join(row["prompt"].split())
            head = cut_text(head, 60)
            show(_plain(f"[{row['index']}{sample}] {head}"), style="bold", highlight=False)
        if "base_output" in row:
            show("base", style="dim")
            _show_text(row["base_output"])
            show("tuned", style="dim")
        _show_text(row["output"])
        if len(rows) > 1:
            show("")


def _show_text(text: str) -> None:
    write_piece(text.strip("\n") + "\n")


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(escape_control(text), overflow="ellipsis", no_wrap=True)


def _print_end(result: dict[str, Any]) -> None:
    rows = result["results"]
    if result["output_path"] is not None:
        show(
            f"{len(rows)} answers: {result['output_path']}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    cut = sum(row["finish_reason"] == "length" for row in rows)
    summary = f"{result['num_new_tokens']:,} tokens in {result['seconds']:.1f} s, form "
    summary += f"{result['template']}, {_describe_settings(result['settings'])}"
    if cut:
        summary += f"; {cut} of {len(rows)} not ended after {result['settings']['max_new_tokens']}"
    if get_console(stderr=True).is_terminal or cut or result["output_path"] is not None:
        note(summary)


def _describe_settings(settings: dict[str, Any]) -> str:
    if not settings["do_sample"]:
        return "greedy"
    shown = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    values = {key: settings.get(key, off) for key, off in shown.items()}
    parts = [f"{key} {value:g}" for key, value in values.items() if value != shown[key]]
    return "sampling" + (f" ({', '.join(parts)})" if parts else "")
