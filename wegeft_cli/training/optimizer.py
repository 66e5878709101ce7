"""Optimizers by their names in transformers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from wegeft_cli.errors import UserError

# Arguments of an optimizer's constructor that `options` does not accept: they are set by its name,
# by other keys or by the schedule, or select an implementation.
_SET_ELSEWHERE = {
    "params", "lr", "weight_decay", "fused", "optim_bits", "is_paged", "relative_step",
    "warmup_init", "maximize", "foreach", "capturable", "differentiable", "args",
}  # fmt: skip
_OF_TORCH: dict[str, type[Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
_UNPAGED = {
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
}
# Shape of a weight for which an 8-bit optimizer keeps its state in 8 bits.
_TRIAL_SHAPE = (64, 64)


class AdamSettings(NamedTuple):
    """Moment decays and epsilon of Adam."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


def build_optimizer(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
    adam: AdamSettings = AdamSettings(),  # noqa: B008 - immutable
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """Build an optimizer.

    Args:
        name: A name of transformers: adamw_torch, adamw_torch_fused, adafactor, sgd, adagrad,
            rmsprop, or one of bitsandbytes.
        lr_ratio: Learning rate of the generators' phi over that of all other parameters, above 0.
            If it is not 1, phi is the second of two parameter groups.

    Raises:
        UserError: If an option is unknown or rejected, or a package is missing.
        ValueError: If the name is unknown, or `lr_ratio` is set and there is no phi.
    """
    optimizer_class, settings = _find_class(name, learning_rate, adam)
    given = dict(options or {})
    valid = _list_options(optimizer_class, settings)
    unknown = [option for option in given if option not in valid]
    if unknown:
        raise _rejected_option(name, f"does not know {', '.join(unknown)}", valid)
    if "beta3" in given:
        settings["betas"] = (*settings["betas"][:2], given.pop("beta3"))
    settings.update(weight_decay=weight_decay, **given)
    try:
        groups = _group(parameters, learning_rate, lr_ratio)
        return optimizer_class(
            _exempt_vectors_from_decay(groups) if weight_decay else groups, **settings
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        if not options:
            raise
        raise _rejected_option(name, f"does not accept {dict(options)}: {error}", valid) from error


def list_optimizer_options(name: str) -> list[str]:
    """Return the names that `options` of `build_optimizer` may contain, as in the constructor."""
    return _list_options(*_find_class(name, 1.0, AdamSettings()))


def check_optimizer(name: str, options: Mapping[str, Any], device: torch.device | None) -> None:
    """Build the optimizer for a small tensor and take a step, so that errors appear early.

    Args:
        device: Device of the run. If it is None (unknown), no step is taken, and a package that is
            missing here is no error.

    Raises:
        UserError: If the package is missing, the optimizer does not run on the device, or it
            rejects an option.
    """
    if device is None:
        _check_settings(name, options)
        return
    if name in _UNPAGED and device.type == "cpu":
        raise UserError(
            f"{name} moves its state between GPU and host memory, and there is no GPU",
            key="train.optim",
            hint=f"use {_UNPAGED[name]}",
        )
    weight = nn.Parameter(torch.ones(_TRIAL_SHAPE, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = build_optimizer(name, {"weight": weight}, learning_rate=1e-3, options=options)
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        if options:
            valid = list_optimizer_options(name)
            message = f"does not accept {dict(options)}: {error}"
            raise _rejected_option(name, message, valid) from error
        raise UserError(f"{name} does not run on {device}: {error}", key="train.optim") from error


def _check_settings(name: str, options: Mapping[str, Any]) -> None:
    try:
        _find_class(name, 1e-3, AdamSettings())
    except UserError:
        return  # its package is missing here
    weight = nn.Parameter(torch.ones(_TRIAL_SHAPE))
    build_optimizer(name, {"weight": weight}, learning_rate=1e-3, options=options)


def _find_class(
    name: str, learning_rate: float, adam: AdamSettings
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return an optimizer's class and its constructor's arguments.

    Optimizers of torch do not go through transformers, whose import takes seconds. Its table of the
    other names needs only these fields of the trainer's arguments. `optim_args` is not passed,
    because most optimizers silently ignore it.
    """
    if name in _OF_TORCH:
        own: dict[str, Any] = {"lr": learning_rate}
        if _OF_TORCH[name] is torch.optim.AdamW:
            own |= {"betas": (adam.beta1, adam.beta2), "eps": adam.epsilon}
        if name == "adamw_torch_fused":
            own["fused"] = True
        return _OF_TORCH[name], own
    # The import may print messages about trackers; standard output is for results.
    with redirect_stdout(sys.stderr):
        from transformers import Trainer

    arguments: Any = SimpleNamespace(
        optim=name,
        learning_rate=learning_rate,
        adam_beta1=adam.beta1,
        adam_beta2=adam.beta2,
        adam_epsilon=adam.epsilon,
        optim_args=None,
    )
    try:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise UserError(
            f"{name} needs bitsandbytes, which is not installed",
            key="train.optim",
            hint='pip install "wegeft-cli[bitsandbytes]", or use adamw_torch',
        ) from error
    return optimizer_class, settings


def _list_options(optimizer_class: type[Optimizer], settings: Mapping[str, Any]) -> list[str]:
    names = list(inspect.signature(optimizer_class).parameters)
    taken = _SET_ELSEWHERE | (settings.keys() & {"betas", "eps"})
    if "optim_bits" in names:  # bitsandbytes accepts these and ignores them
        taken |= {"amsgrad", "centered"}
    # transformers' name for the third of three betas; the recipe's keys set two of them.
    third = ["beta3"] if len(settings.get("betas", ())) > 2 else []
    return third + [name for name in names if name not in taken]


def _group(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, lr_ratio: float
) -> Iterable[Any]:
    if lr_ratio == 1.0:
        return list(parameters.values())
    phi = [p for name, p in parameters.items() if name.rpartition(".")[2] == "phi"]
    others = [p for name, p in parameters.items() if name.rpartition(".")[2] != "phi"]
    if not phi or not others:
        raise ValueError(f"a ratio of learning rates needs phi and psi; got {list(parameters)}")
    return [{"params": others}, {"params": phi, "lr": learning_rate * lr_ratio}]


def _exempt_vectors_from_decay(groups: Iterable[Any]) -> list[Any]:
    """Move biases and other parameters of one dimension to groups without weight decay."""
    found = list(groups)
    if not isinstance(found[0], dict):
        found = [{"params": found}]
    with_decay, without_decay = [], []
    for group in found:
        wide = [p for p in group["params"] if p.ndim > 1]
        flat = [p for p in group["params"] if p.ndim < 2]
        with_decay += [{**group, "params": wide}] if wide else []
        without_decay += [{**group, "params": flat, "weight_decay": 0.0}] if flat else []
    return with_decay + without_decay


def _rejected_option(name: str, message: str, valid: list[str]) -> UserError:
    takes = ", ".join(valid) if valid else "no options"
    return UserError(f"{name} {message}", key="train.optim_args", hint=f"it accepts {takes}")
