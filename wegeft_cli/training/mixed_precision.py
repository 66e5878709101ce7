"""Mixed precision: the dtype of forward passes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device_type: str, mixed_precision: str) -> AbstractContextManager[Any]:
    """Return torch's autocast for bf16 or fp16, disabled for none."""
    dtype = _DTYPES.get(mixed_precision)
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)
