"""`wegeft merge`: adapters and their base become one ordinary model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wegeft_cli.cli.arguments import (
    BaseOption,
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
            help="Adapter or run folders, one or several; left out: the newest finished run.",
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            "--weight",
            metavar="W",
            help="Weight of an adapter's change, once for each in their order; left out: 1.",
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
            help="Folder to write; left out: merged/ beside adapter/.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="float32, bfloat16 or float16; left out: as in the base.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            help="Largest size of a weights file, such as 5GB; left out: the base's files.",
        ),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Of a base quantised while training: fold into its dequantised weights, as they "
            "were trained on; left out: into the 16-bit base.",
        ),
    ] = False,
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
        told = result.logits_difference
        into = "the 16-bit base" if result.merged_weights == "base" else "the dequantised weights"
        show(
            f"merged into {into}: logits differ from the trained model's by {told['mean']:.2g} on "
            f"average, {told['max']:.2g} at most; the likeliest token is the same at "
            f"{told['same_token']:.0%} of {told['num_tokens']:.0f} positions"
        )
    show(f"model: {result.output_dir}", highlight=False, soft_wrap=True)
    if result.url is not None:
        show(f"hub: {result.url}", highlight=False, soft_wrap=True)
