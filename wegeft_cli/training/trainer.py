"""The training loop. Start reading at `Trainer.fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wegeft_cli.data.batches.ahead import StepAhead
from wegeft_cli.data.batches.base import Batch, BatchSource, PlannedSource
from wegeft_cli.data.batches.lockstep import is_sharded, pad_to_lockstep, seed_forward
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import MachineError
from wegeft_cli.models.device_memory import is_out_of_memory, measure_peak_memory_gib
from wegeft_cli.models.running_statistics import trained_statistics
from wegeft_cli.training.callbacks import Callback
from wegeft_cli.training.ema import ParameterAverage
from wegeft_cli.training.forward_context import autocast, offload_activations
from wegeft_cli.training.gradients import (
    SummedStep,
    clip_gradients,
    is_usable_step,
    read_step,
    sum_gradients,
)
from wegeft_cli.training.loop_settings import LoopResult, LoopSettings
from wegeft_cli.training.metrics import StepMetrics, Stopwatch
from wegeft_cli.training.snapshot import (
    MethodState,
    Progress,
    Snapshot,
    TrainingState,
    check_replicas_equal,
)
from wegeft_cli.training.validation import (
    ValidationStopped,
    check_stop,
    mean_losses,
    measure,
    sum_loss,
    update_best,
)


@dataclass
class Trainer:
    """Trains a model.

    The gradient of a step is that of `sum of the losses of all labeled tokens / their number`, over
    all micro-batches and processes: accumulation and data parallelism are exact for unequal
    lengths. The model is not wrapped. Each process keeps the base, or its share of it, and one
    collective per step sums the gradients of `parameters`, which is correct for parameters that
    layers share.

    A step whose loss or gradient is not finite, or whose gradient is 0 at a loss that is not, is
    skipped: it counts as a step, but changes neither the parameters nor the optimizer, the schedule
    or the average, and its loss enters no mean.

    Args:
        model: The model on its device.
        parameters: The trained parameters by name; the same on every process.
        loss_function: (model, batch) -> summed loss of the batch.
        optimizer: Optimizer of `parameters`; the first group's learning rate is reported.
        scheduler: Learning rate scheduler of the optimizer.
        source: The batches.
        settings: The settings.
        processes: The processes.
        method: What the method does after each step, if anything.
        callbacks: Called in this order at each event.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    loss_function: Callable[[nn.Module, Any], Tensor]
    optimizer: Optimizer
    scheduler: LRScheduler
    source: BatchSource
    settings: LoopSettings
    processes: Processes
    method: MethodState | None = None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.validation: dict[int, dict[str, float]] = {}
        self._scaler = torch.amp.GradScaler(
            self.processes.device.type, enabled=self.settings.mixed_precision == "fp16"
        )
        # The scaler makes its scale at its first use; a pass without memory may fail before that.
        self._scaler.scale(torch.zeros((), device=self.processes.device))
        decay = self.settings.ema_decay
        self._average = None if decay is None else ParameterAverage(self.parameters, decay)
        self._state = TrainingState(
            self.parameters, self.optimizer, self.scheduler, self._scaler, self._average,
            self.method, trained_statistics(self.model),
        )  # fmt: skip
        self._is_sharded = is_sharded(self.model)
        self._saved_step: int | None = None
        self._stop = False
        self._learning_rate = 0.0
        self._stopwatch = Stopwatch()
        self._ahead = None
        if self.processes.device.type == "cuda" and isinstance(self.source, PlannedSource):
            self._ahead = StepAhead(self._make_pinned, self.source.num_steps)

    def fit(self, resume_from: Snapshot | None = None) -> LoopResult:
        """Train to the last step, to the end of the patience, or until a callback asks to stop.

        Raises:
            MachineError: If too many steps had to be skipped, or the processes disagree.
        """
        self.restore(resume_from)
        self.finish_pending_validation()
        self.model.train()
        self._stopwatch.restart()
        while not (self.is_done or self._stop):
            summed = self.forward_backward()
            self._stop = summed.stop
            if summed.is_cut:
                self.leave_step()
                break
            self.update(summed)
            self.log_if_due()
            with self._stopwatch.paused():
                self.validate_and_save_if_due()
        return self.finish()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    @property
    def stopped_early(self) -> bool:
        """Whether the patience ran out."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.progress.num_bad_evals >= patience

    @property
    def is_last_step(self) -> bool:
        """Whether the last step is done."""
        return self.step == self.source.num_steps

    @property
    def is_done(self) -> bool:
        """Whether no step is left to do."""
        return self.stopped_early or self.step >= self.source.num_steps

    def should_stop(self) -> bool:
        """Return whether a callback asks this process to stop."""
        return any(callback.should_stop() for callback in self.callbacks)

    def check_stop(self) -> None:
        """Raise `ValidationStopped` on every process if any was asked to stop; a collective."""
        check_stop(self.should_stop, self.processes)

    def restore(self, snapshot: Snapshot | None) -> None:
        """Restore the state of a run and the position in its data."""
        if snapshot is not None:
            self.progress = self._state.restore(snapshot, self.processes)
            self.source.seek(self.step, snapshot.state.get("source", {}))
            self._saved_step = self.step
        check_replicas_equal(self.step, self.parameters, self.processes)

    def finish_pending_validation(self) -> None:
        """Repeat the validation during which the run was stopped or killed."""
        if self.progress.validation_due:
            self.validate()
            self.save()
        self._stop = self.progress.validation_due

    def forward_backward(self) -> SummedStep:
        """Accumulate a step's gradient, sum it over the processes and clip it.

        Out of memory in a forward pass of several rows repeats the step in smaller passes.
        """
        own_loss_sum = torch.zeros((), device=self.processes.device)
        is_cut, smaller = False, 0
        for number, batch in enumerate(self._micro_batches()):
            is_cut = number > 0 and self._is_stop_requested()
            if is_cut:
                break
            try:
                own_loss_sum += self._run_pass(number, batch)
            except Exception as error:
                smaller = self._find_smaller_passes(error)
                break
        flags = (is_cut or self.should_stop(), is_cut, smaller > 0)
        sums = sum_gradients(self.parameters.values(), own_loss_sum, self.processes, flags=flags)
        self._scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(self.parameters.values(), self.settings.max_grad_norm)
        summed = read_step(sums, grad_norm, flags)
        if summed.is_short and not summed.is_cut:
            self._use_smaller_passes(smaller)
            return self.forward_backward()
        return summed

    def _run_pass(self, number: int, batch: Any) -> Tensor:
        """Add a forward pass to the gradient of the step, and return its summed loss."""
        number_of_all = number * self.processes.count + self.processes.rank
        seed_forward(self.settings.seed, self.step, number_of_all)
        with self._autocast(), self._offload():
            summed = self.loss_function(self.model, batch.to(self.processes.device))
        self._scaler.scale(summed / self.source.num_label_tokens(self.step)).backward()
        return summed.detach()

    def _find_smaller_passes(self, error: Exception) -> int:
        """Return a lower limit for the passes of a step that was out of memory, or raise `error`.

        Processes that share one base wait for each other within a pass and cannot leave it.
        """
        limit = self.source.halve_passes(self.step) if is_out_of_memory(error) else None
        if limit is None or self._is_sharded:
            raise error
        return limit

    def _use_smaller_passes(self, limit: int) -> None:
        """Discard the step's gradient, and limit the passes from now on; a collective."""
        self._scaler.update(self._scaler.get_scale())
        self.optimizer.zero_grad(set_to_none=True)
        if self._ahead is not None:
            self._ahead.forget()
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        limit = min(each for each in self.processes.gather(limit) if each)
        self.source.use_layout(self.source.layout, limit)
        for callback in self.callbacks:
            callback.on_smaller_passes(self, limit)

    def leave_step(self) -> None:
        """Discard an interrupted step: the parameters have not changed, so a resume repeats it."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._saved_step != self.step:
            self.save()

    def update(self, summed: SummedStep) -> None:
        """Apply the step's gradient, or skip the step if `is_usable_step` denies it."""
        step, loss_sum, grad_norm = self.step, summed.loss_sum, summed.grad_norm
        num_labels, num_tokens = self.source.num_label_tokens(step), self.source.num_tokens(step)
        self._learning_rate = float(self.scheduler.get_last_lr()[0])
        self.progress.step += 1
        if is_usable_step(loss_sum, grad_norm, self._scaler):
            self._apply_gradient()
            self.progress.loss_sum += loss_sum
            self.progress.label_tokens += num_labels
            self.progress.grad_norm = grad_norm
            for callback in self.callbacks:
                callback.on_step(self, loss_sum / num_labels)
        else:
            self._skip_step(loss_sum / num_labels, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        if self.method is not None and self.is_last_step:
            self.method.finish()
        if _is_due(self.step, self.settings.check_steps):
            check_replicas_equal(self.step, self.parameters, self.processes)
        self.progress.num_tokens += num_tokens
        self._stopwatch.add_step(num_tokens)

    def log_if_due(self) -> None:
        """Report a line of metrics.

        Not at a stop: the sums of the unfinished line are saved, so that a resumed run writes the
        same lines as a run that was not stopped. And not if all steps since then were skipped.
        """
        progress = self.progress
        is_due = self.is_last_step or _is_due(self.step, self.settings.logging_steps)
        if not (progress.label_tokens and is_due):
            return
        progress.last_loss = progress.loss_sum / progress.label_tokens
        progress.loss_sum, progress.label_tokens = 0.0, 0
        tokens_per_second, step_seconds = self._stopwatch.read()
        metrics = StepMetrics(
            step=self.step,
            epoch=self.source.epoch_at(self.step),
            loss=progress.last_loss,
            learning_rate=self._learning_rate,
            grad_norm=progress.grad_norm,
            num_tokens=progress.num_tokens,
            tokens_per_second=tokens_per_second,
            step_seconds=step_seconds,
            peak_memory_gib=measure_peak_memory_gib(self.processes.device),
        )
        for callback in self.callbacks:
            callback.on_log(self, metrics)
        self._stopwatch.restart()

    def validate_and_save_if_due(self) -> None:
        """Validate and save when it is due, and save at a stop and after the last step."""
        settings, is_last = self.settings, self.is_last_step
        saved = validated = False
        if is_last or _is_due(self.step, settings.eval_steps):
            self.progress.validation_due = True
            if is_last or self._stop or settings.save_before_validation:
                self.save()  # a validation that fails or is killed must not cost the run
                saved = True
            validated = self.validate()
            self._stop = self._stop or self.progress.validation_due
        is_new_best = validated and self.progress.best_step == self.step
        is_due = self._stop or self.is_done or _is_due(self.step, settings.save_steps)
        if (is_due and (validated or not saved)) or (is_new_best and settings.save_best):
            self.save()

    def validate(self) -> bool:
        """Validate, and return whether there are metrics; none if the run was asked to stop."""
        for callback in self.callbacks:
            callback.on_validation_begin(self)
        try:
            metrics = measure(
                self.model, self._validation_losses, self._further_metrics, self._average,
                self.processes,
            )  # fmt: skip
        except ValidationStopped:
            return False
        finally:
            for callback in self.callbacks:
                callback.on_validation_end(self)
        self.progress.validation_due = False
        self._saved_step = None  # a snapshot from before the validation lacks its result
        if not metrics:
            return False
        self.validation[self.step] = metrics
        watched = metrics.get(self.settings.metric_for_best_model)
        update_best(self.progress, watched, self.settings.greater_is_better)
        for callback in self.callbacks:
            callback.on_validated(self, metrics)
        return True

    def save(self) -> None:
        """Let the callbacks store a snapshot of the run."""
        self._saved_step = self.step
        check_replicas_equal(self.step, self.parameters, self.processes)
        source = self.source.state_at(self.step)
        snapshot = self._state.capture(self.progress, self.processes, source)
        for callback in self.callbacks:
            callback.on_save(self, snapshot, self.progress.best_step == self.step)

    def finish(self) -> LoopResult:
        """Put the average into the model, if there is one, and return how the loop ended."""
        if self._average is not None:
            self._average.write()
        progress = self.progress
        loss = progress.last_loss
        if progress.label_tokens:
            loss = progress.loss_sum / progress.label_tokens
        return LoopResult(
            status="finished" if self.is_done and not progress.validation_due else "interrupted",
            num_steps=progress.step,
            final_loss=loss,
            validation=self.validation,
            stopped_early=self.stopped_early,
            best_step=progress.best_step,
            best_metric=progress.best_metric,
            num_skipped=progress.num_skipped,
        )

    def _micro_batches(self) -> Iterable[Batch]:
        batches: Iterable[Batch]
        if self._ahead is None:
            batches = self.source.micro_batches(self.step)
        else:
            batches = self._ahead.take(self.step)
        return pad_to_lockstep(batches, self.processes) if self._is_sharded else batches

    def _make_pinned(self, step: int) -> list[Batch]:
        return [batch.pin() for batch in self.source.micro_batches(step)]

    def _is_stop_requested(self) -> bool:
        """Return whether to leave the step here.

        If a forward pass needs all processes, all leave together. Otherwise the one that was asked
        leaves, and the others learn of it when the gradients are summed.
        """
        stop = self.should_stop()
        return self.processes.any(stop) if self._is_sharded else stop

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.processes.device.type, self.settings.mixed_precision)

    def _offload(self) -> AbstractContextManager[Any]:
        offload = self.settings.activation_offload
        return offload_activations(self.model) if offload else nullcontext()

    def _apply_gradient(self) -> None:
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._scaler.get_scale() < scale:
            # The gradient overflowed in fp16 and nothing moved: as in transformers, neither does
            # the learning rate.
            return
        self.scheduler.step()
        if self._average is not None:
            self._average.update()
        if self.method is not None:
            self.method.after_step(self.step)

    def _skip_step(self, loss: float, grad_norm: float) -> None:
        self._scaler.update(self._scaler.get_scale())  # discards the gradients, keeps the scale
        self.progress.num_skipped += 1
        for callback in self.callbacks:
            callback.on_skipped_step(self, loss, grad_norm)
        # A run that skips most of its steps does not train.
        limit = min(self.settings.max_skipped_steps, self.source.num_steps // 2)
        if self.progress.num_skipped > limit:
            raise _divergence_error(self.progress, loss, grad_norm)

    def _validation_losses(self) -> dict[str, float]:
        with self._autocast():
            sums: dict[str, tuple[float, float]] = {}
            for name, batches in self.source.validation_batches().items():
                if sums:
                    self.check_stop()
                sums[name] = sum_loss(
                    self.model, self.loss_function, batches, self.processes, self.should_stop
                )
        return mean_losses(sums)

    def _further_metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for callback in self.callbacks:
            if metrics:  # what took time was done: leave before the next callback does more
                self.check_stop()
            metrics.update(callback.on_validate(self))
        return metrics


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _divergence_error(progress: Progress, loss: float, grad_norm: float) -> MachineError:
    earlier = progress.num_skipped - 1
    skipped = f" ({earlier} earlier steps were skipped)" if earlier else ""
    return MachineError(
        f"training diverged at step {progress.step}: loss {loss}, gradient norm {grad_norm}"
        + skipped,
        hint="lower train.learning_rate or adapter.alpha, or raise train.warmup_ratio. The run's "
        "folder skipped/ contains the rows of each such step. train.max_skipped_steps is the "
        "number of steps that may be skipped. Checkpoints from before this step are valid",
    )
