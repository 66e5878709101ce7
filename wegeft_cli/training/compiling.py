"""torch.compile, layer by layer: one short compilation serves all layers of a kind."""

from __future__ import annotations

import logging

from torch import nn


def compile_layers(model: nn.Module) -> int:
    """Compile a model's repeated layers in place, for sequences of any length.

    Not the model as a whole: what is hooked into its head changes from pass to pass, and all layers
    are one piece of code.

    Args:
        model: The model as it is trained, with its adapter.

    Returns:
        How many layers are compiled.
    """
    # What it leaves to Python it would tell of at every layer.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outermost = [
        module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    ]
    layers = [layer for module in outermost for layer in module]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
