"""The exponential moving average of what learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ParameterAverage:
    """A float32 average over the steps done, the newest weighing most.

    After n updates the values t_1 .. t_n weigh `(1 - decay) decay^(n - i) / (1 - decay^n)`, which
    add up to one: the start, of which one factor is zero, has no share in the average, so that a
    short run need not outlast it. Before the first update the average is the start.

    Args:
        parameters: What learns, by name.
        decay: Weight of the average so far, in a long run; above 0 and below 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._parameters = dict(parameters)
        self.tensors = {
            name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.num_updates += 1
        weight = (1 - self.decay) / (1 - self.decay**self.num_updates)
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter.float(), weight)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Go on with an average that was kept.

        Args:
            tensors: The average by the parameters' names.
            num_updates: Updates that made it.
        """
        self.num_updates = num_updates
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def write(self) -> None:
        """Put the average into the parameters, for good."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.tensors[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the parameters hold the average inside the block, and their own bits after it."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.write()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(own[name])
