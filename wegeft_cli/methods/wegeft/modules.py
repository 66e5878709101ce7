"""The generators of one adapter as modules: a pair of factors for each group of layers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.targets import Target
from wegeft_cli.methods.wegeft.autograd import low_rank_edit
from wegeft_cli.methods.wegeft.equations import Side
from wegeft_cli.methods.wegeft.sharing import Share

Init = Literal["phi_zero", "psi_zero"]
View = Literal["auto", "activation", "weight"]


@dataclass(frozen=True)
class GeneratorSettings:
    """How the generators of one adapter compute; what is not in the factors themselves.

    Args:
        rank: r, at least 1.
        alpha: Numerator of the scale: s = alpha / r.
        side: Which side of a linear is edited.
        init: Which factor starts at zero.
        dropout: Dropout on the entries of the frozen weight while training; weight view only.
        view: auto, activation or weight.
        share: How the groups were made; kept for the record.
    """

    rank: int
    alpha: float
    side: Side = "input"
    init: Init = "phi_zero"
    dropout: float = 0.0
    view: View = "auto"
    share: Share | Literal["groups"] = "module_type"

    @property
    def scale(self) -> float:
        """The scale s = alpha / r."""
        return self.alpha / self.rank


class Generator(nn.Module):
    """One group's pair of factors: `x -> x + s phi (psi x)`.

    WeGeFT (arXiv 2312.00700v5), equation W' = W (I + s phi psi). The factor that does not start at
    zero is drawn from U(-1/sqrt(d), 1/sqrt(d)), which is Kaiming uniform with a = sqrt 5.

    Args:
        d: Width that the pair works on.
        rank: r.
        scale: s.
        init: phi_zero or psi_zero.
        random: Random generator of the initial values; None uses torch's.
        device: Where the factors live. They are float32 for every base type.
    """

    def __init__(
        self,
        d: int,
        rank: int,
        scale: float = 1.0,
        init: Init = "phi_zero",
        *,
        random: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        bound = 1.0 / math.sqrt(d)
        phi, psi = torch.zeros(d, rank), torch.zeros(rank, d)
        (psi if init == "phi_zero" else phi).uniform_(-bound, bound, generator=random)
        self.phi = nn.Parameter(phi.to(device))
        self.psi = nn.Parameter(psi.to(device))

    def forward(self, x: Tensor) -> Tensor:
        """Edit activations of width d, [..., d]; the result has the shape and type of `x`."""
        return low_rank_edit(x, self.phi, self.psi, self.scale)

    def extra_repr(self) -> str:
        """Shape in one line, for `print(model)`."""
        d, rank = self.phi.shape
        return f"d={d}, rank={rank}, scale={self.scale:g}"


class AdapterGenerators(nn.ModuleDict):
    """The generators of one adapter, by group, with its settings and its targets.

    Args:
        settings: How they compute.
        groups: Group name -> targets.
        seed: The factors are a pure function of (seed, group name).
        device: Where the factors live.
    """

    def __init__(
        self,
        settings: GeneratorSettings,
        groups: Mapping[str, Sequence[Target]],
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.groups = {name: tuple(members) for name, members in groups.items()}
        for name, members in self.groups.items():
            if hasattr(self, name):
                raise UserError(
                    f"the group name {name!r} is an attribute of the module that holds the groups",
                    key="adapter.groups",
                    hint="choose another name under adapter.groups",
                )
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            random = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self[name] = Generator(
                members[0].width(settings.side),
                settings.rank,
                settings.scale,
                settings.init,
                random=random,
                device=device,
            )

    def __getitem__(self, group: str) -> Generator:
        """Give one group's generator."""
        return cast(Generator, super().__getitem__(group))

    def load_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Copy (phi, psi) of every group into place; shapes must be these generators' own."""
        with torch.no_grad():
            for name, (phi, psi) in factors.items():
                generator = self[name]
                for parameter, value in ((generator.phi, phi), (generator.psi, psi)):
                    if parameter.shape != value.shape:
                        raise ValueError(f"{name}: {tuple(value.shape)} is not {parameter.shape}")
                    parameter.copy_(value)

    def get_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Give (phi, psi) of every group as detached float32 tensors on the CPU."""
        return {name: (_to_disk(self[name].phi), _to_disk(self[name].psi)) for name in self.groups}


def _to_disk(factor: Tensor) -> Tensor:
    return factor.detach().to("cpu", torch.float32, copy=True).contiguous()
