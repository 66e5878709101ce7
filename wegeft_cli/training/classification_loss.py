"""Classification in the training loop: a batch, its summed loss, and what the model answered."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wegeft_cli.data.batches.base import ClassBatch


@dataclass
class Answers:
    """What a model answered.

    Args:
        rows: Numbers of the rows.
        logits: `[classes]` of each, float32 on the CPU; of a regression `[1]`.
        labels: The right ones.
    """

    rows: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)


class ClassLoss:
    """Cross-entropy of the class, or squared error of the number, summed over the rows of a batch.

    In eval mode the answers are kept, so that one pass over validation rows gives their loss and
    every metric.

    Args:
        is_regression: Whether labels are numbers.
    """

    def __init__(self, *, is_regression: bool) -> None:
        self._is_regression = is_regression
        self._answers = Answers()

    def __call__(self, model: nn.Module, batch: ClassBatch) -> Tensor:
        """Give the summed loss of the batch, a scalar of float32, or float64 in such a model.

        Args:
            model: A classifier of transformers, or one that wraps it.
            batch: On the model's device.

        Returns:
            The sum, not the mean, over the rows.
        """
        logits: Tensor = model(**batch.inputs).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if model.training:
            self._answers = Answers()  # of a validation that was left
        else:
            self._answers.rows += batch.rows
            self._answers.logits += logits.detach().float().cpu().unbind()
            self._answers.labels += batch.labels.tolist()
        if self._is_regression:
            target = batch.labels.to(logits.dtype)
            return nn.functional.mse_loss(logits.squeeze(-1), target, reduction="sum")
        return nn.functional.cross_entropy(logits, batch.labels, reduction="sum")

    def take_answers(self) -> Answers:
        """Give the answers since the last call, in the order in which they came."""
        answers, self._answers = self._answers, Answers()
        return answers
