"""Compare the tensors in a base's files with those of the model that was built for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from wegeft_cli.errors import BaseModelError, name_first

_SHOWN = 5
_COUNTER = ".num_batches_tracked"  # older files lack it, and no forward pass reads it


def list_missing(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the tensors that transformers could not load, each with the reason.

    `report` is the loading report of `from_pretrained`. A tensor of another shape counts as
    missing.
    """
    missing = {name: "" for name in sorted(report["missing_keys"]) if not name.endswith(_COUNTER)}
    for name, stored, built in sorted(report["mismatched_keys"]):
        missing[name] = f" ({list(stored)} in the files, {list(built)} in the model)"
    return missing


def refuse_missing(
    model: nn.Module, missing: Mapping[str, str], name_or_path: str, hint: str | None = None
) -> None:
    """Raise BaseModelError that names the missing weights, if there are any."""
    if not missing:
        return
    shown = name_first([f"{name}{reason}" for name, reason in missing.items()], _SHOWN)
    raise BaseModelError(
        f"{name_or_path!r} holds no weights for {shown} of {type(model).__name__}: "
        "they would stay random",
        hint=hint or _hint(model),
    )


def list_unused(report: Mapping[str, Any], *, has_head: bool) -> list[str]:
    """Return the tensors of the files that the model does not use.

    A classifier drops the head of the pretraining, so for it only tensors of numbered blocks count.
    """
    names = sorted(report["unexpected_keys"])
    if has_head:
        names = [name for name in names if any(part.isdigit() for part in name.split("."))]
    return names


def warn_of_unused(model: Any, warn: Callable[[str], None]) -> None:
    """Warn about tensors of the files that a loaded model does not use."""
    names = model.unused_weights
    if names:
        warn(
            f"{type(model).__name__} does not use these tensors of the base's files: "
            f"{name_first(names, 3)}. Check that config.json belongs to the weights"
        )


def _hint(model: Any) -> str:
    """Return what to do about missing weights: another task, or other files."""
    names = getattr(model.config, "architectures", None) or ()
    others = [str(name) for name in names if name != type(model).__name__]
    if others:
        return (
            f"its config.json names {others[0]}: choose the `task` of that class, or take the "
            "files of the whole model"
        )
    return "fetch the model again, and check that config.json belongs to the weights"
