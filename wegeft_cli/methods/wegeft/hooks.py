"""What a generator does in a layer: two forward hooks on a linear that stays the base's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.owner import Generators
from wegeft_cli.methods.layers.targets import Rows, Target
from wegeft_cli.methods.wegeft.autograd import compute_dtype, project_weight
from wegeft_cli.methods.wegeft.equations import cheaper_view
from wegeft_cli.methods.wegeft.modules import Generator, GeneratorSettings


@dataclass(frozen=True)
class _Edit:
    generator: Generator
    settings: GeneratorSettings
    rows: Rows | None


class LinearEdit:
    """The change of one linear layer, applied by two forward hooks.

    Hooks rather than a wrapper: names in the state dict stay those of the base, and any linear
    works, quantized ones too, since the input side's activation view only edits what enters.

    Args:
        owner: The generators at the model's root.
        transposed: Whether the layer stores its weight as [d_in, d_out].
    """

    takes_rows = True

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

    def _edits(self, name: str | None) -> Sequence[_Edit]:
        return self._by_adapter.get(name, ()) if name is not None else ()

    def _before(self, linear: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, names = args[0], self._owner.row_names
        if names is None:
            edited = self._edit_input(linear, self._edits(self._owner.working), x)
            return None if edited is None else (edited, *args[1:])
        result: Tensor | None = None
        for edits, index in self._split_rows(names, x):
            part = self._edit_input(linear, edits, x[index])
            if part is not None:
                result = x.to(part.dtype, copy=True) if result is None else result
                result[index] = part
        return None if result is None else (result, *args[1:])

    def _after(self, linear: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x, names = args[0], self._owner.row_names
        if names is None:
            return self._edit_output(linear, self._edits(self._owner.working), x, y)
        for edits, index in self._split_rows(names, x):
            # The input of `x` was edited before; only the other edits are made here.
            part = self._edit_output(linear, edits, x[index], y[index])
            y = y.index_copy(0, index, part)
        return y

    def _split_rows(
        self, names: Sequence[str | None], x: Tensor
    ) -> Iterator[tuple[Sequence[_Edit], Tensor]]:
        """Yield the edits of each adapter of this layer, with the rows of the input that use it."""
        times, rest = divmod(len(x), len(names))
        if rest or not times:
            raise UserError(f"a layer got {len(x)} rows where `use_rows` has {len(names)} names")
        for name in dict.fromkeys(names):
            if edits := self._edits(name):
                rows = [row for row, each in enumerate(names) if each == name]
                index = torch.tensor(rows, device=x.device)
                if times > 1:
                    within = torch.arange(times, device=x.device)
                    index = (index[:, None] * times + within).flatten()
                yield edits, index

    def _edit_input(self, linear: Any, edits: Sequence[_Edit], x: Tensor) -> Tensor | None:
        if len(edits) != 1 or edits[0].rows is not None:
            return None
        edit = edits[0]
        if edit.settings.side != "input" or self._view(linear, edit, x) != "activation":
            return None
        edited: Tensor = edit.generator(x.to(compute_dtype(x)))
        return edited

    def _edit_output(self, linear: Any, edits: Sequence[_Edit], x: Tensor, y: Tensor) -> Tensor:
        for edit in edits:
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
        dtype = compute_dtype(x)
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
            # Without the rows of W at hand (a quantized base), the base's own product is taken a
            # second time; `forward` skips the hooks.
            part = linear.forward(edit.generator(x.to(compute_dtype(x)))).index_select(-1, index)
        return y.index_copy(-1, index, part.to(y.dtype))


def _row_index(rows: Rows, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in rows])


def _is_plain(weight: Tensor) -> bool:
    """Return whether a weight is ordinary and dense, not a subclass that imitates one (torchao)."""
    return type(weight) in (Tensor, nn.Parameter)
