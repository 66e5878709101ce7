"""Methods that add nothing: some of the base's own parameters learn, or all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.methods.wegeft.trained_modules import find_saved_modules

_KEY = "adapter.type"


def select_parameters(
    model: nn.Module, method: str, modules_to_save: Sequence[str]
) -> dict[str, list[str]]:
    """Choose what learns.

    Args:
        model: The base model; the meta device will do.
        method: full (every parameter), bitfit (every bias: Ben Zaken, Ravfogel, Goldberg, ACL 2022,
            arXiv 2106.10199), or linear_probe (none of the backbone's).
        modules_to_save: Modules that learn whole beside them; a classifier's head is among them.

    Returns:
        Kind -> full parameter names: `all`, or `bias` and `modules_to_save`.

    Raises:
        UserError: If nothing learns, or a parameter is quantised.
        ExceptionGroup: If several modules cannot be trained whole.
    """
    named = dict(model.named_parameters())
    if method == "full":
        chosen = {"all": list(named)}
    else:
        saved = find_saved_modules(model, modules_to_save)
        whole = [name for name in named if any(name.startswith(f"{module}.") for module in saved)]
        biases = [name for name in named if name.endswith("bias") and name not in set(whole)]
        chosen = {"bias": biases if method == "bitfit" else [], "modules_to_save": whole}
        if method == "bitfit" and not biases:
            raise UserError(
                "the model has no bias to train",
                key=_KEY,
                hint="take another method: this architecture has linears without bias",
            )
    chosen = {kind: names for kind, names in chosen.items() if names}
    if not chosen:
        raise UserError(f"{method!r} leaves nothing to learn", key=_KEY)
    for names in chosen.values():
        for name in names:
            if not named[name].is_floating_point() or named[name].dtype.itemsize < 2:
                message = f"{name!r} is quantised and cannot be trained itself"
                raise UserError(message, key=_KEY, hint="load the base in float32")
    return chosen


def unfreeze(model: nn.Module, names: Sequence[str]) -> None:
    """Let parameters learn, and no other.

    Args:
        model: The model; it becomes float32 where its weights have 16 bits, since most steps on
            those are rounded away.
        names: Full parameter names.
    """
    model.requires_grad_(False)
    if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters()):
        model.float()
    named = dict(model.named_parameters())
    for name in names:
        named[name].requires_grad_(True)


def put_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put trained values into a model's own parameters.

    Args:
        model: The base model.
        tensors: Full parameter name -> value.

    Raises:
        UserError: If the model has no such parameter, or one of another shape.
    """
    named = dict(model.named_parameters())
    for name, tensor in tensors.items():
        ours = list(named[name].shape) if name in named else "nothing"
        if ours != list(tensor.shape):
            raise UserError(
                f"{name} is {ours} in this model, {list(tensor.shape)} in the adapter",
                hint="this adapter belongs to another model",
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[name].copy_(tensor)
