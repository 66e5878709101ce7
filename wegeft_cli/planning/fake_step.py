"""One training step on tensors without numbers: the memory that the model's own code would take."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, pytorch_utils

from wegeft_cli.data.batches.base import BatchShape
from wegeft_cli.models.attention.flat_layers import FlatLayers
from wegeft_cli.models.attention.row_attention import (
    Rows,
    attend,
    current_rows,
    separate_padded_rows,
    separate_rows,
)
from wegeft_cli.models.kernels import disable_checkpointing, enable_checkpointing
from wegeft_cli.models.loading import find_dtype
from wegeft_cli.recipe.schema import AdapterSection, Recipe
from wegeft_cli.tasks.registry import adapter_section, find_task, inject_adapter
from wegeft_cli.training.forward_context import autocast

GROUPED_PRODUCT: Any = getattr(torch.ops.aten, "_grouped_mm", None)
"""torch's product of experts, which old versions do not have."""

# Without numbers transformers cannot see that no mask is needed, and makes one. It makes none for a
# kernel that it has no mask for: the same kernel under a name of our own.
_UNMASKED = "sdpa_without_mask"


def _attend_unmasked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend without a mask, row by row within `separate_rows`."""
    lengths = current_rows()
    rows = None
    if lengths is not None and query.shape[2] == sum(lengths):
        rows = Rows(lengths)
    return attend(module, query, key, value, rows, **kwargs)


AttentionInterface.register(_UNMASKED, _attend_unmasked)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one forward and backward pass takes beside parameters, gradients and moments.

    Args:
        activations: What autograd keeps when the forward pass reaches the output head.
        logits: What the head and the loss take beyond that, at most.
        backward: What the backward pass takes beyond both, at most.
        blocks: What the layers keep, or with checkpointing would keep without it, in blocks below
            `HEAP_BLOCK_BYTES`.
    """

    activations: int
    logits: int
    backward: int
    blocks: int


def trace_step(model: Any, recipe: Recipe, shape: BatchShape) -> StepMemory:
    """Run one training step on tensors that have shapes and no numbers, and count their bytes.

    The model's own code runs, with the recipe's adapter, types, attention and checkpointing, so the
    count holds for any architecture and method that runs without looking at numbers. Attention
    kernels are the CPU's; a flash kernel of a GPU keeps the same tensors. Where all decoder layers
    are alike, one and two of them are run and the rest is counted from the difference.

    Raises:
        RuntimeError: If the model cannot be run without numbers; its message has the reason.
    """
    try:
        memory = _trace(model, recipe, shape)
        if recipe.train.gradient_checkpointing:
            disable_checkpointing(model)
            whole = _trace(model, recipe, shape)
            enable_checkpointing(model)
            memory = replace(memory, blocks=whole.blocks)
    except LookupError as error:
        raise RuntimeError(f"the model does not run without numbers: {error}") from error
    return memory


@contextmanager
def without_values(model: Any, recipe: Recipe, *, is_masked: bool) -> Iterator[None]:
    """Run the body's forward passes on fake tensors in the place of the model's parameters.

    Raises:
        RuntimeError: If the model cannot run without values; its message has the reason.
    """
    # torch logs what it then raises.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    is_sdpa = model.config._attn_implementation == "sdpa"
    is_unmasked = find_task(recipe.task).generates_text and not is_masked and is_sdpa
    try:
        if is_unmasked:
            model.set_attn_implementation(_UNMASKED)
        with (
            FakeTensorMode(),
            _GroupedProducts(),
            _with_fakes(model, find_dtype(recipe.model, model.config)),
        ):
            yield
    except Exception as error:  # any error of a model's code without values
        reason = str(error).strip().splitlines()
        why = reason[0] if reason else type(error).__name__
        raise RuntimeError(f"the model does not run without numbers: {why}") from error
    finally:
        if is_unmasked:
            model.set_attn_implementation("sdpa")
        logger.setLevel(level)


@contextmanager
def num_layers(model: Any, count: int) -> Iterator[nn.ModuleList]:
    """Cut the model to its first layers within the body, which receives them."""
    parent, name = _find_layers(model)
    layers = getattr(parent, name)
    setattr(parent, name, layers[:count])
    try:
        yield getattr(parent, name)
    finally:
        setattr(parent, name, layers)


