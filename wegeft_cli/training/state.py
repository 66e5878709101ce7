"""What a run must remember to go on as if it had never stopped, as tensors and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wegeft_cli.errors import UserError


@dataclass
class Progress:
    """How far a run has come.

    Args:
        step: Optimizer steps done.
        num_tokens: Tokens seen, padding excluded, over all processes.
        loss_sum: Summed loss since the last line of metrics.
        label_tokens: Labelled tokens since the last line of metrics.
        last_loss: Mean loss of the last line of metrics.
        best_metric: Best value of the watched metric so far.
        num_bad_evals: Validations since then.
    """

    step: int = 0
    num_tokens: int = 0
    loss_sum: float = 0.0
    label_tokens: int = 0
    last_loss: float | None = None
    best_metric: float | None = None
    num_bad_evals: int = 0


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
) -> Snapshot:
    """Take the state between two steps.

    Args:
        parameters: What learns, by name.
        optimizer: Its optimizer.
        schedule: Its schedule.
        scaler: The loss scaler, enabled or not.
        progress: The counters.

    Returns:
        The snapshot; its tensors are copies on the CPU.
    """
    packed = optimizer.state_dict()
    moments = {
        f"{index}.{key}": value.detach().to("cpu", copy=True).contiguous()
        for index, entry in packed["state"].items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return Snapshot(
        tensors={
            "parameters": {
                name: parameter.detach().to("cpu", copy=True).contiguous()
                for name, parameter in parameters.items()
            },
            "optimizer": moments,
            "rng": rng,
        },
        state={
            "progress": asdict(progress),
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
        },
    )


def restore_snapshot(
    snapshot: Snapshot,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Put a captured state back, in place.

    Args:
        snapshot: What `capture_snapshot` gave.
        parameters: The same parameters, freshly built.
        optimizer: A fresh optimizer over them.
        schedule: A fresh schedule.
        scaler: A fresh scaler.

    Returns:
        The counters.

    Raises:
        UserError: If the parameters are not those of the snapshot.
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
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in snapshot.tensors["optimizer"].items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = value
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()}
        for group in snapshot.state["param_groups"]
    ]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    schedule.load_state_dict(dict(snapshot.state["schedule"]))
    if snapshot.state["scaler"]:
        scaler.load_state_dict(snapshot.state["scaler"])
    torch.set_rng_state(snapshot.tensors["rng"]["cpu"])
    if "cuda" in snapshot.tensors["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(snapshot.tensors["rng"]["cuda"])
    return Progress(**snapshot.state["progress"])
