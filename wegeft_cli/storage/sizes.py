"""Sizes as text, each with the unit in which it is at least 1."""

from __future__ import annotations

GIB = 2**30
_UNITS = ("KiB", "MiB", "GiB")


def format_size(num_bytes: float) -> str:
    """Return a size such as `512 B`, `3.1 MiB` or `1.25 GiB`."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    power = 1
    while num_bytes >= 1024 ** (power + 1) and power < len(_UNITS):
        power += 1
    unit = _UNITS[power - 1]
    return f"{num_bytes / 1024**power:.{2 if unit == 'GiB' else 1}f} {unit}"
