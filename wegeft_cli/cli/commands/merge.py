"""`wegeft merge`: merge adapters and their base into one model folder."""

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


def merge(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER",
            help="One or more adapter, run or checkpoint folders. Default: the newest finished "
            "run.",
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            "--weight",
            metavar="W",
            help="Multiply an adapter's change by W. Repeat it for each adapter, in their order. "
            "Default: 1.",
        ),
    ] = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Output folder. Default: merged/ next to adapter/.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Type of the written tensors: float32, bfloat16 or float16. Default: the base's.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            help="Maximum size of a weights file, such as 5GB. Default: files as in the base.",
        ),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Merge into the dequantized weights that the adapter was trained on. Default: the "
            "16-bit base.",
        ),
    ] = False,
    chat_template: ChatTemplateOption = "base",
    push_to_hub: PushOption = None,
    is_public: PublicOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge adapters into their base model, one tensor at a time."""
    from wegeft_cli.merging.merge import merge as run

    result = run(
        adapters,
        weights=weight or [],
        base=base,
        revision=revision,
        output=output,
        dtype=dtype,
        max_shard_size=max_shard_size,
        dequantize=dequantize,
        chat_template=chat_template,
        push=hub_target(push_to_hub, is_public),
        reporter=RichReporter(),
    )
    if as_json:
        print_json(result.to_json())
        return
    show(
        f"[green]merged[/]: {result.num_folded} of {result.num_tensors} tensors changed in "
        f"{result.seconds:.1f} s, peak memory {result.peak_memory_gib:.2f} GiB"
    )
    if result.logits_difference is not None:
        logits = result.logits_difference
        into = "the 16-bit base" if result.merged_weights == "base" else "the dequantized weights"
        show(
            f"merged into {into}: difference from the trained model's logits: mean "
            f"{logits['mean']:.2g}, max {logits['max']:.2g}; same most likely token at "
            f"{logits['same_token']:.0%} of {logits['num_tokens']:.0f} positions"
        )
    show(f"model: {result.output_dir}", highlight=False, soft_wrap=True)
    if result.url is not None:
        show(f"hub: {result.url}", highlight=False, soft_wrap=True)
