"""The state that a run saves so that it can resume exactly, as tensors and plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import MachineError, UserError, name_first
from wegeft_cli.training.ema import ParameterAverage


@dataclass
class Progress:
    """Counters of a run.

    Args:
        step: Optimizer steps done.
        num_tokens: Tokens seen, padding excluded, over all processes.
        loss_sum: Summed loss since the last line of metrics.
        label_tokens: Labeled tokens since the last line of metrics.
        last_loss: Mean loss of the last line of metrics.
        grad_norm: Gradient norm of the last step that was not skipped.
        best_metric: Best value of the watched metric so far.
        best_step: Step of that validation.
        num_bad_evals: Validations since then.
        num_skipped: Steps skipped since the run began.
        validation_due: Whether the validation of this step is pending or was interrupted.
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
    """What a method changes and remembers after each step, beside the optimizer."""

    def after_step(self, step: int) -> None:
        """Run after a step that changed the parameters, before the gradients are cleared."""
        ...

    def finish(self) -> None:
        """Run after the last step, skipped or not."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state."""
        ...

    def values(self) -> dict[str, Any]:
        """Return the rest of the state as a JSON object."""
        ...

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore a saved state."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """The state of a run: named sets of tensors, and a JSON object."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class TrainingState:
    """The objects of a run that change with each step.

    Args:
        parameters: The trained parameters by name.
        optimizer: Their optimizer.
        scheduler: The optimizer's learning rate scheduler.
        scaler: The loss scaler, enabled or not.
        average: The moving average of the parameters, if there is one.
        method: The method's own state, if it has one.
        statistics: Running statistics that training changes, by name.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    average: ParameterAverage | None = None
    method: MethodState | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def capture(
        self, progress: Progress, processes: Processes, source: Mapping[str, Any] | None = None
    ) -> Snapshot:
        """Copy the state between two steps; every process calls it."""
        packed = self.optimizer.state_dict()
        moments: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for name, value in _flatten(packed["state"]):
            if isinstance(value, Tensor):
                moments[name] = _copy(value)
            else:
                values[name] = value
        tensors = {
            "parameters": {name: _copy(tensor) for name, tensor in self.parameters.items()},
            "optimizer": moments,
            "rng": _capture_random_states(processes),
        }
        if self.average is not None:
            tensors["ema"] = {name: _copy(t) for name, t in self.average.tensors.items()}
        if self.statistics:
            tensors["statistics"] = {name: _copy(t) for name, t in self.statistics.items()}
        if self.method is not None and (own_tensors := self.method.tensors()):
            tensors["method"] = {name: _copy(tensor) for name, tensor in own_tensors.items()}
        return Snapshot(
            tensors=tensors,
            state={
                "progress": asdict(progress),
                "names": optimizer_order(self.parameters, self.optimizer),
                "optimizer": values,
                "param_groups": [
                    {k: list(v) if isinstance(v, tuple) else v for k, v in group.items()}
                    for group in packed["param_groups"]
                ],
                "schedule": {
                    key: value
                    for key, value in self.scheduler.state_dict().items()
                    if isinstance(value, int | float | list)
                },
                "scaler": self.scaler.state_dict(),
                "ema": None if self.average is None else {"num_updates": self.average.num_updates},
                "method": None if self.method is None else self.method.values(),
                "source": dict(source or {}),
            },
        )

    def restore(self, snapshot: Snapshot, processes: Processes) -> Progress:
        """Restore a captured state in place, and return the counters.

        The scheduler may be that of a longer run; then the next steps follow the longer schedule.

        Raises:
            UserError: If the parameters, or the method's settings, are not those of the snapshot.
        """
        saved = snapshot.tensors["parameters"]
        if {name: value.shape for name, value in saved.items()} != {
            name: parameter.shape for name, parameter in self.parameters.items()
        }:
            check_same_parameters(saved, self.parameters)
            raise UserError(
                "the checkpoint holds parameters of other shapes than the recipe builds",
                key="--resume",
                hint="resume with the recipe.yaml of the checkpoint's run",
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[name])
            for name, tensor in snapshot.tensors.get("statistics", {}).items():
                self.statistics[name].copy_(tensor)
        self._restore_optimizer(snapshot)
        if snapshot.state["scaler"]:
            self.scaler.load_state_dict(snapshot.state["scaler"])
        if self.average is not None:
            self.average.load(snapshot.tensors["ema"], snapshot.state["ema"]["num_updates"])
        if self.method is not None:
            self.method.load(snapshot.tensors.get("method", {}), snapshot.state["method"])
        progress = Progress(**snapshot.state["progress"])
        _restore_random_state(snapshot.tensors["rng"], processes, progress.step)
        return progress

    def _restore_optimizer(self, snapshot: Snapshot) -> None:
        values, moments = snapshot.state.get("optimizer", {}), snapshot.tensors["optimizer"]
        packed = {int(index): entry for index, entry in _unflatten({**values, **moments}).items()}
        groups = [
            {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
            for group in snapshot.state["param_groups"]
        ]
        self.optimizer.load_state_dict({"state": packed, "param_groups": groups})
        self.scheduler.load_state_dict(dict(snapshot.state["schedule"]))
        _set_rates(self.optimizer, self.scheduler)


def optimizer_order(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> list[str]:
    """Return the names of trained parameters in the order in which an optimizer numbers them."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def check_replicas_equal(
    step: int, parameters: Mapping[str, nn.Parameter], processes: Processes
) -> None:
    """Raise MachineError if the processes have different parameters or are at different steps."""
    if processes.count == 1:
        return
    digest = hashlib.sha256(str(step).encode())
    for name, parameter in parameters.items():
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    if len(set(processes.gather(digest.hexdigest()))) > 1:
        raise MachineError(
            f"the processes hold different factors at step {step}",
            hint="resume from the newest checkpoint with --resume auto, on a disk that all "
            "processes share",
        )


