"""What the commands that train several runs share: options, the notice of a stop, exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from wegeft_cli.cli.console import note, show
from wegeft_cli.errors import EXIT_FAILED, EXIT_INTERRUPTED

JobsOption = Annotated[
    int,
    typer.Option(
        "--jobs",
        metavar="N",
        min=1,
        help="Runs at the same time, one GPU each; without a GPU they share the cores.",
    ),
]
PrintCommandsOption = Annotated[
    bool,
    typer.Option(
        "--print-commands",
        help="Print the commands that train what is left, one a line, and train nothing.",
    ),
]


def announce_stop() -> None:
    """Say that the current runs save before the command ends."""
    note("stopping: the current runs save a checkpoint (Ctrl-C again exits at once)")


def show_commands(commands: Sequence[str], command: str) -> None:
    """Print the commands of the runs that are left to standard output."""
    for each in commands:
        show(each, highlight=False, soft_wrap=True, markup=False)
    note(f"{len(commands)} runs are left; run `{command}` again when they have ended")


def exit_by_status(status: str) -> None:
    """Exit with the code of an interrupted or failed command; return for every other status."""
    codes = {"interrupted": EXIT_INTERRUPTED, "failed": EXIT_FAILED}
    if status in codes:
        raise typer.Exit(codes[status])
