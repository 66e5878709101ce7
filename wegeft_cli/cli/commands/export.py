"""`wegeft export`: write an adapter or a model in a format of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wegeft_cli.cli.arguments import (
    BaseOption,
    ChatTemplateOption,
    JsonOption,
    PublicOption,
    PushOption,
    RevisionOption,
    hub_target,
)
from wegeft_cli.cli.console import RichReporter, print_json, show


def export(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="Adapter or run folder; for gguf also a model folder. Default: the newest "
            "finished run.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="lora: exact LoRA equivalent for PEFT, vLLM and SGLang. gguf: for llama.cpp.",
        ),
    ] = "lora",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Output folder. Default: lora/ or gguf/ next to adapter/.",
        ),
    ] = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Type of the written tensors: float32, bfloat16 or float16; q8_0 for a model as "
            "GGUF. Default: float32 for an adapter, the stored type for a model.",
        ),
    ] = None,
    pad_rank: Annotated[
        bool,
        typer.Option(
            "--pad-rank", help="Pad the rank with zeros to the next rank that vLLM supports."
        ),
    ] = False,
    pad_siblings: Annotated[
        bool,
        typer.Option(
            "--pad-siblings",
            help="Add zero factors for layers that servers stack (q, k, v; gate, up).",
        ),
    ] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="Prompt for the parity check. Repeatable. Default: four short prompts.",
        ),
    ] = None,
    no_parity: Annotated[
        bool,
        typer.Option(
            "--no-parity", help="Skip the parity check, which loads the base and compares logits."
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SERVER",
            help="Server that reads the LoRA: vllm. Its names are written, and what it does not "
            "read is refused. Default: PEFT's names.",
        ),
    ] = None,
    chat_template: ChatTemplateOption = "base",
    push_to_hub: PushOption = None,
    is_public: PublicOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export an adapter as an exact LoRA equivalent, or an adapter or a model as GGUF."""
    from wegeft_cli.exporting.export import ExportOptions
    from wegeft_cli.exporting.export import export as run

    result = run(
        target,
        format=format,
        output=output,
        base=base,
        revision=revision,
        options=ExportOptions(
            dtype,
            pad_rank,
            pad_siblings,
            prompt or (),
            not no_parity,
            hub_target(push_to_hub, is_public),
            server,
            chat_template,
        ),
        reporter=RichReporter(),
    )
    if as_json:
        print_json(result.to_json())
        return
    rank = "" if result.rank is None else f" of rank {result.rank}"
    show(
        f"[green]exported[/]: {result.num_tensors} tensors{rank}, "
        f"{result.num_bytes / 2**20:,.1f} MiB in {result.seconds:.1f} s, "
        f"peak memory {result.peak_memory_gib:.2f} GiB"
    )
    if result.parity is not None and result.parity["is_measured"]:
        for row in result.parity["results"]:
            show(
                f"parity in {row['dtype']}: {row['pair']} differ by {row['max_difference']:.2g} at "
                f"most, logits reach {row['max_logit']:.3g}",
                highlight=False,
            )
    show(f"folder: {result.output_dir}", highlight=False, soft_wrap=True)
    if result.url is not None:
        show(f"hub: {result.url}", highlight=False, soft_wrap=True)
