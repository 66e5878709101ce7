"""Modules that are trained whole beside the generators: a copy learns, the base's own stays."""

from __future__ import annotations

import copy
import difflib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.methods.layers.owner import Generators
from wegeft_cli.methods.layers.targets import ROOT_NAME, Target
from wegeft_cli.models.module_names import find_named

_KEY = "adapter.modules_to_save"
_NO_FORWARD = object()


class SavedModules(nn.ModuleDict):
    """The trained copies of one adapter, owned at the model's root.

    A copy is float32 for every base type (float64 of a float64 base): an optimizer's step on a
    16-bit weight is mostly rounded away. It computes in the base's type, see `ModuleSwitch`.

    Args:
        model: The base model.
        names: Full names of its modules.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.module_names = {name.replace(".", "-"): name for name in names}
        for key, name in self.module_names.items():
            self[key] = _copy_module(model.get_submodule(name))

    def by_name(self) -> dict[str, nn.Module]:
        """Give the copies by the full names of the modules that they stand for."""
        return {name: self[key] for key, name in self.module_names.items()}

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Give the trained parameters by their full names in the base."""
        return {
            f"{name}.{part}": parameter
            for name, module in self.by_name().items()
            for part, parameter in module.named_parameters()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into place; names and shapes must be these modules' own."""
        own = self.named_tensors()
        if {name: value.shape for name, value in tensors.items()} != {
            name: parameter.shape for name, parameter in own.items()
        }:
            raise ValueError(f"tensors {sorted(tensors)} for {sorted(own)}")
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value)

    def get_tensors(self) -> dict[str, Tensor]:
        """Give detached copies of the trained parameters on the CPU, in their own type."""
        return {
            name: parameter.detach().to("cpu", copy=True).contiguous()
            for name, parameter in self.named_tensors().items()
        }


class ModuleSwitch:
    """Lets the working adapter's copy compute in a module's place.

    The base's module stays where it is, with its parameters, names and hooks; only its `forward`
    leads elsewhere while an adapter with a copy of it works. The copy computes in the base's type:
    its float32 weights are rounded on the way, as a merge rounds them. A layer whose weights are
    rounded keeps its activations even where the model's other layers recompute theirs.

    Args:
        owner: The generators at the model's root.
        original: The base's module.
    """

    def __init__(self, owner: Generators, original: nn.Module) -> None:
        self._owner = owner
        self._original = original
        self._copies: dict[str, nn.Module] = {}
        self._own_forward = original.forward

    def attach(self) -> None:
        """Put the switch into place."""
        vars(self._original)["forward"] = self.forward

    def detach(self) -> None:
        """Give the module its own `forward` back."""
        del vars(self._original)["forward"]
        if self._own_forward != self._original.forward:
            # It had one of its own, not its class's, before.
            vars(self._original)["forward"] = self._own_forward

    def add(self, adapter_name: str, trained: nn.Module) -> None:
        """Let `trained` compute while `adapter_name` works."""
        self._copies[adapter_name] = trained

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the module computes, with the working adapter's weights or the base's."""
        working = self._owner.working
        trained = self._copies.get(working) if working is not None else None
        if trained is None:
            return self._own_forward(*args, **kwargs)
        dtypes = {name: own.dtype for name, own in self._original.named_parameters()}
        rounded = {
            name: parameter.to(dtypes[name])
            for name, parameter in trained.named_parameters()
            if parameter.dtype != dtypes[name]
        }
        if not rounded:
            return trained(*args, **kwargs)
        for part in trained.modules():
            if getattr(part, "gradient_checkpointing", False):
                # Recomputed in the backward pass it would meet its float32 weights again.
                part.gradient_checkpointing = False  # type: ignore[assignment]
        return torch.func.functional_call(trained, rounded, args, kwargs)


def wrap_saved_modules(
    model: nn.Module, owner: Generators, adapter_name: str, names: Sequence[str]
) -> None:
    """Give an adapter copies of modules to train whole; `check_saved_modules` comes first."""
    if not names:
        return
    saved = SavedModules(model, names)
    owner.saved[adapter_name] = saved
    for name, trained in saved.by_name().items():
        if name not in owner.switches:
            owner.switches[name] = ModuleSwitch(owner, model.get_submodule(name))
            owner.switches[name].attach()
        owner.switches[name].add(adapter_name, trained)


def find_saved_modules(
    model: nn.Module, names: Sequence[str], targets: Sequence[Target] = ()
) -> list[str]:
    """Find the modules that a recipe's `modules_to_save` names, and check that they can be trained.

    Raises:
        UserError: If a name matches nothing, or a module cannot be trained whole.
        ExceptionGroup: If there are several such faults.
    """
    found = list_saved_modules(model, names)
    check_saved_modules(model, found, targets)
    return found


def list_saved_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the full names of the modules that a recipe's `modules_to_save` names, in order.

    A full name, such as the `norm` of a classifier's head, means that module alone.

    Raises:
        UserError: If a name matches nothing.
        ExceptionGroup: If several do not.
    """
    known = [
        name for name, _ in model.named_modules() if name and name.partition(".")[0] != ROOT_NAME
    ]
    hits = {asked: find_named(known, asked) for asked in names}
    raise_all([_nothing_matches(asked, known) for asked, found in hits.items() if not found])
    wanted = {name for found in hits.values() for name in found}
    return [name for name in known if name in wanted]


