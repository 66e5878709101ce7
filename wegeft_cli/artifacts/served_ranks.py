"""The ranks of LoRA adapters that vLLM serves."""

from __future__ import annotations

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank`."""


def served_rank(rank: int) -> int:
    """Return the least rank of vLLM's that holds a rank; the rank itself above all of them."""
    return next((served for served in SERVED_RANKS if served >= rank), rank)
