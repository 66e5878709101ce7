"""The generators as modules: owned once, at the model's root; the layers only refer to them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.methods.wegeft.autograd import low_rank_edit
from wegeft_cli.methods.wegeft.equations import Side
from wegeft_cli.methods.wegeft.sharing import Share
from wegeft_cli.methods.wegeft.targets import Target

if TYPE_CHECKING:
    from wegeft_cli.methods.wegeft.expert_weights import ExpertEdit
    from wegeft_cli.methods.wegeft.hooks import LinearEdit
    from wegeft_cli.methods.wegeft.trained_modules import ModuleSwitch, SavedModules

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


class Generators(nn.Module):
    """All adapters of one model, registered once at its root.

    Layers hold unregistered references, so each factor is one parameter, is saved once and is
    found once by an optimizer, for any number of layers that use it. So are the copies of
    modules that are trained whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        # Adapter -> the modules that it trains whole; only adapters that have some are there.
        self.saved = nn.ModuleDict()
        self.active: str | None = None
        # The adapter of each row of a batch, in the place of the active one.
        self.row_names: tuple[str | None, ...] | None = None
        self.edits: dict[str, LinearEdit | ExpertEdit] = {}
        self.switches: dict[str, ModuleSwitch] = {}
        self.folded: str | None = None
        # Base tensors as they were before a fold, by parameter name; unfold puts them back.
        self.kept: dict[str, Tensor] = {}

    def __getitem__(self, adapter_name: str) -> AdapterGenerators:
        """Give one adapter's generators by name."""
        if adapter_name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise KeyError(f"no adapter {adapter_name!r}; there is {known}")
        return cast(AdapterGenerators, self.adapters[adapter_name])

    def saved_of(self, adapter_name: str) -> SavedModules | None:
        """Give the modules that an adapter trains whole, or None where it trains factors alone."""
        if adapter_name not in self.saved:
            return None
        return cast("SavedModules", self.saved[adapter_name])

    @property
    def working(self) -> str | None:
        """Name of the adapter that the layers apply now: the active one, unless it is folded."""
        return None if self.folded is not None else self.active

    @contextmanager
    def turned_off(self) -> Iterator[None]:
        """Run the base model alone inside the block."""
        before, self.active = self.active, None
        try:
            yield
        finally:
            self.active = before

    @contextmanager
    def use_rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Let each row of a batch use an adapter of its own inside the block.

        Every forward pass in the block has these rows, or the same multiple of each, as beams have.
        A row gets what its adapter alone gives it; the base is computed once for all rows.

        Args:
            names: The adapter of each row; None is the base.

        Raises:
            KeyError: If there is no such adapter.
            UserError: If an adapter is folded, or one of these trains whole modules or experts,
                which have one weight for all rows.
        """
        for name in {name for name in names if name is not None}:
            self[name]  # there must be one
            if name in self.saved:
                raise UserError(f"adapter {name!r} trains whole modules, which rows cannot share")
        if self.folded is not None:
            raise UserError(f"adapter {self.folded!r} is folded: unfold_generators first")
        if not all(edit.takes_rows for edit in self.edits.values()):
            raise UserError("the rows of a batch cannot have adapters of experts of their own")
        before = self.active, self.row_names
        self.active, self.row_names = None, tuple(names)
        try:
            yield
        finally:
            self.active, self.row_names = before

    def trainable(self) -> list[nn.Parameter]:
        """List what learns, each parameter once: factors, and modules that are trained whole."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]