def _capture_random_states(processes: Processes) -> dict[str, Tensor]:
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    return {
        f"{kind}.{rank}": state
        for rank, states in enumerate(processes.gather(own))
        for kind, state in states.items()
    }


def check_same_parameters(saved: Collection[str], built: Collection[str]) -> None:
    """Raise UserError unless a checkpoint holds the parameters that the recipe builds."""
    lacking, further = sorted(set(built) - set(saved)), sorted(set(saved) - set(built))
    if not (lacking or further):
        return
    differences = [
        f"{what} {name_first(names, 1)}"
        for what, names in (("it lacks", lacking), ("it also has", further))
        if names
    ]
    raise UserError(
        "the checkpoint holds other parameters than the recipe builds: " + "; ".join(differences),
        key="adapter.target_modules",
        hint="resume with the recipe.yaml of the checkpoint's run. If that is the recipe, another "
        "version of wegeft-cli chose other layers for it: name the layers of the checkpoint in "
        "adapter.target_modules, or train anew",
    )


def _restore_random_state(states: Mapping[str, Tensor], processes: Processes, step: int) -> None:
    rank = processes.rank
    if f"cpu.{rank}" in states and f"cpu.{processes.count}" not in states:
        torch.set_rng_state(states[f"cpu.{rank}"])
        if f"cuda.{rank}" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states[f"cuda.{rank}"])
    else:
        # The number of processes has changed. Forward passes do not depend on this state.
        torch.manual_seed(step * processes.count + rank)


def _set_rates(optimizer: Optimizer, schedule: Any) -> None:
    """Set the rates of the next step by the schedule: the snapshot may be of a shorter run."""
    schedule._last_lr = [
        rate * factor(schedule.last_epoch)
        for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _flatten(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield an optimizer's nested state, such as that of 8-bit optimizers, by dotted names."""
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
    """Nest values by their dotted names."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[key] = value
    return nested
