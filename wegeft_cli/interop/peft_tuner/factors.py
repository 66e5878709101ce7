"""A layer's view of the factors that the tuner owns, and the project's own edit around a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from wegeft_cli.methods.layers.owner import Generators
from wegeft_cli.methods.layers.targets import Target
from wegeft_cli.methods.wegeft.autograd import low_rank_edit
from wegeft_cli.methods.wegeft.hooks import LinearEdit
from wegeft_cli.methods.wegeft.modules import Generator, GeneratorSettings


class FactorPair:
    """One layer's view of a group's pair, which the tuner owns: `x -> x + s phi (psi x)`.

    No module, so that the factors are registered once, at the tuner, however many layers use them.

    Args:
        phi: The tuner's phi of this group, by adapter.
        psi: The tuner's psi of this group, by adapter.
        adapter: Which adapter.
        scale: s.
        linear: The base's layer.
    """

    def __init__(
        self,
        phi: nn.ParameterDict,
        psi: nn.ParameterDict,
        adapter: str,
        scale: float,
        linear: Any,
    ) -> None:
        self._phi, self._psi, self._adapter = phi, psi, adapter
        self._linear = linear
        self.scale = scale

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The two parameters themselves, (phi, psi)."""
        return self._phi[self._adapter], self._psi[self._adapter]

    @property
    def phi(self) -> Tensor:
        """First factor, [d, r], where the layer is."""
        return self._place(self._phi[self._adapter])

    @property
    def psi(self) -> Tensor:
        """Second factor, [r, d], where the layer is."""
        return self._place(self._psi[self._adapter])

    def __call__(self, x: Tensor) -> Tensor:
        """Edit activations of width d, [..., d]."""
        phi, psi = self.parameters
        # The layers of a group may be spread over several devices.
        return low_rank_edit(x, phi.to(x.device), psi.to(x.device), self.scale)

    def _place(self, factor: Tensor) -> Tensor:
        device = self._linear.weight.device
        return factor if device.type == "meta" else factor.to(device)


def draw_zero_factor(pair: Generator) -> None:
    """Draw the factor that starts at zero as the other one, so that the adapter has an effect."""
    bound = 1.0 / math.sqrt(pair.phi.shape[0])
    with torch.no_grad():
        for factor in (pair.phi, pair.psi):
            if not factor.is_meta and not factor.any():
                factor.uniform_(-bound, bound)


class SummedPairs:
    """Several adapters at once: their changes add up, which is one pair of a higher rank.

    Args:
        pairs: The pairs of one layer, all of one side.
    """

    scale = 1.0

    def __init__(self, pairs: Sequence[FactorPair]) -> None:
        self._pairs = pairs

    @property
    def phi(self) -> Tensor:
        """The scaled first factors side by side, [d, sum of r]."""
        return torch.cat([pair.scale * pair.phi for pair in self._pairs], dim=1)

    @property
    def psi(self) -> Tensor:
        """The second factors one below the other, [sum of r, d]."""
        return torch.cat([pair.psi for pair in self._pairs], dim=0)

    def __call__(self, x: Tensor) -> Tensor:
        """Edit activations of width d, [..., d]."""
        return low_rank_edit(x, self.phi.to(x.device), self.psi.to(x.device), self.scale)


@dataclass(frozen=True)
class Part:
    """What one adapter does to a layer, or to some rows of it.

    Args:
        pair: The group's factors.
        target: The layer, or the rows.
        settings: How the edit is computed.
    """

    pair: FactorPair
    target: Target
    settings: GeneratorSettings


class _Owner(Protocol):
    row_names: None

    @property
    def working(self) -> str | None: ...


class WrappedEdit(LinearEdit):
    """The project's own edit of a linear, around a call instead of in hooks.

    Args:
        owner: The layer; its `working` is the key of the active adapter.
        transposed: Whether the base's layer stores its weight as [d_in, d_out].
    """

    def __init__(self, owner: _Owner, *, transposed: bool) -> None:
        super().__init__(cast(Generators, owner), transposed=transposed)

    def run(self, linear: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the base's layer with the working adapter's change.

        Args:
            x: Its input, [..., d_in].

        Returns:
            The output, [..., d_out].
        """
        changed = self._before(linear, (x,)) or (x,)
        return self._after(linear, changed, linear(*changed, *args, **kwargs))

    def put(self, key: str, parts: Sequence[tuple[Any, Target, GeneratorSettings]]) -> None:
        """Set what works under a key, in place of what did."""
        self.remove(key)
        for pair, target, settings in parts:
            self.add(key, cast(Generator, pair), target, settings)

    def remove(self, key: str) -> None:
        """Forget what works under a key."""
        self._by_adapter.pop(key, None)


def is_dense(weight: Tensor) -> bool:
    """Return whether a weight is ordinary: neither quantized nor sharded."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
