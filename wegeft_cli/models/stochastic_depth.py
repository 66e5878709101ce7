"""Stochastic depth for transformers that do not implement it (ViT, DeiT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError

_BRANCHES = (("attention", "mlp"), ("attention", "output.dropout"))
"""Modules that end a block's two branches. In transformers 5.2 to 5.8 the last module of ViT's MLP,
`output`, adds the residual; the dropout in it is the last one before."""


def add_drop_path(model: Any, rate: float) -> None:
    """Add stochastic depth: skip residual branches at random during training.

    Huang et al. 2016 (arXiv 1603.09382), as in timm's ViT: block i of L drops each of its two
    branches for each row with probability p_i = rate x i / (L - 1), and scales the others by 1 / (1
    - p_i). The hooks come last, so that they see a branch with its adapter.

    Args:
        rate: The last block's probability, 0 <= rate < 1.

    Raises:
        UserError: If it has no such blocks.
    """
    blocks, branches = _find_blocks(model)
    for number, block in enumerate(blocks):
        share = rate * number / max(len(blocks) - 1, 1)
        if share > 0:
            for name in branches:
                block.get_submodule(name).register_forward_hook(_DropRows(share))


def check_drop_path(model: Any) -> None:
    """Raise UserError if `add_drop_path` does not support the model's blocks."""
    _find_blocks(model)


class _DropRows:
    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not module.training:
            return output
        branch: Tensor = output[0] if isinstance(output, tuple) else output
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        keeps = torch.rand(shape, device=branch.device) >= self.share
        kept = branch * keeps.to(branch.dtype) / (1 - self.share)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept


def _find_blocks(model: Any) -> tuple[list[Any], tuple[str, ...]]:
    """Return the model's only stack of blocks and the modules that end their branches."""
    found = [
        (list(module), branches)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module)
        for branches in _BRANCHES
        if all(_has(block, name) for block in module for name in branches)
    ]
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"stochastic depth needs one stack of blocks with attention and MLP, as in ViT; "
        f"{type(model).__name__} has {len(found) or 'none'}",
        key="model.drop_path_rate",
        hint="remove the key",
    )


def _has(block: nn.Module, name: str) -> bool:
    """Return whether a block has a submodule."""
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True
