"""The layers that a run adapts: the recipe's targets without those that its task never trains.

A forward and backward pass without values finds those.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wegeft_cli.data.batches.base import BatchShape
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.methods.base import LayerChoice, Omission
from wegeft_cli.methods.layers.targets import Target, find_hits, module_of
from wegeft_cli.methods.omissions import omit_targets
from wegeft_cli.methods.registry import find_method
from wegeft_cli.methods.wegeft.sharing import pattern_matches
from wegeft_cli.planning.fake_step import (
    count_equal_layers,
    find_layers,
    num_layers,
    without_values,
)
from wegeft_cli.recipe.parameter_budget import MatchedRank
from wegeft_cli.recipe.schema import AdapterSection, Recipe
from wegeft_cli.tasks.registry import adapter_section, find_task

_KEY = "adapter.target_modules"
_NOT_RUN = "layers that the task does not run"
_NO_GRADIENT = "layers on which the loss does not depend"
# Positions of the traced rows. Some layers need long rows, such as the compressed attention of
# DeepSeek-V4. Long rows are not traced where the model loops over positions, as Mamba does.
_SHORT, _LONGER, _LONG = 8, 12, 160
_MOST_GROWTH = 3.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetSetup:
    """The layers of a run.

    Args:
        section: The recipe's `adapter` as the method gets it, with the names of these layers.
        omitted: What is not adapted.
        notes: Sentences on names that are read as others, and on what is not adapted.
        warnings: Sentences on layers that the recipe names and that are not adapted.
        matched: The rank that `adapter.match_params` has chosen, if the recipe sets it.
    """

    section: AdapterSection
    omitted: tuple[Omission, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    matched: MatchedRank | None = None


def settle_targets(recipe: Recipe, skeleton: nn.Module) -> TargetSetup:
    """Decide which layers a recipe adapts in its base, a pure function of both.

    `all-linear` omits layers that the task does not run or that get no gradient. Where the recipe
    names layers, such layers are omitted with a warning, as long as each name has others.

    Args:
        skeleton: The base on the meta device, which is left as it was.

    Raises:
        UserError: If the targets do not fit the model, or none of those of a name can learn.
        ExceptionGroup: If there are several such faults.
    """
    section, notes = adapter_section(recipe, skeleton)
    method = find_method(section.type)
    choice = method.choose_layers(skeleton, section)
    if choice is None:
        return TargetSetup(section, notes=tuple(notes))
    idle = find_idle_targets(skeleton, recipe, choice.targets)
    raise_all(list(_list_faults(section, choice, idle)))
    kept = [target for target in choice.targets if target.name not in idle.names]
    parts = ((_NOT_RUN, idle.not_run), (_NO_GRADIENT, idle.without_gradient))
    left = [
        omit_targets(what, skeleton, [target for target in choice.targets if target.name in names])
        for what, names in parts
        if names
    ]
    is_named = section.target_modules != "all-linear"
    if not is_named:
        notes = [*notes, *(f"`all-linear` omits {each}" for each in [*choice.omitted, *left])]
    if idle.names or choice.omitted or not choice.as_written:
        section = method.with_layers(skeleton, section, kept)
    return TargetSetup(
        section,
        (*choice.omitted, *left),
        tuple(notes),
        tuple(f"not adapted: {each}" for each in [*choice.omitted, *left]) if is_named else (),
    )


def _list_faults(
    section: AdapterSection, choice: LayerChoice, idle: IdleTargets
) -> Iterator[UserError]:
    """Yield each name, or the expression, all of whose layers are idle."""
    for key, text, targets in _names_of(section, choice):
        if targets and all(target.name in idle.names for target in targets):
            is_run = all(target.name in idle.without_gradient for target in targets)
            what = "on which the loss does not depend" if is_run else "which the task does not run"
            yield UserError(
                f"{text!r} names layers that cannot learn, {what}: {targets[0].name}"
                + (", ..." if len(targets) > 1 else ""),
                key=key,
                hint="omit it",
            )


def _names_of(
    section: AdapterSection, choice: LayerChoice
) -> Iterator[tuple[str, str, Sequence[Target]]]:
    asked: Any = section.target_modules
    if isinstance(asked, str):
        yield _KEY, asked, choice.targets
    else:
        known = {target.name: target for target in choice.targets}
        for entry in asked:
            yield _KEY, entry, find_hits(known, entry.partition(":")[0])
    for group, patterns in (section.groups or {}).items():
        for pattern in patterns:
            targets = [target for target in choice.targets if pattern_matches(pattern, target)]
            yield f"adapter.groups.{group}", pattern, targets


@dataclass(frozen=True)
class IdleTargets:
    """Targets that cannot learn.

    Args:
        not_run: Names of targets that the task's forward pass never runs.
        without_gradient: Names of those that it runs and that the loss does not depend on.
    """

    not_run: frozenset[str] = frozenset()
    without_gradient: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """Names of all of them."""
        return self.not_run | self.without_gradient


def find_idle_targets(skeleton: Any, recipe: Recipe, targets: Sequence[Target]) -> IdleTargets:
    """Run the base's forward and backward pass without values, and find the targets that are idle.

    A zero that needs a gradient is added to the input of each target, or to the weights of experts.
    A target is idle if it is so with short and with long rows. Where all layers are alike, two of
    them are run: the last layer is like the second, all others are like the first.

    Args:
        skeleton: The base on the meta device, which is left as it was.

    Returns:
        The idle targets. None are found in a model that does not run without values.
    """
    try:
        count = count_equal_layers(skeleton, recipe)
    except LookupError:
        count = 0
    if not count:
        return _trace_lengths(skeleton, recipe, targets)
    path = find_layers(skeleton)
    kept = {target.name: _as_one_of_two(target.name, path, count) for target in targets}
    representatives = set(kept.values())
    run = [target for target in targets if target.name in representatives]
    with num_layers(skeleton, 2):
        idle = _trace_lengths(skeleton, recipe, run)
    return IdleTargets(
        frozenset(name for name, like in kept.items() if like in idle.not_run),
        frozenset(name for name, like in kept.items() if like in idle.without_gradient),
    )


def _as_one_of_two(name: str, path: str, count: int) -> str:
    """Return the name of the same target in the first two of `count` equal layers."""
    if not name.startswith(f"{path}."):
        return name
    number, _, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{int(int(number) == count - 1)}.{rest}"


def _trace_lengths(skeleton: Any, recipe: Recipe, targets: Sequence[Target]) -> IdleTargets:
    """Trace short rows, and longer ones as long as targets are idle."""
    longest = recipe.data.max_length
    found = _trace(skeleton, recipe, targets, min(_SHORT, longest))
    if found is None:
        return IdleTargets()
    idle, short = found
    if find_task(recipe.task).reads_images:
        return idle
    for length in (_LONGER, _LONG):
        left = [target for target in targets if target.name in idle.names]
        if not left or longest < length:
            break
        found = _trace(skeleton, recipe, left, length)
        if found is None:
            return IdleTargets()
        idle, operations = found
        growth = (operations / short - 1) / (_LONGER - _SHORT) * (_LONG - _SHORT)
        if growth > _MOST_GROWTH:
            break
    return idle


def _trace(
    skeleton: Any, recipe: Recipe, targets: Sequence[Target], length: int
) -> tuple[IdleTargets, int] | None:
    """Trace in training mode, or else in evaluation mode, which skips no layers at random.

    Without a mask at first, as a mask's values are not known; some models need one.
    """
    shape = BatchShape(1, length, max(1, length // 2), False)
    for is_masked, is_training in product((False, True), (True, False)):
        try:
            with _prepared(skeleton, is_training=is_training):
                return _run(skeleton, recipe, targets, replace(shape, is_masked=is_masked))
        except RuntimeError as error:
            _log.debug("targets are not traced (training: %s): %s", is_training, error)
    return None


def _run(
    skeleton: Any, recipe: Recipe, targets: Sequence[Target], shape: BatchShape
) -> tuple[IdleTargets, int]:
    """Return the idle targets of one pass, and its number of operations."""
    probes = {target.name: _Probe() for target in targets}
    is_masked = shape.is_masked
    with without_values(skeleton, recipe, is_masked=is_masked), _hooked(skeleton, targets, probes):
        for probe in probes.values():
            probe.zero = torch.zeros((), requires_grad=True)
        fake = find_task(recipe.task).fake_pass(skeleton, recipe)
        with _OperationCounter() as counter:
            loss = fake.loss(shape)
        if loss.requires_grad:
            loss.backward()
    idle = IdleTargets(
        not_run=frozenset(name for name, probe in probes.items() if not probe.has_run),
        without_gradient=frozenset(
            name for name, probe in probes.items() if probe.has_run and probe.zero.grad is None
        ),
    )
    return idle, counter.count


class _OperationCounter(TorchDispatchMode):
    """Counts operations, however large."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass
