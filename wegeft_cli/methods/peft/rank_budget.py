"""AdaLoRA while it trains: PEFT's allocator takes ranks away, the loss keeps factors orthogonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError

_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class RankBudget:
    """PEFT's allocator of ranks, called once after each step, and what it must remember.

    A layer's change is `B diag(E) A`; from `tinit` on entries of E are set to 0, the least
    important of all layers first, until `adapter.r` are left of a layer on average. Importance is
    a moving average of |weight x gradient|, of summed gradients: every process finds the same.

    Args:
        model: The PEFT model of AdaLoRA, which is changed.
        num_steps: Optimizer steps of the run.
    """

    def __init__(self, model: Any, num_steps: int) -> None:
        self._tuner = model.base_model
        self._name = self._tuner.trainable_adapter_name
        self._config = model.peft_config[self._name]
        self._config.total_step = num_steps
        self._allocator = self._tuner.rankallocator

    def after_step(self, step: int) -> None:
        """Score every rank, and take away what this step's budget has no room for."""
        for name, parameter in self._tuner.model.named_parameters():
            if "lora_" in name and parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # a layer that no row came through
        last = self._config.total_step - self._config.tfinal
        if not self.is_final and step >= last:
            step = last  # the step itself may have been one that was skipped
            if not self._allocator.ipt:
                self._allocator.update_ipt(self._tuner.model)
        self._tuner.update_and_allocate(step)
        if step < last:
            # Between two cuts a rank can grow again: PEFT would save the adapter without it.
            self._config.rank_pattern = None

    def finish(self) -> None:
        """Choose the ranks for good where the step that was to do so was skipped."""
        if not self.is_final and self._allocator.ipt:
            self._tuner.update_and_allocate(self._config.total_step - self._config.tfinal)

    @property
    def is_final(self) -> bool:
        """Whether the ranks are chosen for good."""
        return self._config.rank_pattern is not None

    def count_ranks(self) -> int:
        """Count the ranks that are left, of all layers together."""
        named = self._tuner.model.named_parameters()
        return sum(int(p.count_nonzero()) for name, p in named if f"lora_E.{self._name}" in name)

    def tensors(self) -> dict[str, Tensor]:
        """Return the moving averages: none before the first step and after the last cut."""
        return {
            f"{kind}/{name}": tensor
            for kind in _AVERAGES
            for name, tensor in getattr(self._allocator, kind).items()
        }

    def values(self) -> dict[str, Any]:
        """Return the rest of the state, a JSON object."""
        return {"total_step": self._config.total_step, "rank_pattern": self._config.rank_pattern}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Put a saved state back.

        Raises:
            UserError: If the state is of a run with another number of steps.
        """
        if values["total_step"] != self._config.total_step:
            raise UserError(
                f"AdaLoRA's ranks were taken away over {values['total_step']} steps, and the run "
                f"has {self._config.total_step} now",
                key="--resume",
                hint="keep the steps, or begin a new run",
            )
        self._config.rank_pattern = values["rank_pattern"]
        self._allocator.reset_ipt()
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            parameter = self._tuner.model.get_parameter(name)
            getattr(self._allocator, kind)[name] = tensor.to(parameter.device)
            self._allocator.ipt[name] = torch.zeros_like(parameter)


def keep_ranks(model: Any, values: dict[str, Any]) -> None:
    """Let an adapter be saved with the ranks that it had at an earlier step."""
    model.peft_config[model.base_model.trainable_adapter_name].rank_pattern = values["rank_pattern"]


class OrthogonalLoss:
    """A loss and AdaLoRA's regularisation, once a step, in training alone.

    A step's loss becomes `sum / labels + weight x mean ||P^T P - I||`, the mean over all factors:
    each batch adds the second term times its own labels.

    Args:
        loss: (model, batch) -> summed loss of the batch.
    """

    def __init__(self, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        self._loss = loss

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Return the summed loss of the batch with its share of the regularisation.

        Args:
            batch: With `num_label_tokens`.
        """
        summed = self._loss(model, batch)
        if not model.training or batch.num_label_tokens == 0:
            return summed
        return summed + batch.num_label_tokens * regularise(model).to(summed.dtype)


def regularise(model: Any) -> Tensor:
    """Return AdaLoRA's regularisation, as PEFT adds it to a loss that the model itself computes.

    Returns:
        `orth_reg_weight x mean ||A A^T - I||_F, ||B^T B - I||_F` over all layers, in float32.
    """
    name = model.base_model.trainable_adapter_name
    factors = [
        parameter if "lora_A" in key else parameter.T
        for key, parameter in model.base_model.model.named_parameters()
        if f"lora_A.{name}" in key or f"lora_B.{name}" in key
    ]
    with torch.autocast(factors[0].device.type, enabled=False):
        norms = [
            torch.linalg.matrix_norm(factor @ factor.T - torch.eye(len(factor)).to(factor))
            for factor in factors
        ]
    weight: float = model.peft_config[name].orth_reg_weight
    return weight * torch.stack(norms).mean()
