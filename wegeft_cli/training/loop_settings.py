"""Settings and result of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the training loop.

    Args:
        max_grad_norm: Largest global gradient norm; 0 turns clipping off.
        mixed_precision: none, bf16 or fp16.
        logging_steps: Steps between two lines of metrics.
        eval_steps: Steps between two validations; 0: one validation after the last step.
        save_steps: Steps between two checkpoints; 0: one after the last step or at a stop.
        early_stopping_patience: Stop after this number of validations without improvement; None:
            never.
        max_skipped_steps: Steps with a loss or gradient that is not finite, or with a gradient of 0
            at a loss that is not, which are skipped. More of them, or more than half of all steps,
            end the run.
        ema_decay: Decay of a moving average of the trained parameters; None: no average.
        check_steps: Steps between two comparisons of the trained parameters across processes; 0:
            they are compared at saves only.
        seed: Seed of the random numbers of forward passes.
        activation_offload: Keep activations in host memory until the backward pass.
        metric_for_best_model: Metric used for model selection; validations that do not report it
            are ignored.
        greater_is_better: Whether a higher value of that metric is better.
        save_best: Save after each validation that is the best so far, whether a save is due or not.
        save_before_validation: Save before each validation as well, so that a kill during a long
            validation costs only the validation.
    """

    max_grad_norm: float = 1.0
    mixed_precision: str = "none"
    logging_steps: int = 1
    eval_steps: int = 0
    save_steps: int = 0
    early_stopping_patience: int | None = None
    max_skipped_steps: int = 10
    ema_decay: float | None = None
    check_steps: int = 0
    seed: int = 0
    activation_offload: bool = False
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool = False
    save_best: bool = False
    save_before_validation: bool = False


@dataclass
class LoopResult:
    """How the loop ended.

    Args:
        status: finished or interrupted.
        num_steps: Optimizer steps of the whole run, skipped ones included.
        final_loss: Mean loss of the last line of metrics, or since then if steps followed it.
        validation: Step -> metrics of its validation, for the validations of this process.
        stopped_early: Whether the patience ran out.
        best_step: Step of the best validation of the whole run; None without one.
        best_metric: Its value of the watched metric.
        num_skipped: Steps skipped in the whole run.
    """

    status: str
    num_steps: int
    final_loss: float | None
    validation: dict[int, dict[str, float]] = field(default_factory=dict)
    stopped_early: bool = False
    best_step: int | None = None
    best_metric: float | None = None
    num_skipped: int = 0
