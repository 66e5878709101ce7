"""One training step on tensors without numbers: the memory that the model's own code would take."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.training.head import is_plain_head, select_head_input, sum_head_losses
from wegeft_cli.training.precision import autocast
from wegeft_cli.workflows.build import enable_checkpointing, inject_adapter
from wegeft_cli.workflows.class_rehearsal import (
    compute_class_loss,
    count_class_flops,
    find_head,
)
from wegeft_cli.workflows.ledger import Ledger

# Without numbers transformers cannot see that no mask is needed, and makes one. It makes none for a
# kernel that it has no mask for: the same kernel under a name of our own.
_UNMASKED = "sdpa_without_mask"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)


@dataclass(frozen=True)
class BatchShape:
    """The shape of one forward pass.

    Args:
        num_sequences: Rows or packs.
        length: Positions of each, padding counted.
        num_labels: Positions whose loss is computed, at least 1.
        is_masked: Whether an attention mask is needed: rows of unequal length, or packed ones.
    """

    num_sequences: int
    length: int
    num_labels: int
    is_masked: bool

    @property
    def num_positions(self) -> int:
        """Positions of all sequences."""
        return self.num_sequences * self.length


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


def rehearse_step(model: Any, recipe: Recipe, shape: BatchShape) -> StepMemory:
    """Run one training step on tensors that have shapes and no numbers, and count their bytes.

    The model's own code runs, with the recipe's adapter, types, attention and checkpointing, so the
    count holds for any architecture and method that runs without looking at numbers. Attention
    kernels are the CPU's; a flash kernel of a GPU keeps the same tensors. Where all decoder layers
    are alike, one and two of them are run and the rest is counted from the difference.

    Args:
        model: The model without weights, as `prepare_skeleton` gives it; it is left as it was.
        recipe: The recipe.
        shape: The batch.

    Returns:
        Bytes.

    Raises:
        RuntimeError: If the model cannot be run without numbers; its message tells why.
    """
    with _without_numbers(model, recipe, shape):
        memory = _rehearse(model, recipe, shape)
        if recipe.train.gradient_checkpointing:
            model.activation_checkpointing_disable()
            whole = _rehearse(model, recipe, shape)
            enable_checkpointing(model)
            memory = replace(memory, blocks=whole.blocks)
    return memory


@contextmanager
def _without_numbers(model: Any, recipe: Recipe, shape: BatchShape) -> Iterator[None]:
    """Hold off a mask that is not needed and torch's log, and tell what the model's code raises."""
    # torch logs what it then raises.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    is_sdpa = model.config._attn_implementation == "sdpa"
    is_unmasked = recipe.task == "causal_lm" and not shape.is_masked and is_sdpa
    try:
        if is_unmasked:
            model.set_attn_implementation(_UNMASKED)
        yield
    except Exception as error:  # whatever the code of a model raises without numbers
        reason = str(error).strip().splitlines()
        told = reason[0] if reason else type(error).__name__
        raise RuntimeError(f"the model does not run without numbers: {told}") from error
    finally:
        if is_unmasked:
            model.set_attn_implementation("sdpa")
        logger.setLevel(level)


def _rehearse(model: Any, recipe: Recipe, shape: BatchShape) -> StepMemory:
    if recipe.task == "image_classification":
        return _measure(model, recipe, shape)  # small, and not always of equal blocks
    parent, name = _find_layers(model)
    layers = getattr(parent, name)
    if len(layers) <= 2 or len({_signature(x, i, model) for i, x in enumerate(layers)}) > 1:
        return _measure(model, recipe, shape)
    try:
        setattr(parent, name, layers[:1])
        one = _measure(model, recipe, shape)
        setattr(parent, name, layers[:2])
        two = _measure(model, recipe, shape)
    finally:
        setattr(parent, name, layers)
    further = len(layers) - 2
    return replace(
        two,
        activations=two.activations + further * (two.activations - one.activations),
        blocks=two.blocks + further * (two.blocks - one.blocks),
    )


def rehearse_validation(model: Any, recipe: Recipe, shape: BatchShape) -> int:
    """Run one forward pass that learns nothing, on tensors that have shapes and no numbers.

    No layer keeps anything for a backward pass, so two layers take as much as all.

    Args:
        model: The model without weights, as `prepare_skeleton` gives it; it is left as it was.
        recipe: The recipe.
        shape: The batch.

    Returns:
        The most bytes beside the parameters.

    Raises:
        RuntimeError: If the model cannot be run without numbers; its message tells why.
    """
    with _without_numbers(model, recipe, shape):
        if recipe.task == "image_classification":
            return _measure_validation(model, recipe, shape)  # as a step: blocks are not alike
        try:
            parent, name = _find_layers(model)
        except LookupError:
            return _measure_validation(model, recipe, shape)
        layers = getattr(parent, name)
        try:
            setattr(parent, name, layers[:2])
            return _measure_validation(model, recipe, shape)
        finally:
            setattr(parent, name, layers)


def _measure_validation(model: Any, recipe: Recipe, shape: BatchShape) -> int:
    with FakeTensorMode(), _with_fakes(model, find_dtype(recipe, model)), torch.no_grad():
        head, is_plain = _find_head(model, recipe)
        with (
            Ledger([*model.parameters(), *model.buffers()]) as ledger,
            autocast("cpu", recipe.train.mixed_precision),
        ):
            _compute_loss(model, head, recipe, shape, is_plain)
    return ledger.peak


def rehearse_flops(model: Any, recipe: Recipe, shape: BatchShape) -> float:
    """Count the operations of a classifier's forward and backward pass.

    Args:
        model: The model without weights, as `prepare_skeleton` gives it; it is left as it was.
        recipe: The recipe.
        shape: The batch.

    Returns:
        Operations, a multiply-add being two.

    Raises:
        LookupError: If the model does not run without numbers.
    """
    with FakeTensorMode(), _with_fakes(model, find_dtype(recipe, model)):
        return count_class_flops(model, recipe, shape)


def prepare_skeleton(skeleton: nn.Module, recipe: Recipe) -> Any:
    """Give a copy of the base without weights as it will be trained: adapter, checkpointing.

    Args:
        skeleton: The base on the meta device.
        recipe: The recipe.

    Returns:
        The copy in training mode, still on the meta device.
    """
    section = recipe.adapter
    model: Any = copy.deepcopy(skeleton)
    if recipe.model.attn_implementation == "eager":
        model.set_attn_implementation("eager")
    if section.type == "wegeft" and section.dropout > 0:
        # Dropout on the weight draws a number for its seed; the view that it needs is what counts.
        section = replace(section, dropout=0.0, view="weight")
    inject_adapter(model, replace(recipe, adapter=section))
    if recipe.train.gradient_checkpointing:
        enable_checkpointing(model)
    return model.train()


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


def _measure(model: Any, recipe: Recipe, shape: BatchShape) -> StepMemory:
    """Run forward and backward and count."""
    at_head: list[tuple[int, int]] = []
    with FakeTensorMode(), _with_fakes(model, find_dtype(recipe, model)):
        head, is_plain = _find_head(model, recipe)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        with Ledger([*model.parameters(), *model.buffers(), *grads]) as ledger:
            handle = head.register_forward_pre_hook(
                lambda *_: at_head.append((ledger.live, ledger.blocks))
            )
            with autocast("cpu", recipe.train.mixed_precision):
                loss = _compute_loss(model, head, recipe, shape, is_plain)
            handle.remove()
            top = ledger.peak
            loss.backward()
    activations, blocks = at_head[0]
    return StepMemory(
        activations=activations,
        logits=max(0, top - activations),
        backward=max(0, ledger.peak - max(top, activations)),
        blocks=blocks,
    )


def _find_head(model: Any, recipe: Recipe) -> tuple[nn.Module, bool]:
    """The head, and whether it is plain: one linear whose output are the model's logits."""
    if recipe.task != "causal_lm":
        return find_head(model), False
    head = model.get_output_embeddings()
    return head, is_plain_head(head) and _gives_plain_logits(model, head)


