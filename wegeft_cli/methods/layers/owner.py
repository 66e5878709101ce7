"""What a model owns at its root: the adapters, once for all layers that use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.targets import ROOT_NAME

if TYPE_CHECKING:
    from wegeft_cli.methods.layers.trained_modules import ModuleSwitch, SavedModules
    from wegeft_cli.methods.wegeft.expert_weights import ExpertEdit
    from wegeft_cli.methods.wegeft.hooks import LinearEdit
    from wegeft_cli.methods.wegeft.modules import AdapterGenerators


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
        return cast("AdapterGenerators", self.adapters[adapter_name])

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


def get_generators(model: nn.Module) -> Generators | None:
    """Give the generators at the model's root, or None where there are none."""
    owner = getattr(model, ROOT_NAME, None)
    return owner if isinstance(owner, Generators) else None


def use_generators(model: nn.Module, adapter_name: str) -> None:
    """Make one adapter the active one: only it changes the layers, only what is its own learns.

    Args:
        model: A model with generators.
        adapter_name: Which.

    Raises:
        KeyError: If there is no such adapter.
    """
    owner = _need_generators(model)
    owner[adapter_name]  # there must be one
    if owner.folded not in (None, adapter_name):
        raise ValueError(f"adapter {owner.folded!r} is folded: unfold_generators first")
    for parts in (owner.adapters, owner.saved):
        for name, part in parts.items():
            part.requires_grad_(name == adapter_name)
    owner.active = adapter_name


@contextmanager
def disable_generators(model: nn.Module) -> Iterator[None]:
    """Run the base model alone inside the block; a folded adapter stays folded."""
    with _need_generators(model).turned_off():
        yield


def remove_generators(model: nn.Module) -> None:
    """Take all generators out: the model is the plain base again (folded changes stay folded)."""
    owner = _need_generators(model)
    for edit in owner.edits.values():
        edit.detach()
    for switch in owner.switches.values():
        switch.detach()
    delattr(model, ROOT_NAME)


def _need_generators(model: nn.Module) -> Generators:
    owner = get_generators(model)
    if owner is None:
        raise ValueError("the model has no generators: call inject_generators first")
    return owner