class _Probe:
    zero: Tensor = field(default_factory=lambda: torch.zeros(()))
    has_run: bool = False


@contextmanager
def _hooked(
    skeleton: nn.Module, targets: Sequence[Target], probes: Mapping[str, _Probe]
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for target in targets:
            module, probe = module_of(skeleton, target), probes[target.name]
            if target.experts:
                handles.append(
                    module.register_forward_pre_hook(partial(_add_to_weight, probe, target.kind))
                )
                handles.append(
                    module.register_forward_hook(
                        partial(_restore_weight, target.kind), always_call=True
                    )
                )
            else:
                handles.append(module.register_forward_pre_hook(partial(_add_to_input, probe)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_to_input(probe: _Probe, module: nn.Module, args: tuple[Any, ...]) -> Any:
    probe.has_run = True
    return (args[0] + probe.zero, *args[1:])


def _add_to_weight(probe: _Probe, kind: str, module: nn.Module, args: Any) -> None:
    probe.has_run = True
    # The instance's own attribute is found before the parameter of that name.
    module.__dict__[kind] = module.get_parameter(kind) + probe.zero


def _restore_weight(kind: str, module: nn.Module, args: Any, output: Any) -> None:
    module.__dict__.pop(kind, None)


@contextmanager
def _prepared(model: Any, *, is_training: bool) -> Iterator[None]:
    """Freeze the base, and multiply by all experts at once, which needs no values."""
    modes = {module: module.training for module in model.modules()}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = getattr(model, "config", None)
    implementation = getattr(config, "_experts_implementation", None)
    try:
        model.train(is_training)
        model.requires_grad_(False)
        if implementation is not None:
            model.set_experts_implementation("batched_mm")
        yield
    finally:
        if implementation is not None:
            model.set_experts_implementation(implementation)
        for parameter in learned:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
