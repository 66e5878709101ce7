"""Run the same command line in several processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from wegeft_cli.cli.console import RichReporter
from wegeft_cli.errors import UserError

_OPTIONS = ("--num-processes", "--num-machines", "--rdzv-endpoint", "--max-restarts")


def relaunch(num_processes: int, **settings: Any) -> int:
    """Start this command line in each process and return the exit code of the group."""
    from wegeft_cli.distributed.launch import Group, is_in_group, launch

    if is_in_group():
        raise UserError(
            f"this process is already one of {os.environ['WORLD_SIZE']}",
            key="--num-processes",
            hint="omit it under torchrun and accelerate launch",
        )
    words, group = without_launch_options(sys.argv[1:]), Group(num_processes, **settings)
    return launch(words, group, RichReporter())


def without_launch_options(words: Sequence[str]) -> list[str]:
    """Return a command line without the launch options and their values."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            return [*kept, word, *rest]
        if word in _OPTIONS:
            next(rest, None)
        elif word.partition("=")[0] not in _OPTIONS:
            kept.append(word)
    return kept
