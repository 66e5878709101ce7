"""Metrics of training steps: loss, rate, throughput and peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Args:
        step: Optimizer steps done.
        epoch: Passes over the data, fractional.
        loss: Mean loss per labeled token since the last line, over all processes.
        learning_rate: Learning rate of the last step.
        grad_norm: Global gradient norm before clipping.
        num_tokens: Tokens (padding excluded) seen since the run began, over all processes.
        tokens_per_second: Tokens per second since the last line.
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
        """Return the metrics as a JSON object."""
        return asdict(self)


class Stopwatch:
    """Steps, tokens and seconds since the last line of metrics."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from zero again."""
        self._start = time.perf_counter()
        self._num_steps = self._num_tokens = 0

    def add_step(self, num_tokens: int) -> None:
        """Count a step."""
        self._num_steps += 1
        self._num_tokens += num_tokens

    def read(self) -> tuple[float, float]:
        """Return tokens per second and seconds per step."""
        seconds = time.perf_counter() - self._start
        return self._num_tokens / seconds, seconds / self._num_steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the seconds of the block, such as those of a validation."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start
