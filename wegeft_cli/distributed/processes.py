"""The processes of one command: who this one is, and the collective operations over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from wegeft_cli.distributed.launch import is_in_group

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

EVALUATION_TIMEOUT = timedelta(days=2)
"""How long a process of an evaluation waits: another one may have far longer answers to write."""


@dataclass(frozen=True)
class Processes:
    """This process among the processes of a command.

    Every process must make each collective call (`broadcast`, `gather`, `merge`, `any`, `sum`,
    `wait`), in the same order. With one process they return their arguments.

    Args:
        rank: Number of this process, from 0.
        count: Number of processes.
        device: Device of this process.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def single(cls) -> Processes:
        """Return the only process of a command, on the default device."""
        import torch

        # Before torch 2.7, asking for the accelerator of a machine without one is an error.
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return cls(0, 1, found or torch.device("cpu"))

    @classmethod
    def join(cls, timeout: timedelta) -> Processes:
        """Join the process group that a launcher has set up in the environment, if any.

        `timeout` limits how long a process waits for the others in a collective operation.
        """
        import torch
        from accelerate import PartialState

        # Without `cpu`, Accelerate takes each of several CPU processes for a run of its own.
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timeout)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages for all."""
        return self.rank == 0

    @property
    def local(self) -> bool:
        """Whether this is the only process."""
        return self.count == 1

    def shard(self, items: Sequence[T]) -> list[T]:
        """Return every `count`-th item, from `rank` on; sorted items are shared evenly."""
        return list(items[self.rank :: self.count])

    def broadcast(self, value: T) -> T:
        """Return the value of the first process, after all processes have made this call."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        values = [value] * self.count
        if not self.local:
            import torch

            torch.distributed.all_gather_object(values, value)
        return values

    def merge(self, own: Mapping[int, T]) -> dict[int, T]:
        """Return the union of all processes' mappings, sorted by key.

        Raise RuntimeError if two processes have the same key.
        """
        parts = self.gather(dict(own))
        union = {key: value for part in parts for key, value in part.items()}
        if len(union) != sum(len(part) for part in parts):
            num_doubled = sum(len(part) for part in parts) - len(union)
            raise RuntimeError(f"{num_doubled} rows were answered by two processes")
        return dict(sorted(union.items()))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process."""
        return self.sum(float(flag))[0] > 0

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes, in float64."""
        if self.local:
            return list(values)
        import torch

        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(totals)
        sums: list[float] = totals.tolist()
        return sums

    def wait(self) -> None:
        """Return after all processes have made this call."""
        self.gather(None)

    def leave(self) -> None:
        """End the process group after all processes have made this call.

        A process that leaves earlier takes the others down.
        """
        if not self.local:
            from accelerate import PartialState

            self.wait()
            PartialState().destroy_process_group()


def evaluation_processes() -> Processes:
    """Return the processes that share an evaluation, by the group that a launcher started."""
    return Processes.join(EVALUATION_TIMEOUT) if is_in_group() else Processes.single()