def count_equal_layers(model: Any, recipe: Recipe) -> int:
    """Return the number of a model's layers if all are alike and more than two, else 0."""
    if find_task(recipe.task).reads_images:
        return 0  # small models, and not always of equal blocks
    parent, name = _find_layers(model)
    layers = getattr(parent, name)
    if len(layers) <= 2 or len({_signature(x, i, model) for i, x in enumerate(layers)}) > 1:
        return 0
    return len(layers)


def _trace(model: Any, recipe: Recipe, shape: BatchShape) -> StepMemory:
    count = count_equal_layers(model, recipe)
    if not count:
        return _measure(model, recipe, shape)
    with num_layers(model, 1) as layers:
        one = _measure(model, recipe, shape, layers)
    with num_layers(model, 2) as layers:
        two = _measure(model, recipe, shape, layers)
    return replace(
        two,
        activations=two.activations + (count - 2) * (two.activations - one.activations),
        blocks=two.blocks + (count - 2) * (two.blocks - one.blocks),
    )


def trace_validation(model: Any, recipe: Recipe, shape: BatchShape) -> tuple[int, int]:
    """Return the most bytes beside the parameters that one forward pass without gradients takes.

    The second number counts those of them in blocks below `HEAP_BLOCK_BYTES`. No layer keeps
    anything for a backward pass, so two layers take as much as all. The model is what
    `skeleton_with_adapter` returns and is left as it was.

    Raises:
        RuntimeError: If the model cannot run without values; its message has the reason.
    """
    try:
        cut = nullcontext() if find_task(recipe.task).reads_images else num_layers(model, 2)
        with cut as layers:
            return _measure_validation(model, recipe, shape, layers)
    except LookupError:
        return _measure_validation(model, recipe, shape)


def _measure_validation(
    model: Any, recipe: Recipe, shape: BatchShape, layers: nn.ModuleList | None = None
) -> tuple[int, int]:
    rows = _rows_apart(model, recipe, shape, layers)
    with without_values(model, recipe, is_masked=shape.is_masked), rows, torch.no_grad():
        fake = find_task(recipe.task).fake_pass(model, recipe)
        with (
            MemoryTracker([*model.parameters(), *model.buffers()]) as tracker,
            autocast("cpu", recipe.train.mixed_precision),
        ):
            fake.loss(shape)
    return tracker.peak, tracker.blocks_at_peak


def skeleton_with_adapter(
    skeleton: nn.Module, recipe: Recipe, section: AdapterSection | None = None
) -> Any:
    """Return a copy of the base without weights as it will be trained: adapter, checkpointing.

    `section` replaces the recipe's `adapter`, see `settle_targets`.
    """
    if section is None:
        section, _ = adapter_section(recipe, skeleton)
    model: Any = copy.deepcopy(skeleton)
    if recipe.model.attn_implementation == "eager":
        model.set_attn_implementation("eager")
    if section.dropout > 0:
        # Dropout on the weight draws a number for its seed; the view that it needs is what counts.
        section = replace(section, dropout=0.0, view="weight")
    inject_adapter(model, recipe, section)
    if recipe.train.gradient_checkpointing:
        enable_checkpointing(model)
    return model.train()


def find_layers(model: nn.Module) -> str:
    """Return the full name of the list of decoder layers.

    Raises:
        LookupError: If they are not in one list.
    """
    parent, name = _find_layers(model)
    owner = next(path for path, module in model.named_modules() if module is parent)
    return f"{owner}.{name}" if owner else name


def _find_layers(model: nn.Module) -> tuple[nn.Module, str]:
    """Find where the decoder layers are: (owner, attribute)."""
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)  # type: ignore[union-attr, operator]
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return module, name
    raise LookupError("its decoder layers are not in one list")


