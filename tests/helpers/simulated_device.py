"""A second device that computes in the CPU's memory and refuses to mix its tensors with the CPU's.

`install()` registers the device type `sim` for the whole process; inside `simulated()` tensors are
made on it by `device="sim"` and by `.to("sim")`. What CUDA refuses is refused: an operation on
tensors of both devices (single numbers and indices apart), and memory that numpy would read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
_COPIES = {aten._to_copy.default, aten.copy_.default, aten.set_.source_Tensor}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class SimTensor(torch.Tensor):
    """A tensor on the device, whose values are in `inner`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> SimTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="sim:0",
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        """Return the values; torch forbids it for subclasses."""
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, SimTensor)]
    away = [x for x in tensors if not isinstance(x, SimTensor) and x.dim() > 0]
    if func in _INDEXED:
        away = [x for x in away if not any(x is index for index in args[1])]
    if here and away and func not in _COPIES:
        shapes = [tuple(x.shape) for x in away]
        raise RuntimeError(f"{func}: tensors of the CPU {shapes} meet tensors of the device")
    device = kwargs.get("device")
    asked = None if device is None else torch.device(device).type
    kwargs = {**kwargs, "device": torch.device("cpu")} if asked == "sim" else kwargs
    inner = tree_map(lambda x: x.inner if isinstance(x, SimTensor) else x, (args, kwargs))
    result = func(*inner[0], **inner[1])
    on_device = asked == "sim" or (bool(here) and asked is None)
    if func is aten.copy_.default:
        return args[0]
    olds = {id(x.inner): x for x in here}

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, SimTensor) or not on_device:
            return x
        return olds.get(id(x)) if id(x) in olds else SimTensor(x)

    return tree_map(wrap, result)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Module(_DummyBackendModule):
    def current_device(self) -> int:
        return 0

    def synchronize(self, *_: Any) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def install() -> None:
    """Register the device type; once in a process."""
    generator = torch.Generator
    # Its random numbers are the CPU's.
    torch.Generator = lambda device=None: generator()  # type: ignore[assignment,misc]
    _setup_privateuseone_for_python_backend("sim", backend_module=_Module())


@contextmanager
def simulated() -> Iterator[None]:
    """Make tensors on the device."""
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def move(module: torch.nn.Module) -> None:
    """Move parameters and buffers to the device."""
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for each in module.modules():
        for store in (each._parameters, each._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    new = SimTensor(tensor.detach().clone())
                    new.requires_grad_(tensor.requires_grad)
                    if isinstance(tensor, torch.nn.Parameter):
                        new._is_param = True
                    moved[id(tensor)] = tensor, new
                store[name] = moved[id(tensor)][1]
