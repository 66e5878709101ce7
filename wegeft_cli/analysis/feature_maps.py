"""A layer's output as a plane over the image, where a transformer cuts it into shifted windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# Their tokens are sorted by mask units, which no output tells.
_SORTED_OTHERWISE = ("hiera",)


@dataclass
class Recording:
    """The outputs of some modules in one forward pass.

    Args:
        outputs: Module -> its output; None until it was called.
        blocks: Module -> the windowed block (Swin's) around it, where there is one.
        resolutions: Block -> rows and columns of tokens that it was given.
    """

    outputs: dict[str, Tensor | None]
    blocks: dict[str, nn.Module]
    resolutions: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)


@contextmanager
def recorded(model: nn.Module, modules: dict[str, str]) -> Iterator[Recording]:
    """Keep the outputs of modules while the block runs.

    Args:
        model: The model.
        modules: Name under which an output is kept -> the module's name in the model.

    Yields:
        The recording, filled by the model's next pass.
    """
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
    """Lay a recorded output over the image.

    Args:
        recording: What was kept.
        key: Which output.
        grid: Rows and columns of the patches that the image was cut into, where it is told.
        model_type: The model's family.

    Returns:
        `[rows, columns, d_out]`; or None, and the reason.
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
    # What stands before the patches is the class token, or registers.
    return output[0, tokens - math.prod(grid) :].reshape(*grid, -1), None


def _find_block(model: nn.Module, name: str) -> nn.Module | None:
    """Find the nearest module around another that cuts its input into shifted windows."""
    while "." in name:
        name = name.rpartition(".")[0]
        block = model.get_submodule(name)
        if hasattr(block, "shift_size") and hasattr(block, "window_size"):
            return block
    return None


def _join_windows(output: Tensor, block: Any, height: int, width: int) -> Tensor | None:
    """Undo a block's windows: joined, shifted back, without padding.

    Args:
        output: `[windows, window_size^2, d_out]`, row by row.
        block: Holds `window_size` and `shift_size`, as they were in the pass.
        height: Rows of tokens before they were padded.
        width: Columns.

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