def _signature(layer: nn.Module, index: int, model: Any) -> Any:
    """What makes two layers take as much memory: tensors, hooks, and the kind of attention."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    return (
        type(layer),
        kinds[index] if kinds else None,
        tuple((n, tuple(p.shape), p.requires_grad) for n, p in layer.named_parameters()),
        tuple((n, len(m._forward_hooks)) for n, m in layer.named_modules() if m._forward_hooks),
    )


def _measure(
    model: Any, recipe: Recipe, shape: BatchShape, layers: nn.ModuleList | None = None
) -> StepMemory:
    """Run forward and backward and count."""
    at_head: list[tuple[int, int]] = []
    # Around the backward pass too, in which checkpointed layers run again.
    rows = _rows_apart(model, recipe, shape, layers)
    with without_values(model, recipe, is_masked=shape.is_masked), rows:
        fake = find_task(recipe.task).fake_pass(model, recipe)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        with MemoryTracker([*model.parameters(), *model.buffers(), *grads]) as tracker:
            handle = fake.head.register_forward_pre_hook(
                lambda *_: at_head.append((tracker.live, tracker.blocks))
            )
            with autocast("cpu", recipe.train.mixed_precision):
                loss = fake.loss(shape)
            handle.remove()
            top = tracker.peak
            loss.backward()
    activations, blocks = at_head[0]
    return StepMemory(
        activations=activations,
        logits=max(0, top - activations),
        backward=max(0, tracker.peak - max(top, activations)),
        blocks=blocks,
    )


@contextmanager
def _rows_apart(
    model: nn.Module, recipe: Recipe, shape: BatchShape, layers: nn.ModuleList | None
) -> Iterator[None]:
    """Lay rows end to end in the forward passes of the body, as the task does in training.

    `layers` are those of a model that is cut.
    """
    if shape.row_lengths is None or find_task(recipe.task).generates_text:
        with separate_rows(shape.row_lengths):
            yield
        return
    flat = FlatLayers(model, layers)
    try:
        with separate_padded_rows(shape.row_lengths):
            yield
    finally:
        flat.remove()


@contextmanager
def _with_fakes(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Put tensors without numbers in the place of the meta ones, the frozen ones in `dtype`."""
    fakes: dict[int, Tensor] = {}
    # A forward pass may also keep tensors in attributes of its own.
    before = [
        (slots, dict(slots))
        for module in model.modules()
        for slots in (vars(module), module._parameters, module._buffers)
    ]
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fakes[id(tensor)] = _make_fake(tensor, dtype)
                slots[name] = fakes[id(tensor)]  # type: ignore[assignment]
    try:
        with _without_caches():
            yield
    finally:
        for slots, values in before:
            slots.clear()
            slots.update(values)


@contextmanager
def _without_caches() -> Iterator[None]:
    """Switch off the caches of transformers' methods, which would keep tensors without numbers.

    BEiT and DINOv3 keep their positions there; the only switch is that of a running compiler.
    """
    library: Any = pytorch_utils
    is_compiling = library.is_torchdynamo_compiling
    library.is_torchdynamo_compiling = lambda: True
    try:
        yield
    finally:
        library.is_torchdynamo_compiling = is_compiling


def _make_fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    is_base = tensor.is_floating_point() and not tensor.requires_grad
    fake = torch.empty(tensor.shape, dtype=dtype if is_base else tensor.dtype)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad)


class _GroupedProducts(TorchDispatchMode):
    """Gives the products of experts a result in every type; torch's rule for it knows bfloat16.

    A product of all rows by the experts chosen for them has one shape, however they are chosen.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if GROUPED_PRODUCT is None or func is not GROUPED_PRODUCT.default:
            return func(*args, **(kwargs or {}))
        return args[0].new_empty(grouped_shape(*args[:3], **(kwargs or {})))


def grouped_shape(left: Any, right: Any, offs: Any = None, **rest: Any) -> list[int]:
    """Return the shape of `torch._grouped_mm`'s result; two matrices are cut along their sum."""
    groups = offs.shape[:1] if left.ndim == right.ndim else ()
    return [*groups, left.shape[-2], right.shape[-1]]


HEAP_BLOCK_BYTES = 32 * 2**20
"""glibc serves blocks up to this size from its heap, larger ones by pages of their own."""


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and remembers the most.

    Args:
        ignored: Tensors that are counted elsewhere.
    """

    def __init__(self, ignored: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.blocks = self.blocks_at_peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        in_block = size if size < HEAP_BLOCK_BYTES else 0
        self.live += size
        self.blocks += in_block
        if self.live > self.peak:
            self.peak, self.blocks_at_peak = self.live, self.blocks
        weakref.finalize(storage, self._drop, key, size, in_block)

    def _drop(self, key: int, size: int, in_block: int) -> None:
        self._known.discard(key)
        self.live -= size
        self.blocks -= in_block
