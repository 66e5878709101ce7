"""The kernels that an edit launches, forward and backward, do not become more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from wegeft_cli import inject_generators

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
NUM_LAYERS, RANK, TOKENS = 2, 16, 20
NO_KERNEL = {"view", "t", "transpose", "detach", "_unsafe_view", "expand", "alias", "as_strided"}


class Launches(TorchDispatchMode):
    """Counts the operations that compute or copy."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.removeprefix("aten::") not in NO_KERNEL
        return func(*args, **(kwargs or {}))


def count_launches(model: nn.Module, *, autocast: bool) -> int:
    """Count the launches of a second forward and backward pass."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    for _ in range(2):
        model.zero_grad()
        embedded = embeddings(torch.arange(TOKENS)[None]).detach().requires_grad_()
        with Launches() as launches, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(inputs_embeds=embedded, use_cache=False).logits
            logits.float().sum().backward()
    return launches.count


@pytest.mark.parametrize(
    ("dtype", "autocast", "view", "most"),
    [
        (torch.float32, False, "activation", 9.5),
        (torch.bfloat16, False, "activation", 15.5),
        (torch.float32, True, "activation", 15.5),
        (torch.float32, False, "weight", 12.5),
        (torch.bfloat16, False, "weight", 16.5),
        (torch.float32, True, "weight", 21.5),
    ],
    ids=str,
)
def test_an_edit_launches_few_kernels(
    make_llama: Callable[..., nn.Module],
    dtype: torch.dtype,
    autocast: bool,
    view: str,
    most: float,
) -> None:
    frozen, edited = (make_llama(num_hidden_layers=NUM_LAYERS).to(dtype) for _ in range(2))
    frozen.requires_grad_(False)
    inject_generators(edited, rank=RANK, target_modules=TARGETS, view=view)
    base = count_launches(frozen.train(), autocast=autocast)
    further = count_launches(edited.train(), autocast=autocast) - base
    assert 0 < further / (NUM_LAYERS * len(TARGETS)) < most
