"""`wegeft train`: train the adapter of a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wegeft_cli.cli.arguments import (
    JsonOption,
    OverridesArgument,
    PublicOption,
    PushOption,
    RecipeArgument,
    hub_target,
)
from wegeft_cli.cli.console import RichReporter, note, print_json, show
from wegeft_cli.cli.relaunch import relaunch
from wegeft_cli.cli.start import open_recipe
from wegeft_cli.errors import EXIT_DONE, EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    from wegeft_cli.runs.run import TrainResult

_MUCH_PADDING = 0.1
"""Share of positions that another setting must save for the summary to name it."""


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|PATH",
            help="Resume from the newest complete checkpoint of the run (auto, or no value) "
            "or from this checkpoint. Default: start a new run.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Run all checks and stop before the weights are loaded."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an earlier run in the output folder, with its checkpoints, adapter and "
            "evaluations. Default: refuse a folder that holds a run.",
        ),
    ] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            metavar="N",
            min=1,
            help="Total number of processes over all machines, one per GPU. Default: 1.",
        ),
    ] = None,
    num_machines: Annotated[
        int,
        typer.Option(
            "--num-machines",
            metavar="N",
            min=1,
            help="Number of machines. Start the same command on each of them.",
        ),
    ] = 1,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(
            "--rdzv-endpoint",
            metavar="HOST:PORT",
            help="Address of the machine where they meet. Required with --num-machines above 1.",
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts",
            metavar="N",
            min=0,
            help="After a process fails, restart all from the newest checkpoint, at most N times.",
        ),
    ] = 0,
    push_to_hub: PushOption = None,
    is_public: PublicOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the recipe's adapter and write it to the output folder."""
    if num_processes is None and (num_machines, rdzv_endpoint, max_restarts) != (1, None, 0):
        raise UserError(
            "--num-machines, --rdzv-endpoint and --max-restarts need --num-processes",
            key="--num-processes",
            hint="set the number of processes too",
        )
    loaded = open_recipe("train", recipe, overrides)
    from wegeft_cli.distributed.failures import LAUNCHED, may_be_restarted, num_restarts
    from wegeft_cli.distributed.launch import join_slurm
    from wegeft_cli.distributed.signals import StopRequest

    if num_processes is not None:
        os.environ[LAUNCHED] = "1"
        group = {"num_machines": num_machines, "rdzv_endpoint": rdzv_endpoint}
        raise typer.Exit(relaunch(num_processes, max_restarts=max_restarts, **group))
    join_slurm()
    # Only the first process uploads. A repository without write access fails before training.
    push = hub_target(push_to_hub, is_public) if os.environ.get("RANK", "0") == "0" else None
    if push is not None:
        push.check()
    if num_restarts() > 0:
        resume, overwrite = resume or "auto", False

    def announce_stop() -> None:
        note("stopping: saving after the current pass (Ctrl-C again exits at once)")

    with StopRequest(announce_stop) as should_stop:
        from wegeft_cli.runs.train import train as run

        result = run(
            loaded,
            resume=resume,
            dry_run=dry_run,
            overwrite=overwrite,
            should_stop=should_stop,
            reporter=RichReporter(),
        )
    url = None
    if push is not None and result.adapter_dir is not None:
        from wegeft_cli.publishing.hub import publish

        url = publish(result.adapter_dir, push, RichReporter())
    if as_json:
        print_json(result.to_json() | ({} if url is None else {"url": url}))
    else:
        _print_result(result, url)
    if result.status == "interrupted":
        # The launcher would restart a process that exits with an error.
        raise typer.Exit(EXIT_DONE if may_be_restarted() else EXIT_INTERRUPTED)


def _print_result(result: TrainResult, url: str | None) -> None:
    counts = f"{result.trainable_parameters:,} trainable parameters"
    if result.status == "checked":
        show(f"[green]ready[/]: {result.num_steps} steps, {counts}")
        _show_summary(result)
    elif result.status == "finished":
        loss = "" if result.final_loss is None else f"final loss {result.final_loss:.4f}, "
        show(f"[green]finished[/]: {result.num_steps} steps, {loss}{counts}")
        _show_summary(result)
        show(f"adapter: {result.adapter_dir}", highlight=False, soft_wrap=True)
        if url is not None:
            show(f"hub: {url}", highlight=False, soft_wrap=True)
        folder = result.adapter_dir
        has_head = folder is not None and (folder / "head.json").is_file()
        task = "" if has_head else " --task NAME"
        show(f"next: wegeft merge, wegeft eval{task}", style="dim", highlight=False)
    else:
        show(f"[yellow]interrupted[/] at step {result.num_steps}, saved; resume with --resume auto")


def _show_summary(result: TrainResult) -> None:
    for line in summary_lines(result):
        show(line, highlight=False, soft_wrap=True)


def summary_lines(result: TrainResult) -> Iterator[str]:
    """Yield further facts about a finished run as plain lines."""
    if result.best_step is not None and result.best_metric is not None:
        is_kept = result.adapter_step == result.best_step
        kept = f"the adapter is from {'that' if is_kept else 'the last'} step"
        yield f"best validation: {result.best_metric:.4f} at step {result.best_step}; {kept}"
    if result.num_skipped:
        yield (
            f"skipped: {result.num_skipped} steps whose loss or gradient cannot be used; "
            f"their rows are in {result.run_dir / 'skipped'}"
        )
    figures = [
        (result.peak_memory_gib, "GiB peak"),
        (result.estimated_memory_gib, "GiB estimated"),
    ]
    memory = [f"{value:.2f} {words}" for value, words in figures if value is not None]
    if memory:
        yield f"memory: {', '.join(memory)}"
    if result.waste is not None:
        num_looked_at = result.waste.get("estimated_from_rows")
        yield (
            f"padding: {result.waste['padding_share']:.0%} of the positions are padding; "
            f"logits are computed at {result.waste['head_share']:.0%} of them"
            + (f" (estimated from the first {num_looked_at} rows)" if num_looked_at else "")
        )
        yield from _padding_lines(result.waste)


def _padding_lines(waste: Mapping[str, Any]) -> Iterator[str]:
    """Yield what reduces much padding, with what remains and the positions that it saves."""
    now = waste["padding_share"]
    ways = {
        "train.group_by_length: true": waste.get("grouped_padding_share"),
        "data.packing: bfd": waste.get("packed_padding_share"),
    }
    found = [
        f"{key} to {share:.0%} ({1 - (1 - now) / (1 - share):.0%} fewer positions)"
        for key, share in ways.items()
        if share is not None and now - share >= _MUCH_PADDING
    ]
    if found:
        yield f"the padding can be reduced: {', or '.join(found)}"
