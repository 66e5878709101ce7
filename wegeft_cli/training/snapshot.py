"""What a run must remember to go on as if it had never stopped, as tensors and plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.training.ema import ParameterAverage


@dataclass
class Progress:
    """How far a run has come.

    Args:
        step: Optimizer steps done.
        num_tokens: Tokens seen, padding excluded, over all processes.
        loss_sum: Summed loss since the last line of metrics.
        label_tokens: Labelled tokens since the last line of metrics.
        last_loss: Mean loss of the last line of metrics.
        grad_norm: Gradient norm of the last step that was not skipped.
        best_metric: Best value of the watched metric so far.
        best_step: Step of that validation.
        num_bad_evals: Validations since then.
        num_skipped: Steps skipped since the run began.
        validation_due: Whether this step's validation was begun, or put off, and is not done.
    """

    step: int = 0
    num_tokens: int = 0
    loss_sum: float = 0.0
    label_tokens: int = 0
    last_loss: float | None = None
    grad_norm: float = 0.0
    best_metric: float | None = None
    best_step: int | None = None
    num_bad_evals: int = 0
    num_skipped: int = 0
    validation_due: bool = False


class MethodState(Protocol):
    """What a method changes after each step, and must remember, beside what the optimizer does."""

    def after_step(self, step: int) -> None:
        """Do what is to be done after a step that moved the parameters; gradients are there."""
        ...

    def finish(self) -> None:
        """Do what the last step, skipped or not, is to leave done."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Give the state's tensors."""
        ...

    def values(self) -> dict[str, Any]:
        """Give the rest of it, a JSON object."""
        ...

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Put a saved state back."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """A run's state: named sets of tensors, and a JSON object."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def capture_snapshot(
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    processes: Processes,
    *,
    average: ParameterAverage | None = None,
    method: MethodState | None = None,
    source: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Take the state between two steps; every process calls it.

    Args:
        parameters: What learns, by name.
        optimizer: Its optimizer.
        schedule: Its schedule.
        scaler: The loss scaler, enabled or not.
        progress: The counters.
        processes: The processes: each process draws its own dropout.
        average: The moving average of the parameters, where one is kept.
        method: The method's own state, where it has one.
        source: The batches' own state, a JSON object.

    Returns:
        The snapshot; its tensors are copies on the CPU.
    """
    packed = optimizer.state_dict()
    moments: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in _flatten(packed["state"]):
        if isinstance(value, Tensor):
            moments[name] = _copy(value)
        else:
            values[name] = value
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    rng = {
        f"{kind}.{rank}": state
        for rank, states in enumerate(processes.gather(own))
        for kind, state in states.items()
    }
    tensors = {
        "parameters": {name: _copy(parameter) for name, parameter in parameters.items()},
        "optimizer": moments,
        "rng": rng,
    }
    if average is not None:
        tensors["ema"] = {name: _copy(tensor) for name, tensor in average.tensors.items()}
    if method is not None and (own_tensors := method.tensors()):
        tensors["method"] = {name: _copy(tensor) for name, tensor in own_tensors.items()}
    return Snapshot(
        tensors=tensors,
        state={
            "progress": asdict(progress),
            "optimizer": values,
            "param_groups": [
                {k: list(v) if isinstance(v, tuple) else v for k, v in group.items()}
                for group in packed["param_groups"]
            ],
            "schedule": {
                key: value
                for key, value in schedule.state_dict().items()
                if isinstance(value, int | float | list)
            },
            "scaler": scaler.state_dict(),
            "ema": None if average is None else {"num_updates": average.num_updates},
            "method": None if method is None else method.values(),
            "source": dict(source or {}),
        },
    )


def restore_snapshot(
    snapshot: Snapshot,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
    scaler: torch.amp.GradScaler,
    processes: Processes,
    *,
    average: ParameterAverage | None = None,
    method: MethodState | None = None,
) -> Progress:
    """Put a captured state back, in place.

    Args:
        snapshot: What `capture_snapshot` gave.
        parameters: The same parameters, freshly built.
        optimizer: A fresh optimizer over them.
        schedule: A fresh schedule; of a run that is prolonged, the longer one, which then rules.
        scaler: A fresh scaler.
        processes: The processes.
        average: A fresh average, if the snapshot's run kept one.
        method: The method's fresh state, if it has one.

    Returns:
        The counters.

    Raises:
        UserError: If the parameters, or the method's settings, are not those of the snapshot.
    """
    saved = snapshot.tensors["parameters"]
    if {name: value.shape for name, value in saved.items()} != {
        name: parameter.shape for name, parameter in parameters.items()
    }:
        raise UserError(
            "the checkpoint holds other parameters than the recipe builds",
            key="--resume",
            hint="resume with the recipe.yaml of the checkpoint's own run",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    packed = _unflatten({**snapshot.state.get("optimizer", {}), **snapshot.tensors["optimizer"]})
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in snapshot.state["param_groups"]
    ]
    moments = {int(index): entry for index, entry in packed.items()}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    schedule.load_state_dict(dict(snapshot.state["schedule"]))
    _set_rates(optimizer, schedule)
    if snapshot.state["scaler"]:
        scaler.load_state_dict(snapshot.state["scaler"])
    if average is not None:
        average.load(snapshot.tensors["ema"], snapshot.state["ema"]["num_updates"])
    if method is not None:
        method.load(snapshot.tensors.get("method", {}), snapshot.state["method"])
    progress = Progress(**snapshot.state["progress"])
    rng, rank = snapshot.tensors["rng"], processes.rank
    if f"cpu.{rank}" in rng and f"cpu.{processes.count}" not in rng:
        torch.set_rng_state(rng[f"cpu.{rank}"])
        if f"cuda.{rank}" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng[f"cuda.{rank}"])
    else:
        # Another number of processes; what forward passes draw depends on none of this.
        torch.manual_seed(progress.step * processes.count + rank)
    return progress


def check_replicas_equal(
    step: int, parameters: Mapping[str, nn.Parameter], processes: Processes
) -> None:
    """Stop a run whose processes hold different factors, or stand at different steps.

    Args:
        step: Optimizer steps done.
        parameters: What learns.
        processes: The processes; with one process there is nothing to compare.

    Raises:
        MachineError: If the processes disagree; nothing is saved then.
    """
    if processes.count == 1:
        return
    digest = hashlib.sha256(str(step).encode())
    for name, parameter in parameters.items():
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    if len(set(processes.gather(digest.hexdigest()))) > 1:
        raise MachineError(
            f"the processes hold different factors at step {step}",
            hint="go on from the newest checkpoint with --resume auto, on a disk that all share",
        )


def _set_rates(optimizer: Optimizer, schedule: Any) -> None:
    """Set the rates of the next step by the schedule: the snapshot's may be a shorter run's."""
    schedule._last_lr = [
        rate * factor(schedule.last_epoch)
        for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _flatten(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Go through an optimizer's state, nested as 8-bit optimizers do it, as dotted names."""
    for key, value in state.items():
        if "." in str(key):
            raise TypeError(f"the optimizer's state has the key {key!r}")
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, Tensor | bool | int | float | str):
            yield f"{prefix}{key}", value
        else:
            raise TypeError(f"the optimizer's state holds a {type(value).__name__} as {key!r}")


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest dotted names again."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[key] = value
    return nested
