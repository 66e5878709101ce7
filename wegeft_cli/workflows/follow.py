"""A process that another one started for its own ends ends with it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import MutableMapping

VARIABLE = "WEGEFT_FOLLOWS"
"""Names, in the environment of a process, the one that it follows."""
_PR_SET_PDEATHSIG = 1


def follow_starter(environment: MutableMapping[str, str] | None = None) -> None:
    """Be told by SIGTERM when the process dies that started this one and asked to be followed.

    Even SIGKILL, of which that process never hears, then lets this one save and leave. Linux alone
    can do so (prctl(2), PR_SET_PDEATHSIG); elsewhere nothing happens.

    Args:
        environment: Variables; `VARIABLE` is taken out, since it is not meant for processes that
            this one starts. None takes the process's own.
    """
    environment = os.environ if environment is None else environment
    starter = environment.pop(VARIABLE, "")
    if not starter.isdigit() or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(starter):  # it died before it could be followed
        os.kill(os.getpid(), signal.SIGTERM)
