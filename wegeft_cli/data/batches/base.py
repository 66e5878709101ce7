"""What the loop asks of the batches, and of the place where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """A batch that knows its size and can move; what else it holds, its loss function knows."""

    @property
    def num_label_tokens(self) -> int:
        """Labels that carry loss."""
        ...

    def to(self, device: torch.device) -> Batch:
        """Give the batch on a device."""
        ...


class StepSource(Protocol):
    """Where the batches come from; nothing here draws from torch's global random state."""

    num_steps: int

    def micro_batches(self, step: int) -> Iterable[Batch]:
        """Give this process's batches of one optimizer step.

        In an epoch's last step a process may get fewer than another, even none: no collective may
        stand between them.
        """
        ...

    def num_label_tokens(self, step: int) -> int:
        """Count the labelled tokens of one optimizer step over all processes."""
        ...

    def num_tokens(self, step: int) -> int:
        """Count the tokens of one optimizer step over all processes, padding excluded."""
        ...

    def epoch_at(self, step: int) -> float:
        """Tell how many passes over the data `step` steps make."""
        ...

    def validation_batches(self) -> Iterable[Batch]:
        """Give this process's share of the validation rows; none where there is no such set."""
        ...

    def state_at(self, step: int) -> dict[str, Any]:
        """Give what `seek` needs to go on from `step`, as a JSON object."""
        ...

    def seek(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on from `step`; called once, before the first step of a resumed run."""
        ...


@dataclass(frozen=True)
class ClassBatch:
    """A batch of rows with one label each.

    Args:
        inputs: What the model's forward takes, by name.
        labels: `[rows]`: class numbers, int64, or of a regression numbers, float32.
        rows: Their numbers in the data set.
        num_tokens: Real tokens, or patches.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    rows: Sequence[int]
    num_tokens: int

    @property
    def num_label_tokens(self) -> int:
        """Labels that carry loss: one a row."""
        return len(self.labels)

    def to(self, device: torch.device) -> ClassBatch:
        """The same batch on a device."""
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        return replace(self, inputs=inputs, labels=self.labels.to(device))
