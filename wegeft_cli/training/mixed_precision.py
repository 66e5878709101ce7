"""Mixed precision: which type the layers compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device_type: str, mixed_precision: str) -> AbstractContextManager[Any]:
    """Give the context in which a forward pass runs.

    Args:
        device_type: cpu, cuda, ...
        mixed_precision: bf16, fp16 or none.

    Returns:
        Torch's autocast, switched off for none.
    """
    dtype = _DTYPES.get(mixed_precision)
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)
