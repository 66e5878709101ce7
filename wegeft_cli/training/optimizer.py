"""Optimizers by the names that transformers gives them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from wegeft_cli.errors import UserError

# What an optimizer's constructor takes and `options` does not: set by its name, by other keys or by
# the schedule, or about how rather than what is computed.
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
# A weight large enough that an 8-bit optimizer keeps its state in 8 bits.
_TRIAL_SHAPE = (64, 64)


def build_optimizer(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """Build the optimizer.

    Args:
        name: One of transformers' names that needs no more than parameters: adamw_torch,
            adamw_torch_fused, adafactor, sgd, adagrad, rmsprop, or one of bitsandbytes'.
        parameters: What learns, by name.
        learning_rate: The highest rate; the schedule scales it.
        lr_ratio: Rate of the generators' phi over the rate of all else, above 0. Phi is then the
            second of two groups.
        weight_decay: Decoupled for Adam and Lion, added to the gradient for the others; parameters
            of one dimension have none, as in timm and transformers' Trainer, and are then groups
            of their own.
        betas: Moment decays of Adam and Lion.
        epsilon: Adam's epsilon.
        options: The optimizer's own settings beside these; `list_optimizer_options` names them.

    Returns:
        The optimizer.

    Raises:
        UserError: If an option is unknown or not taken, or a package is missing.
        ValueError: If the name is unknown, or there is no phi that a ratio could be for.
    """
    optimizer_class, settings = _find_class(name, learning_rate, betas, epsilon)
    given = dict(options or {})
    valid = _list_options(optimizer_class, settings)
    unknown = [option for option in given if option not in valid]
    if unknown:
        raise _refused(name, f"does not know {', '.join(unknown)}", valid)
    if "beta3" in given:
        settings["betas"] = (*settings["betas"][:2], given.pop("beta3"))
    settings.update(weight_decay=weight_decay, **given)
    try:
        groups = _group(parameters, learning_rate, lr_ratio)
        return optimizer_class(_spare_vectors(groups) if weight_decay else groups, **settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        if not options:
            raise
        raise _refused(name, f"does not take {dict(options)}: {error}", valid) from error


def list_optimizer_options(name: str) -> list[str]:
    """Name the optimizer's own settings: what `options` of `build_optimizer` may hold.

    Args:
        name: As for `build_optimizer`.

    Returns:
        Their names, as in the optimizer's constructor.

    Raises:
        UserError: If the optimizer's package is missing.
    """
    return _list_options(*_find_class(name, 1.0, (0.9, 0.999), 1e-8))


def check_optimizer(name: str, options: Mapping[str, Any], device: torch.device | None) -> None:
    """Build the optimizer over a small tensor and take a step: what fails then fails early.

    Args:
        name: As for `build_optimizer`.
        options: As for `build_optimizer`.
        device: Where the run will train; None where that is not known: no step is taken then, and a
            package that is missing here is no fault.

    Raises:
        UserError: If the package is missing, the optimizer does not run on the device, or it does
            not take an option.
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
            message = f"does not take {dict(options)}: {error}"
            raise _refused(name, message, valid) from error
        raise UserError(f"{name} does not run on {device}: {error}", key="train.optim") from error


def _check_settings(name: str, options: Mapping[str, Any]) -> None:
    weight = nn.Parameter(torch.ones(_TRIAL_SHAPE))
    try:
        build_optimizer(name, {"weight": weight}, learning_rate=1e-3, options=options)
    except UserError as fault:
        if fault.key == "train.optim_args":
            raise


def _find_class(
    name: str, learning_rate: float, betas: tuple[float, float], epsilon: float
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Find an optimizer's class and the settings that these numbers stand for.

    Torch's own are taken directly: asking transformers costs seconds of imports at every start. Its
    table of the other names needs no trainer, but these fields of a trainer's arguments.
    `optim_args` is not among what is passed on: for most optimizers it would be dropped in silence.
    """
    if name in _OF_TORCH:
        own: dict[str, Any] = {"lr": learning_rate}
        if _OF_TORCH[name] is torch.optim.AdamW:
            own |= {"betas": betas, "eps": epsilon}
        if name == "adamw_torch_fused":
            own["fused"] = True
        return _OF_TORCH[name], own
    # On its import transformers may print, of trackers; standard output is for results.
    with redirect_stdout(sys.stderr):
        from transformers import Trainer

    arguments: Any = SimpleNamespace(
        optim=name,
        learning_rate=learning_rate,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_epsilon=epsilon,
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
    if "optim_bits" in names:  # bitsandbytes' classes take these, and do not do them
        taken |= {"amsgrad", "centered"}
    # Transformers' name for the third of three betas, where the recipe's keys set two.
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


def _spare_vectors(groups: Iterable[Any]) -> list[Any]:
    """Put biases and other parameters of one dimension into groups without weight decay."""
    found = list(groups)
    if not isinstance(found[0], dict):
        found = [{"params": found}]
    decayed, spared = [], []
    for group in found:
        wide = [p for p in group["params"] if p.ndim > 1]
        flat = [p for p in group["params"] if p.ndim < 2]
        decayed += [{**group, "params": wide}] if wide else []
        spared += [{**group, "params": flat, "weight_decay": 0.0}] if flat else []
    return decayed + spared


def _refused(name: str, message: str, valid: list[str]) -> UserError:
    takes = ", ".join(valid) if valid else "no settings of its own"
    return UserError(f"{name} {message}", key="train.optim_args", hint=f"it takes {takes}")
