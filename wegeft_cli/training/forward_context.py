"""Contexts of a forward pass: its dtype (autocast), and activations kept in host memory."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LEAST_BYTES = 2**16
"""Size below which a tensor is not worth the transfer."""
_MAX_HELD = 2
"""Activations that are copied to the host while later ones are computed."""


def autocast(device_type: str, mixed_precision: str) -> AbstractContextManager[Any]:
    """Return torch's autocast for bf16 or fp16, disabled for none."""
    dtype = _DTYPES.get(mixed_precision)
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def evaluating(model: nn.Module, mixed_precision: str) -> Iterator[None]:
    """Run the body without gradients, in evaluation mode: dropout has the run's random state."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device.type, mixed_precision):
            yield
    finally:
        model.train(training)


@contextmanager
def offload_activations(model: nn.Module, least_bytes: int = _LEAST_BYTES) -> Iterator[None]:
    """Move the activations that autograd saves in the body to the host until they are needed.

    Unlike with `torch.autograd.graph.save_on_cpu`, the model's parameters are not moved: every
    frozen linear layer saves its weight for the gradient of its input. On CUDA the copies run on a
    stream of their own, beside the computation. Gradients are the same bits with and without it.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in _plain_parameters(model)}
    copies = _Copies()

    def pack(tensor: Tensor) -> Tensor | _Offloaded:
        if (
            type(tensor) is not Tensor
            or tensor.nbytes < least_bytes
            or tensor.untyped_storage().data_ptr() in weights
        ):
            return tensor
        return copies.to_host(tensor)

    def unpack(packed: Tensor | _Offloaded) -> Tensor:
        return packed if isinstance(packed, Tensor) else copies.to_device(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    copies.release(0)


class _Offloaded:
    """A tensor in host memory, the copy on its device that was begun, and the one saved before."""

    def __init__(self, device: torch.device, host: Tensor, before: _Offloaded | None) -> None:
        self.device, self.host = device, host
        self.copy: Tensor | None = None
        self.is_taken = False
        # The graph of autograd owns these objects: they are freed with their part of the graph.
        self._before = None if before is None else weakref.ref(before)

    def __del__(self) -> None:
        """Let the device wait for a copy that no backward pass took, whose memory is freed now."""
        if self.copy is not None:
            stream = _side_stream(self.device)
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def find_before(self) -> _Offloaded | None:
        """Return the last tensor saved before that was not taken; None if there is none."""
        before = None if self._before is None else self._before()
        while before is not None and before.is_taken:
            before = None if before._before is None else before._before()
        return before


class _Copies:
    """Copies of the activations of a forward pass to the host and back.

    All memory of the device belongs to the stream that computes, and that stream waits for a copy
    before the memory may have another use. `record_stream` would leave this to the allocator, which
    takes new memory as long as the host is ahead of the device.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[_Offloaded] | None = None
        self._held: deque[tuple[Tensor, Any]] = deque()

    def to_host(self, tensor: Tensor) -> _Offloaded:
        """Begin to copy a tensor to the host."""
        stream = _side_stream(tensor.device)
        # Keep the strides: a product of a transposed tensor rounds differently.
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        _copy(stream, host, tensor)
        if stream is not None:
            self._held.append((tensor.detach(), stream.record_event()))
            self.release(_MAX_HELD)
        packed = _Offloaded(tensor.device, host, None if self._last is None else self._last())
        self._last = weakref.ref(packed)
        return packed

    def release(self, num_left: int) -> None:
        """Let the device wait for the oldest copies, and free what was copied."""
        while len(self._held) > num_left:
            tensor, copied = self._held.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(copied)

    def to_device(self, packed: _Offloaded) -> Tensor:
        """Return a tensor on its device, and begin to copy the one that is needed next."""
        stream = _side_stream(packed.device)
        if stream is None:
            return packed.host.to(packed.device)
        self._begin(packed, stream)
        copy, packed.copy, packed.is_taken = packed.copy, None, True
        assert copy is not None
        torch.cuda.current_stream(packed.device).wait_stream(stream)
        before = packed.find_before()
        if before is not None and before.device == packed.device:
            self._begin(before, stream)
        return copy

    def _begin(self, packed: _Offloaded, stream: Any) -> None:
        if packed.copy is None:
            packed.copy = torch.empty_like(packed.host, device=packed.device)
            _copy(stream, packed.copy, packed.host)


def _side_stream(device: torch.device) -> Any:
    """Return the stream of a CUDA device's copies; None on other devices, which copy at once."""
    return _make_stream(device) if device.type == "cuda" else None


@functools.cache
def _make_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _copy(stream: Any, target: Tensor, source: Tensor) -> None:
    """Copy a tensor after what the device was given so far, on a stream if there is one."""
    if stream is None:
        target.copy_(source)
        return
    device = target.device if target.is_cuda else source.device
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)


def _plain_parameters(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if type(p) is nn.Parameter]