def _compute_loss(
    model: Any, head: Any, recipe: Recipe, shape: BatchShape, is_plain: bool
) -> Tensor:
    """The loss as `CausalLoss` computes it, without what it finds out from numbers."""
    if recipe.task != "causal_lm":
        return compute_class_loss(model, recipe, shape)
    size = (shape.num_sequences, shape.length)
    ids = torch.zeros(size, dtype=torch.int64)
    positions = torch.arange(shape.num_labels)
    targets = torch.zeros(shape.num_labels, dtype=torch.int64)
    extra: dict[str, Tensor] = {}
    if shape.is_masked and recipe.data.packing == "none":
        extra["attention_mask"] = torch.ones(size, dtype=torch.int64)
    if shape.is_masked:
        extra["position_ids"] = torch.zeros(size, dtype=torch.int64)
    with select_head_input(head, positions, keep_back=is_plain) as chosen:
        logits = model(input_ids=ids, use_cache=False, **extra).logits
    if is_plain:
        del logits
        return sum_head_losses(chosen[0], head, targets)
    return nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum")


def _gives_plain_logits(model: Any, head: nn.Module) -> bool:
    """Tell whether the model hands on what its head gives, rather than scaling or capping it."""
    given: list[int] = []
    handle = head.register_forward_hook(
        lambda module, args, output: given.append(output.untyped_storage()._cdata)
    )
    with torch.no_grad():
        token = torch.zeros((1, 1), dtype=torch.int64)
        logits = model(input_ids=token, use_cache=False).logits
    handle.remove()
    return given == [logits.untyped_storage()._cdata]


@contextmanager
def _with_fakes(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Put tensors without numbers in the place of the meta ones, the frozen ones in `dtype`."""
    fakes: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fakes[id(tensor)] = _make_fake(tensor, dtype)
                before.append((slots, name, tensor))
                slots[name] = fakes[id(tensor)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for slots, name, tensor in before:
            slots[name] = tensor


def _make_fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    is_base = tensor.is_floating_point() and not tensor.requires_grad
    fake = torch.empty(tensor.shape, dtype=dtype if is_base else tensor.dtype)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad)


def find_dtype(recipe: Recipe, skeleton: nn.Module) -> torch.dtype:
    """Give the type of the base's weights: the recipe's, or the one that its config declares."""
    if recipe.model.dtype != "auto":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[recipe.model.dtype]
    declared = getattr(skeleton.config, "dtype", None)
    return declared if isinstance(declared, torch.dtype) else torch.float32
