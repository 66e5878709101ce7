"""One training step on tensors without numbers: the memory that the model's own code would take."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from wegeft_cli.methods.registry import inject_adapter
from wegeft_cli.methods.wegeft.equations import cheaper_view
from wegeft_cli.methods.wegeft.inject import get_generators
from wegeft_cli.methods.wegeft.modules import AdapterGenerators, GeneratorSettings
from wegeft_cli.methods.wegeft.targets import Target, find_linears
from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.models.loading import find_dtype
from wegeft_cli.planning.batch_shapes import BatchShape, PassSurvey
from wegeft_cli.planning.class_fake_step import compute_class_loss, count_class_flops, find_head
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.training.chunked_cross_entropy import (
    is_plain_head,
    select_head_input,
    sum_head_losses,
)
from wegeft_cli.training.mixed_precision import autocast

# Without numbers transformers cannot see that no mask is needed, and makes one. It makes none for a
# kernel that it has no mask for: the same kernel under a name of our own.
_UNMASKED = "sdpa_without_mask"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)


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
    with (
        FakeTensorMode(),
        _with_fakes(model, find_dtype(recipe.model, model.config)),
        torch.no_grad(),
    ):
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
    with FakeTensorMode(), _with_fakes(model, find_dtype(recipe.model, model.config)):
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
    if section.dropout > 0:
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
    with FakeTensorMode(), _with_fakes(model, find_dtype(recipe.model, model.config)):
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


HEAP_BLOCK_BYTES = 32 * 2**20
"""glibc serves blocks up to this size from its heap, larger ones by pages of their own."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and remembers the most.

    Args:
        ignored: Tensors that are counted elsewhere.
    """

    def __init__(self, ignored: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.blocks = 0
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
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size, in_block)

    def _drop(self, key: int, size: int, in_block: int) -> None:
        self._known.discard(key)
        self.live -= size
        self.blocks -= in_block


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class FlopRates:
    """What a forward and backward pass costs; a multiply-add is two operations.

    Args:
        per_position: For each position, padding counted.
        per_square: For each sequence, times the square of its length: attention.
        per_label: For each labelled position: the output head.
        per_pass: For each pass, however long: a view that multiplies the weights themselves.
    """

    per_position: float
    per_square: float
    per_label: float
    per_pass: float

    def count(self, sequences: Any, lengths: Any, labels: Any) -> Any:
        """Count passes of so many sequences of such lengths with so many labels; arrays too."""
        return (
            self.per_position * sequences * lengths
            + self.per_square * sequences * lengths * lengths
            + self.per_label * labels
            + self.per_pass
        )


def find_flop_rates(model: nn.Module, recipe: Recipe, positions_per_pass: float) -> FlopRates:
    """Find the rates of a model that is ready to train; the meta device will do.

    A frozen linear costs its forward product and the one for its input's gradient, one that learns
    also that for its weight. Gradient checkpointing adds the layers' forward pass once more. Norms,
    activations, the optimizer and what a PEFT method does outside of linear layers are left out.

    Args:
        model: The model with its adapter.
        recipe: The recipe.
        positions_per_pass: Positions of a usual pass, by which a generator chooses its view.

    Returns:
        The rates.

    Raises:
        LookupError: If they do not follow from the layers' shapes, with the reason.
    """
    config: Any = model.config
    text = config.get_text_config()
    experts = next((name for name in _EXPERTS if (getattr(text, name, None) or 0) > 1), None)
    if experts is not None:
        raise LookupError("a mixture of experts computes other layers for each token")
    again = 1 if recipe.train.gradient_checkpointing else 0
    per_position, per_label = _count_linears(model, again)
    generated, per_pass = _count_generators(model, positions_per_pass, again)
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        raise LookupError("its layers do not attend, so their cost does not follow from linears")
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    # Forward two products, backward four, and with a fused kernel the scores once more.
    products = 2 + 4 + 2 * again + (recipe.model.attn_implementation != "eager")
    per_square = 2.0 * products * width * text.num_hidden_layers
    return FlopRates(per_position + generated, per_square, per_label, per_pass)


def count_run_flops(rates: FlopRates, survey: PassSurvey) -> tuple[float, float]:
    """Count the operations of a mean optimizer step, over all processes, and of the whole run.

    Args:
        rates: The model's.
        survey: The run's passes.

    Returns:
        Operations per step, and in all.
    """
    counts = rates.count(
        survey.sequences.astype(float), survey.lengths.astype(float), survey.labels.astype(float)
    )
    per_step = float(counts.sum()) / survey.num_steps
    return per_step, per_step * survey.num_steps_in_all


def _count_linears(model: Any, again: int) -> tuple[float, float]:
    """Operations of the base's linears and a PEFT method's: (per position, per label)."""
    generators = get_generators(model)
    saved = generators.saved_of("default") if generators is not None else None
    trained = set(saved.by_name()) if saved is not None else set()
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    per_position = per_label = 0.0
    for name, target in find_linears(model).items():
        if ".original_module" in name:
            continue  # PEFT's untouched copy of a module that is trained whole
        learns = name in trained or model.get_submodule(name).weight.requires_grad
        products = 2 + learns
        size = 2.0 * target.d_in * target.d_out
        if any(name == each or name.startswith(f"{each}.") for each in heads):
            per_label += size * products
        else:
            per_position += size * (products + again)
    return per_position, per_label


def _count_generators(
    model: nn.Module, positions_per_pass: float, again: int
) -> tuple[float, float]:
    """Operations of all edited layers: (per position, per pass)."""
    generators = get_generators(model)
    if generators is None:
        return 0.0, 0.0
    adapter: AdapterGenerators = generators["default"]
    per_position = per_pass = 0.0
    for members in adapter.groups.values():
        for target in members:
            rank = adapter.settings.rank
            if _find_view(adapter.settings, target, positions_per_pass) == "activation":
                width = target.width(adapter.settings.side)
                per_position += 2.0 * 2 * width * rank * (3 + again)
            else:
                per_position += 2.0 * (target.d_in + target.d_out) * rank * (3 + again)
                per_pass += 2.0 * target.d_in * target.d_out * rank * (2 + again)
    return per_position, per_pass


def _find_view(settings: GeneratorSettings, target: Target, num_positions: float) -> str:
    """Tell which view a layer takes while training."""
    if settings.dropout > 0:
        return "weight"
    if settings.view != "auto":
        return settings.view
    if target.rows is not None and settings.side == "input":
        return "weight"
    return cheaper_view(target.d_in, target.d_out, max(1, int(num_positions)), settings.side)
