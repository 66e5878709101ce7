"""The processes of an evaluation share its rows; each row is answered by exactly one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from wegeft_cli.distributed.launch import is_in_group

T = TypeVar("T")

_PATIENCE = timedelta(days=2)
"""One process may have far longer answers to write than another."""


@dataclass(frozen=True)
class Share:
    """One process's part of the work; the plain one is all of it.

    Args:
        index: This process's number, from 0.
        count: How many there are.
        gather_lists: Gives every process the lists of all, in the order of the processes.
    """

    index: int = 0
    count: int = 1
    gather_lists: Callable[[list[object]], list[list[object]]] = lambda mine: [mine]

    def deal(self, items: Sequence[T]) -> list[T]:
        """This process's items, dealt out like cards: sorted ones are shared evenly."""
        return list(items[self.index :: self.count])

    def agree(self, value: T) -> T:
        """The first process's value, in every process; none goes on before all have come here."""
        return self.gather_lists([value])[0][0]  # type: ignore[return-value]

    def gather(self, mine: Mapping[int, T]) -> dict[int, T]:
        """What all processes have, by index and in its order; the same in every process.

        Args:
            mine: Index -> what this process made of it.

        Returns:
            The union.

        Raises:
            RuntimeError: If two processes answered the same index.
        """
        pairs = [
            pair
            for part in self.gather_lists(list(mine.items()))
            for pair in part
            if isinstance(pair, tuple)
        ]
        union: dict[int, T] = dict(pairs)
        if len(union) != len(pairs):
            raise RuntimeError(f"{len(pairs) - len(union)} rows were answered by two processes")
        return dict(sorted(union.items()))


def this_share() -> Share:
    """Give this process's share, by the process group that a launcher started."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    if not is_in_group():
        return Share()
    # Without `cpu`, Accelerate takes each of several CPU processes for a run of its own.
    is_cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=is_cpu, timeout=_PATIENCE)
    if state.num_processes == 1:
        return Share()
    return Share(
        state.process_index,
        state.num_processes,
        # gather_object lays lists end to end: one more list keeps those of the processes apart.
        lambda mine: list(gather_object([mine])),
    )


def leave_group(share: Share) -> None:
    """End the process group, once all have come here: one that leaves early takes others down."""
    if share.count > 1:
        from accelerate import PartialState

        share.agree(0)
        PartialState().destroy_process_group()
