"""A callback of the trainer made of functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wegeft_cli.training.callbacks import Callback


@dataclass
class LoopHooks:
    """Calls the given functions with the step and the event's values."""

    on_step: Callable[..., Any] = lambda step, loss: None
    on_skip: Callable[..., Any] = lambda step, loss, grad_norm: None
    on_metrics: Callable[..., Any] = lambda metrics: None
    evaluate: Callable[..., dict[str, float]] = lambda step: {}
    on_validation: Callable[..., Any] = lambda step, metrics: None
    on_save: Callable[..., Any] = lambda step, snapshot, is_best: None
    should_stop: Callable[[], bool] = lambda: False

    def to_callback(self) -> Callback:
        """Return the trainer's callback."""
        return _HooksCallback(self)


class _HooksCallback(Callback):
    def __init__(self, hooks: LoopHooks) -> None:
        self._hooks = hooks

    def on_step(self, trainer, loss):
        self._hooks.on_step(trainer.step, loss)

    def on_skipped_step(self, trainer, loss, grad_norm):
        self._hooks.on_skip(trainer.step, loss, grad_norm)

    def on_log(self, trainer, metrics):
        self._hooks.on_metrics(metrics)

    def on_validate(self, trainer):
        return self._hooks.evaluate(trainer.step)

    def on_validated(self, trainer, metrics):
        self._hooks.on_validation(trainer.step, metrics)

    def on_save(self, trainer, snapshot, is_best):
        self._hooks.on_save(trainer.step, snapshot, is_best)

    def should_stop(self):
        return self._hooks.should_stop()
