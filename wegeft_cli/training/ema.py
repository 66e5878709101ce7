"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ParameterAverage:
    """A float32 moving average of parameters with bias correction.

    After n updates the values t_1 .. t_n have the weights `(1 - decay) decay^(n - i) / (1 -
    decay^n)`, which sum to one. The initial values, of which one factor is zero, have no weight.
    Before the first update the average equals them.

    Args:
        parameters: The trained parameters by name.
        decay: Weight of the previous average, above 0 and below 1.
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
        """Add the current parameters to the average."""
        self.num_updates += 1
        weight = (1 - self.decay) / (1 - self.decay**self.num_updates)
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter.float(), weight)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Restore a saved average and its number of updates."""
        self.num_updates = num_updates
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def write(self) -> None:
        """Copy the average into the parameters."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.tensors[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the average into the parameters inside the block, and restore their bits after it."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.write()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(own[name])
