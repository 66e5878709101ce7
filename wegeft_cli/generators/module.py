"""The generators as modules: owned once, at the model's root; the layers only refer to them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.generators.autograd import low_rank_edit, project_weight
from wegeft_cli.generators.equations import Side, cheaper_view
from wegeft_cli.generators.targets import Rows, Share, Target

Init = Literal["phi_zero", "psi_zero"]
View = Literal["auto", "activation", "weight"]

# The name under which a model owns its generators.
ROOT_NAME = "wegeft"


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
        random: Source of the draw; None uses torch's.
        device: Where the factors live. They are float32 whatever the base's type.
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
            if hasattr(nn.ModuleDict, name):
                raise UserError(
                    f"group name {name!r} is taken by torch itself",
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
    found once by an optimizer, whatever the number of layers that use it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.edits: dict[str, LinearEdit] = {}
        self.folded: str | None = None
        # Base tensors as they were before a fold, by parameter name; unfold puts them back.
        self.kept: dict[str, Tensor] = {}

    def __getitem__(self, adapter_name: str) -> AdapterGenerators:
        """Give one adapter's generators by name."""
        if adapter_name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise KeyError(f"no adapter {adapter_name!r}; there is {known}")
        return cast(AdapterGenerators, self.adapters[adapter_name])

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

    def trainable(self) -> list[nn.Parameter]:
        """List the factors that learn, each once."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class _Edit:
    generator: Generator
    settings: GeneratorSettings
    rows: Rows | None


class LinearEdit:
    """The change of one linear layer, applied by two forward hooks.

    Hooks rather than a wrapper: names in the state dict stay those of the base, and any linear
    works, quantised ones too, since the input side's activation view only edits what enters.

    Args:
        owner: The generators at the model's root.
        transposed: Whether the layer stores its weight as [d_in, d_out].
    """

    def __init__(self, owner: Generators, *, transposed: bool) -> None:
        self._owner = owner
        self._transposed = transposed
        self._by_adapter: dict[str, list[_Edit]] = {}
        self._handles: list[Any] = []

    def attach(self, linear: Any) -> None:
        """Register the two hooks on the linear."""
        self._handles = [
            linear.register_forward_pre_hook(self._before),
            linear.register_forward_hook(self._after),
        ]

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def add(
        self, adapter: str, generator: Generator, target: Target, settings: GeneratorSettings
    ) -> None:
        """Let `adapter` change this layer, or the target's rows of it, by `generator`."""
        edit = _Edit(generator, settings, target.rows)
        self._by_adapter.setdefault(adapter, []).append(edit)

    def _edits(self) -> Sequence[_Edit]:
        working = self._owner.working
        return self._by_adapter.get(working, ()) if working is not None else ()

    def _before(self, linear: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        edits = self._edits()
        if len(edits) != 1 or edits[0].rows is not None:
            return None
        edit = edits[0]
        x = args[0]
        if edit.settings.side != "input" or self._view(linear, edit, x) != "activation":
            return None
        return (edit.generator(x.to(_compute_dtype(x))), *args[1:])

    def _after(self, linear: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = args[0]
        for edit in self._edits():
            if edit.rows is not None:
                y = self._edit_rows(linear, edit, x, y)
            elif self._view(linear, edit, x) == "weight":
                y = self._weight_edit(linear, edit, x, y, self._weight(linear), linear.bias)
            elif edit.settings.side == "output":
                y = edit.generator(y)
        return y

    def _view(self, linear: Any, edit: _Edit, x: Tensor) -> str:
        settings = edit.settings
        if linear.training and settings.dropout > 0:
            return "weight"
        if settings.view != "auto":
            return settings.view
        if not linear.weight.is_floating_point() or not _is_plain(linear.weight):
            return "activation"
        if edit.rows is not None and settings.side == "input":
            # Rows of a fused projection would need the base's product twice.
            return "weight"
        if not linear.training:
            # One prompt and a batch of prompts must take the same road to the same token.
            return "activation"
        d_out, d_in = self._weight(linear).shape
        num_tokens = max(1, x.numel() // d_in)
        return cheaper_view(d_in, d_out, num_tokens, settings.side)

    def _weight(self, linear: Any) -> Tensor:
        weight = linear.weight.detach()
        return weight.t() if self._transposed else weight

    def _weight_edit(
        self,
        linear: Any,
        edit: _Edit,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Add `s (W phi)(psi x)`, or on the output side `s phi ((psi W) x + psi b)`, to `y`."""
        settings, phi, psi = edit.settings, edit.generator.phi, edit.generator.psi
        dropout = settings.dropout if linear.training else 0.0
        # From torch's global state, so that gradient checkpointing, which restores that state,
        # draws the same mask in its second forward pass.
        seed = int(torch.randint(2**62, ())) if dropout > 0 else 0
        dtype = _compute_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        if settings.side == "input":
            right = psi.to(dtype).t()
            left = project_weight(weight, phi, dropout, seed).to(dtype).t()
            inner = flat @ right
        else:
            left = phi.to(dtype).t()
            inner = flat @ project_weight(weight.t(), psi.t(), dropout, seed).to(dtype)
            if bias is not None:
                inner = inner + psi.to(dtype) @ bias.detach().to(dtype)
        flat_y = y.reshape(-1, y.shape[-1])
        edited = torch.addmm(flat_y.to(dtype), inner, left, alpha=settings.scale)
        return edited.to(y.dtype).view(y.shape)

    def _edit_rows(self, linear: Any, edit: _Edit, x: Tensor, y: Tensor) -> Tensor:
        """Change only the named output rows of a fused projection."""
        assert edit.rows is not None
        index = _row_index(edit.rows, y.device)
        part = y.index_select(-1, index)
        if self._view(linear, edit, x) == "weight":
            weight = self._weight(linear).index_select(0, index)
            bias = None if linear.bias is None else linear.bias.index_select(0, index)
            part = self._weight_edit(linear, edit, x, part, weight, bias)
        elif edit.settings.side == "output":
            part = edit.generator(part)
        else:
            # Without the rows of W at hand (a quantised base), the base's own product is taken a
            # second time; `forward` skips the hooks.
            part = linear.forward(edit.generator(x.to(_compute_dtype(x)))).index_select(-1, index)
        return y.index_copy(-1, index, part.to(y.dtype))


def _row_index(rows: Rows, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in rows])


def _is_plain(weight: Tensor) -> bool:
    """Tell an ordinary dense weight from a subclass that only pretends to be one (torchao)."""
    return type(weight) in (Tensor, nn.Parameter)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The type that the surrounding linear computes in: autocast's where it is on."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
