"""The import of PyTorch at the start of a command."""

from __future__ import annotations

import gc
import sys


def load_torch() -> None:
    """Import PyTorch, and spare the garbage collector its objects.

    Searching its 260,000 objects takes a fifth of the time of all imports; none is garbage.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()
