"""What a run tells of itself: the figures of a step, throughput and peak memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Args:
        step: Optimizer steps done.
        epoch: Passes over the data, fractional.
        loss: Mean loss per labelled token since the last line, over all processes.
        learning_rate: Rate of the step just done.
        grad_norm: Global gradient norm before clipping.
        num_tokens: Tokens (padding excluded) seen since the run began, over all processes.
        tokens_per_second: Tokens over seconds since the last line.
        step_seconds: Mean seconds per step since the last line.
        peak_memory_gib: Highest memory so far, in GiB: allocated on a GPU, resident on a CPU.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    tokens_per_second: float
    step_seconds: float
    peak_memory_gib: float

    def to_json(self) -> dict[str, Any]:
        """Give the figures as a JSON object."""
        return asdict(self)
