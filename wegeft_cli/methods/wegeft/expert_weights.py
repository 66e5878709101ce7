"""Generators on the stacked weights of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wegeft_cli.methods.layers.owner import Generators
from wegeft_cli.methods.layers.targets import Target
from wegeft_cli.methods.wegeft.autograd import compute_dtype
from wegeft_cli.methods.wegeft.modules import Generator, GeneratorSettings

# Attributes that describe a weight and that a change of its entries leaves as they are.
_DESCRIPTIONS = frozenset(
    {"device", "dim", "dtype", "data_ptr", "is_cuda", "is_floating_point", "layout", "ndim"}
    | {"requires_grad", "shape", "size", "stride", "is_meta", "element_size", "numel"}
)
_PRODUCTS: frozenset[Any] = frozenset(
    {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm}
    | {Tensor.__matmul__, Tensor.__rmatmul__}
)
_GROUPED = frozenset({"_grouped_mm", "grouped_mm", "grouped_mm_fallback"})


class ExpertWeight:
    """The weight `W[e] (I + s phi psi)` of all experts, which a product computes as `W[e] x_hat`.

    The forward pass of the experts chooses matrices of it and multiplies them with activations.
    Each product edits the activations, see `low_rank_edit`, so that no second copy of the experts
    exists. Any other operation gets the changed weight itself.

    Args:
        weight: The stored W, [..., d_out, d_in], or [..., d_in, d_out].
        generator: The pair of the group.
        transposed: Whether W is [..., d_in, d_out].
        dropout: Probability that an entry of W is dropped in the change. Above 0, or with
            `dense`, products use the changed weight.
    """

    def __init__(
        self,
        weight: Tensor,
        generator: Generator,
        *,
        transposed: bool,
        dropout: float = 0.0,
        dense: bool = False,
    ) -> None:
        self._weight = weight
        self._generator = generator
        self._transposed = transposed
        self._dropout = dropout
        self._dense = dense or dropout > 0

    def __getattr__(self, name: str) -> Any:
        """Return a description of the stored weight, or the changed weight's attribute."""
        if name in ("T", "mT"):
            return self.transpose(-2, -1)
        return getattr(self._weight if name in _DESCRIPTIONS else self.make(), name)

    def __getitem__(self, index: Any) -> Any:
        """Choose experts; an index of more than the first dimension gets the changed weight."""
        is_one = not isinstance(index, tuple | list | slice) and index is not None
        if self._dense or not is_one or self._weight.ndim != 3:
            return self.make()[index]
        return self._like(self._weight[index])

    def __matmul__(self, other: Any) -> Any:
        """Multiply from the left."""
        product: Any = torch.matmul
        return product(self, other)

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Swap two dimensions; the last two keep the products by activations."""
        last = {self._weight.ndim - 1, self._weight.ndim - 2}
        if self._dense or {dim0 % self._weight.ndim, dim1 % self._weight.ndim} != last:
            return self.make().transpose(dim0, dim1)
        return self._like(self._weight.transpose(dim0, dim1), turned=True)

    def make(self) -> Tensor:
        """Compute the changed weight."""
        W = self._weight.detach()
        source = F.dropout(W, self._dropout) if self._dropout else W
        phi, psi = self._generator.phi.to(W.dtype), self._generator.psi.to(W.dtype)
        if self._transposed:
            return W + self._generator.scale * (psi.t() @ (phi.t() @ source))
        return W + self._generator.scale * ((source @ phi) @ psi)

    def _like(self, weight: Tensor, *, turned: bool = False) -> ExpertWeight:
        return ExpertWeight(weight, self._generator, transposed=self._transposed != turned)

    def _edit(self, x: Tensor) -> Tensor:
        edited: Tensor = self._generator(x.to(compute_dtype(x)))
        return edited

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute a function of torch that takes the weight as an argument."""
        kwargs = kwargs or {}
        left, right = (*args, None, None)[:2]
        if func is F.linear and isinstance(right, cls) and right.keeps(transposed=False):
            return func(right._edit(left), right._weight, *args[2:], **kwargs)
        name = getattr(func, "__name__", str(func)).rpartition(".")[2]
        if func in _PRODUCTS or name in _GROUPED:
            if func is Tensor.__rmatmul__:
                func, left, right = torch.matmul, right, left
            if isinstance(right, cls) and isinstance(left, Tensor) and right.keeps(transposed=True):
                edited = right._edit(left)
                # Autocast leaves grouped products alone: their operands have the caller's type.
                edited = edited.to(left.dtype) if name in _GROUPED else edited
                return func(edited, right._weight, *args[2:], **kwargs)
            if isinstance(left, cls) and isinstance(right, Tensor) and left.keeps(transposed=False):
                if right.ndim == 1:
                    edited = left._edit(right)
                elif right.shape[-1] == 1:
                    # One column keeps its strides, by which the product chooses its algorithm.
                    edited = left._edit(right.squeeze(-1)).unsqueeze(-1)
                else:
                    edited = left._edit(right.transpose(-2, -1)).transpose(-2, -1)
                return func(left._weight, edited, *args[2:], **kwargs)
        made = [each.make() if isinstance(each, cls) else each for each in (left, right, *args[2:])]
        kwargs = {k: v.make() if isinstance(v, cls) else v for k, v in kwargs.items()}
        return func(*made[: len(args)], **kwargs)

    def keeps(self, *, transposed: bool) -> bool:
        """Return whether a product over this dimension may edit the activations."""
        return not self._dense and self._transposed is transposed


class ExpertEdit:
    """The change of one stacked weight, which replaces it while its module computes.

    Names in the state dict stay those of the base: the module's parameter is what it was before and
    after its forward pass.

    Args:
        owner: The generators at the model's root.
        target: The stacked weight.
    """

    takes_rows = False

    def __init__(self, owner: Generators, target: Target) -> None:
        self._owner = owner
        self._name = target.name.rpartition(".")[2]
        self._transposed = target.transposed
        self._by_adapter: dict[str, tuple[Generator, GeneratorSettings]] = {}
        self._handles: list[Any] = []

    def attach(self, module: nn.Module) -> None:
        """Register the two hooks on the module of the experts."""
        self._handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def add(
        self, adapter: str, generator: Generator, target: Target, settings: GeneratorSettings
    ) -> None:
        """Let `adapter` change this weight by `generator`."""
        self._by_adapter[adapter] = (generator, settings)

    def _before(self, module: nn.Module, args: Any) -> None:
        working = self._owner.working
        if working not in self._by_adapter:
            return
        generator, settings = self._by_adapter[working]
        # The instance's own attribute is found before the parameter of that name.
        module.__dict__[self._name] = ExpertWeight(
            module._parameters[self._name],  # type: ignore[arg-type]
            generator,
            transposed=self._transposed,
            dropout=settings.dropout if module.training else 0.0,
            dense=settings.view == "weight",
        )

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        module.__dict__.pop(self._name, None)