def check_saved_modules(
    model: nn.Module, names: Sequence[str], targets: Sequence[Target] = ()
) -> None:
    """Refuse modules that cannot be trained and saved whole.

    Raises:
        UserError: If a module has no parameters, is never called, shares a parameter with another
            module, holds quantized weights or running statistics, holds an adapted linear or is
            inside one, or is inside another of the modules.
        ExceptionGroup: If several are at fault.
    """
    users: dict[int, list[str]] = {}
    if names:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            users.setdefault(id(parameter), []).append(name)
    faults: dict[str, list[UserError]] = {}
    for name in dict.fromkeys(names):
        fault = next(_find_faults(model, name, names, targets, users), None)
        if fault is not None:
            faults.setdefault(name.rpartition(".")[2], []).append(fault)
    for kind, found in faults.items():
        if len(found) > 1:  # the same in every layer
            found[0].message += f" (and so with {len(found) - 1} more {kind!r})"
    raise_all([found[0] for found in faults.values()])


def _find_faults(
    model: nn.Module,
    name: str,
    names: Sequence[str],
    targets: Sequence[Target],
    users: Mapping[int, Sequence[str]],
) -> Iterator[UserError]:
    module = model.get_submodule(name)
    yield from _find_tensor_faults(module, name, users)
    yield from _find_overlaps(name, names, targets)
    if type(module).forward is nn.Module.forward:  # a list of modules: only its members are called
        yield UserError(
            f"{name!r} is never called itself, so a copy of it would not learn",
            key=_KEY,
            hint="name modules in it",
        )


def _find_tensor_faults(
    module: nn.Module, name: str, users: Mapping[int, Sequence[str]]
) -> Iterator[UserError]:
    parameters = dict(module.named_parameters(prefix=name, remove_duplicate=False))
    if not parameters:
        yield UserError(f"{name!r} has no parameters to train", key=_KEY, hint="leave it out")
    for full_name, parameter in parameters.items():
        others = [other for other in users[id(parameter)] if other != full_name]
        if others:
            yield UserError(
                f"{full_name!r} is one tensor with {others[0]!r} (tied): "
                "training the one would change the other, or untie them",
                key=_KEY,
                hint="leave it out, or untie the base first: load it, give both modules their own "
                "tensor, set tie_word_embeddings to false in its config, and save it",
            )
        is_plain = type(parameter) in (Tensor, nn.Parameter) and parameter.is_floating_point()
        if not is_plain or parameter.dtype.itemsize < 2:
            yield UserError(
                f"{full_name!r} is quantized and cannot be trained whole", key=_KEY,
                hint="leave it out, or load the base in 16 bits",
            )  # fmt: skip
    statistics = [part for part in module.state_dict(prefix=f"{name}.") if part not in parameters]
    if statistics:
        yield UserError(
            f"{name!r} holds {statistics[0]!r}, which changes without being learned, and which an "
            "adapter does not keep",
            key=_KEY,
            hint="leave it out",
        )


def _find_overlaps(
    name: str, names: Sequence[str], targets: Sequence[Target]
) -> Iterator[UserError]:
    for target in targets:
        if _is_inside(target.name, name):
            yield UserError(
                f"{name!r} {'is' if target.name == name else 'holds'} the adapted layer "
                f"{target.label!r}",
                key=_KEY,
                hint="keep it in one of the two: here, or in adapter.target_modules",
            )
        if _is_inside(name, target.name):
            yield UserError(
                f"{name!r} is inside the adapted layer {target.label!r}",
                key=_KEY,
                hint="name the whole layer here and leave it out of adapter.target_modules",
            )
    for other in names:
        if other != name and _is_inside(name, other):
            yield UserError(
                f"{name!r} is inside {other!r}, which is trained whole too",
                key=_KEY,
                hint="name one of the two",
            )


def _is_inside(name: str, container: str) -> bool:
    return name == container or name.startswith(f"{container}.")


def _nothing_matches(asked: str, known: Sequence[str]) -> UserError:
    last_parts = dict.fromkeys(name.rpartition(".")[2] for name in known)
    kinds = [part for part in last_parts if not part.isdigit()]
    near = difflib.get_close_matches(asked.rpartition(".")[2], kinds, n=1, cutoff=0.5)
    return UserError(
        f"{asked!r} matches no module of the model",
        key=_KEY,
        hint=(f"did you mean {near[0]!r}? " if near else "") + f"it has {', '.join(kinds[:20])}",
    )


def _copy_module(module: nn.Module) -> nn.Module:
    """Copy a module for training, without what an adapter has put onto it."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        # A copied hook or switch would bring along the generators that it refers to, and the hooks
        # of the original run already, around the module that computes in its place.
        memo[id(part._forward_hooks)] = OrderedDict()
        memo[id(part._forward_pre_hooks)] = OrderedDict()
        forward = vars(part).get("forward")
        if isinstance(getattr(forward, "__self__", None), ModuleSwitch):
            memo[id(forward)] = _NO_FORWARD
    made = copy.deepcopy(module, memo)
    for part in made.modules():
        if vars(part).get("forward") is _NO_FORWARD:
            del vars(part)["forward"]
    for parameter in made.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return made.requires_grad_(True)
