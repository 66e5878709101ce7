"""What a process of many says to the launcher that started it, and hears from it.

The names are those of torch's elastic launcher, which torchrun uses too.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

LAUNCHED = "WEGEFT_LAUNCHED"
"""Stands in the environment of processes that the command itself has started."""


def tell_launcher(message: str) -> None:
    """Leave word of a fault where the command that started this process looks for it.

    Without one, and under torchrun, do nothing.

    Args:
        message: The fault, in a line.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    # torchrun would print the same fault a second time, in a report of its own.
    if place and LAUNCHED in os.environ:
        told = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        part = Path(f"{place}.part")
        with suppress(OSError):  # the fault itself goes on
            part.write_text(json.dumps({"message": told}), encoding="utf-8")
            part.replace(place)  # the launcher may be looking


def num_restarts() -> int:
    """Tell how often the launcher has started this run's processes again."""
    return _read_count("TORCHELASTIC_RESTART_COUNT")


def may_be_restarted() -> bool:
    """Tell whether the launcher would start the processes again if this one failed."""
    return num_restarts() < _read_count("TORCHELASTIC_MAX_RESTARTS")


def _read_count(name: str) -> int:
    value = os.environ.get(name, "0")
    return int(value) if value.isdigit() else 0
