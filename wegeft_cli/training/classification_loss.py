"""Loss of a classifier, which keeps the outputs of a validation for its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.data.batches.base import ClassBatch
from wegeft_cli.data.batches.layout import Kind, split_batch
from wegeft_cli.models.attention.row_attention import separate_padded_rows


@dataclass
class ClassifierOutputs:
    """Outputs of a classifier.

    Args:
        rows: Row numbers.
        logits: Logits of each row, `[classes]` (`[1]` for a regression), float32 on the CPU.
        labels: Label of each row.
    """

    rows: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)


class ClassLoss:
    """Cross-entropy of the class, or squared error of a regression, summed over a batch's rows.

    In eval mode the outputs are kept, so that one pass over the validation rows yields their loss
    and all metrics.

    Args:
        is_regression: Whether the labels are numbers.
        layout: The layout of a text classifier's batches; an image classifier has none.
    """

    def __init__(self, *, is_regression: bool, layout: Kind = "right") -> None:
        self._is_regression = is_regression
        self._layout = layout
        self._outputs = ClassifierOutputs()

    def __call__(self, model: nn.Module, batch: ClassBatch) -> Tensor:
        """Return the sum of the loss over the rows, a float32 scalar (float64 in such a model)."""
        logits = compute_class_logits(model, batch.inputs, self._layout, batch.lengths)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if model.training:
            self._outputs = ClassifierOutputs()  # discards those of an interrupted validation
        else:
            self._outputs.rows += batch.rows
            self._outputs.logits += logits.detach().float().cpu().unbind()
            self._outputs.labels += batch.labels.tolist()
        if self._is_regression:
            target = batch.labels.to(logits.dtype)
            return nn.functional.mse_loss(logits.squeeze(-1), target, reduction="sum")
        return nn.functional.cross_entropy(logits, batch.labels, reduction="sum")

    def pop_outputs(self) -> ClassifierOutputs:
        """Return the outputs since the last call, in their order, and forget them."""
        outputs, self._outputs = self._outputs, ClassifierOutputs()
        return outputs


def compute_class_logits(
    model: nn.Module, inputs: Mapping[str, Any], layout: Kind, lengths: tuple[int, ...]
) -> Tensor:
    """Return the logits of a batch's rows, `[rows, classes]`, in one or more forward passes.

    The layout `flat` needs a model with `FlatLayers`.
    """
    if layout == "flat":
        with separate_padded_rows(lengths):
            flat_logits: Tensor = model(**inputs).logits
        return flat_logits
    if layout == "right":
        logits: Tensor = model(**inputs).logits
        return logits
    passes = [(rows, model(**part).logits) for rows, part in split_batch(inputs, layout)]
    order = torch.cat([rows for rows, _ in passes]).argsort()
    return torch.cat([logits for _, logits in passes])[order]
