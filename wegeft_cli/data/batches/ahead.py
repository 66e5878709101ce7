"""The next step's rows or batches, made by a thread while the current step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class StepAhead(Generic[T]):
    """What `make` returns for each step, made one step ahead by a thread.

    An error of the thread is raised by `take` of the step that it belongs to. Only one call of
    `make` runs at a time, and none runs for a step that was not announced.

    Args:
        make: Makes what a step needs.
        num_steps: Steps of the run; nothing is made for a later one.
    """

    def __init__(self, make: Callable[[int], T], num_steps: int) -> None:
        self._make = make
        self._num_steps = num_steps
        self._pending: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """Return what a step needs, and begin to make what the next one needs."""
        if self._pending is None or self._pending[0] != step:
            self.forget()
            self._pending = (step, self._start(step))
        made = self._pending[1].result()
        following = step + 1
        if following < self._num_steps:
            self._pending = (following, self._start(following))
        return made

    def _start(self, step: int) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(self._make(step))
            except BaseException as error:  # raised by `take` of this step
                future.set_exception(error)

        # A daemon thread: a process that ends does not wait for a slow source.
        Thread(target=run, name="next-step", daemon=True).start()
        return future

    def forget(self) -> None:
        """Wait for the thread and discard what it made."""
        if self._pending is not None:
            self._pending[1].exception()
        self._pending = None


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; to a GPU without waiting, if the tensor is in pinned memory."""
    return tensor.to(device, non_blocking=device.type == "cuda")
