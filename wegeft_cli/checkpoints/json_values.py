"""Figures as JSON takes them."""

from __future__ import annotations

import math
from typing import Any


def to_finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON has no word for, by null.

    Args:
        value: A JSON value; tuples are lists there.

    Returns:
        Its copy, None in their place.
    """
    if isinstance(value, dict):
        return {key: to_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
