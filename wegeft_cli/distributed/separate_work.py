"""Work that each process does apart from the others, and errors that reach all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import MachineError, UserError

T = TypeVar("T")

_SECONDS = 0.2
"""Time between two exchanges of the processes."""


class WorkCancelled(Exception):  # noqa: N818 - not an error
    """The work of this process is no longer wanted."""


def raise_together(processes: Processes, work: Callable[[], T]) -> T:
    """Run `work`, and raise on every process what it raises on any; a collective.

    The work may contain collectives if it raises only before the first of them.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    _raise_first(processes, error)
    return result  # type: ignore[return-value]


def run_apart(
    processes: Processes,
    work: Callable[[Callable[[], None]], T],
    check_stop: Callable[[], None] | None = None,
) -> T:
    """Run `work`, which may take longer than the timeout of the process group; a collective.

    The work runs in a thread, while the processes exchange their state a few times per second. An
    exception on one process, or one of `check_stop`, cancels the work of all and is raised on all.
    A single process runs the work itself.

    Args:
        processes: The processes.
        work: Makes no collective call. It gets a function that it calls often, which raises when
            its result is no longer wanted.
        check_stop: A collective that raises on all processes alike.
    """
    if processes.local:
        return work(check_stop or (lambda: None))
    cancelled = threading.Event()
    outcome: Future[T] = Future()

    def check() -> None:
        if cancelled.is_set():
            raise WorkCancelled

    def run() -> None:
        try:
            outcome.set_result(work(check))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    stop: Exception | None = None
    try:
        is_running = True
        while is_running:
            wait([outcome], timeout=_SECONDS)
            running, failed = processes.sum(not outcome.done(), _has_failed(outcome))
            is_running = running > 0
            if failed:
                cancelled.set()
            if check_stop is not None and stop is None:
                try:
                    check_stop()
                except Exception as error:
                    stop = error
                    cancelled.set()
    finally:
        cancelled.set()
    if stop is not None:
        raise stop
    _raise_first(processes, outcome.exception())
    return outcome.result()


def _has_failed(outcome: Future[T]) -> bool:
    return outcome.done() and outcome.exception() is not None


def _raise_first(processes: Processes, error: BaseException | None) -> None:
    """Raise this process's error, else the first one of another process."""
    shared = None if isinstance(error, WorkCancelled) else error
    if not isinstance(shared, UserError | ExceptionGroup | None):
        # Only types of this package are sure to survive the transfer.
        shared = MachineError(f"another process failed: {type(shared).__name__}: {shared}")
    others = [each for each in processes.gather(shared) if each is not None]
    if error is not None and not isinstance(error, WorkCancelled):
        raise error
    if others:
        raise others[0]
