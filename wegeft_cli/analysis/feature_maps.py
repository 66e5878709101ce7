"""Arrange a layer's output over the image, also for transformers with shifted windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# Their tokens are sorted by mask units, which the output does not show.
_SORTED_OTHERWISE = ("hiera",)


@dataclass
class Recording:
    """The outputs of some modules in one forward pass.

    Args:
        outputs: Module -> its output; None until it was called.
        blocks: Module -> the windowed block (Swin's) around it, if there is one.
        resolutions: Block -> rows and columns of its input tokens.
    """

    outputs: dict[str, Tensor | None]
    blocks: dict[str, nn.Module]
    resolutions: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)


@contextmanager
def recorded(model: nn.Module, modules: dict[str, str]) -> Iterator[Recording]:
    """Record the outputs of modules during the body; `modules` maps keys to module names."""
    found = {key: _find_block(model, name) for key, name in modules.items()}
    recording = Recording(
        dict.fromkeys(modules, None), {k: block for k, block in found.items() if block is not None}
    )
    handles = []
    for key, name in modules.items():

        def keep(module: nn.Module, args: Any, output: Tensor, key: str = key) -> None:
            recording.outputs[key] = output.detach()

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    for block in set(recording.blocks.values()):

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            height, width = args[1] if len(args) > 1 else kwargs["input_dimensions"]
            recording.resolutions[module] = (int(height), int(width))

        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def lay_out(
    recording: Recording, key: str, grid: tuple[int, int] | None, model_type: str
) -> tuple[Tensor | None, str | None]:
    """Arrange a recorded output over the image as `[rows, columns, d_out]`, or return the reason.

    `grid` is the number of rows and columns of patches, if it is known.
    """
    output = recording.outputs[key]
    if output is None:
        return None, "the module took no part in the forward pass"
    if model_type in _SORTED_OTHERWISE:
        return None, f"the tokens of {model_type} are not in the image's order"
    block = recording.blocks.get(key)
    if block is not None and block in recording.resolutions and output.ndim == 3:
        plane = _join_windows(output, block, *recording.resolutions[block])
        if plane is not None:
            return plane, None
    if output.ndim != 3 or output.shape[0] != 1:
        return None, "its output is cut into windows of an unknown order"
    tokens = output.shape[1]
    square = math.isqrt(tokens)
    if grid is None or tokens < math.prod(grid):
        grid = (square, square) if square**2 == tokens else None
    if grid is None:
        return None, f"its {tokens} outputs are no grid of patches"
    # The tokens before the patches are the class token, or registers.
    return output[0, tokens - math.prod(grid) :].reshape(*grid, -1), None


def _find_block(model: nn.Module, name: str) -> nn.Module | None:
    """Find the nearest parent module that cuts its input into shifted windows."""
    while "." in name:
        name = name.rpartition(".")[0]
        block = model.get_submodule(name)
        if hasattr(block, "shift_size") and hasattr(block, "window_size"):
            return block
    return None


def _join_windows(output: Tensor, block: Any, height: int, width: int) -> Tensor | None:
    """Undo a block's windows: join them, shift them back and remove the padding.

    Args:
        output: `[windows, window_size^2, d_out]`, row by row.
        height: Rows of tokens before the padding.
        width: Columns of tokens before the padding.

    Returns:
        `[height, width, d_out]`; None if the output is not windowed.
    """
    size, shift = int(block.window_size), int(block.shift_size)
    rows, columns = math.ceil(height / size), math.ceil(width / size)
    if output.shape[:2] != (rows * columns, size**2):
        return None
    plane = output.reshape(rows, columns, size, size, -1).transpose(1, 2)
    plane = plane.reshape(rows * size, columns * size, -1)
    return plane.roll((shift, shift), dims=(0, 1))[:height, :width]
