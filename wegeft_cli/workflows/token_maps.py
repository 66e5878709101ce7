"""Token-clustering maps: an image's tokens projected on the directions C = W phi of each layer.

Source: the vision figures of arXiv 2312.00700v5. Each token's output y of an adapted layer is
projected on the r columns of C, which gives r maps over the image; each is min-max normalised and
what lies below one half is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.checkpoints.adapter import AdapterFiles
from wegeft_cli.errors import UserError
from wegeft_cli.generators.targets import find_linears
from wegeft_cli.interop.image_files import make_thumbnail
from wegeft_cli.models.backbone import load_backbone
from wegeft_cli.models.base import quiet_transformers
from wegeft_cli.workflows.adapters import attach_files
from wegeft_cli.workflows.changes import Changes
from wegeft_cli.workflows.naming import find_module_name
from wegeft_cli.workflows.reporter import Reporter

_CUT = 0.5
_DIGITS = 4


def draw_maps(
    changes: Changes, pictures: Sequence[tuple[Path, Any]], reporter: Reporter
) -> list[dict[str, Any]]:
    """Project each image's tokens on the directions of every adapted layer.

    Args:
        changes: A WeGeFT adapter of a vision transformer.
        pictures: Image files, each with the image that was read.
        reporter: Where progress goes.

    Returns:
        Of each image: image, thumbnail (a PNG as data URI), modules: label, grid [rows, columns],
        maps [r][rows][columns], 0 or 0.5 to 1; where a module's output is not one vector a patch,
        no maps, and the reason.

    Raises:
        UserError: If the adapter or its base is none for images.
    """
    if changes.files is None:
        raise UserError("maps are drawn of WeGeFT adapters", key="--image")
    model, processor = _load(changes)
    # The maps are the encoder's: a head that was trained whole has no say.
    manifest = replace(changes.files.manifest, modules_to_save=())
    factors_alone = AdapterFiles(manifest, changes.files.factors, {})
    attach_files(model, factors_alone, changes.adapter_dir)
    model.eval()
    directions = _find_directions(changes)
    found = []
    with reporter.progress("drawing maps", len(pictures)) as advance:
        for number, (path, picture) in enumerate(pictures, start=1):
            pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
            with torch.no_grad(), _recorded(model, changes) as outputs:
                model(pixel_values=pixels.to(next(model.parameters()).dtype))
            grid = _find_grid(model.config, pixels)
            modules = [
                _make_maps(label, outputs[module], rows, C, grid)
                for label, module, rows, C in directions
            ]
            found.append(
                {"image": str(path), "thumbnail": make_thumbnail(picture), "modules": modules}
            )
            advance(number)
    return found


def normalise(scores: Tensor) -> Tensor:
    """Min-max normalise each map and cut what lies below one half.

    Args:
        scores: [tokens, r].

    Returns:
        The same shape, 0 or 0.5 to 1; a map without any contrast is 0.
    """
    low, high = scores.amin(dim=0), scores.amax(dim=0)
    spread = high - low
    scaled = (scores - low) / torch.where(spread > 0, spread, torch.ones_like(spread))
    return torch.where(scaled >= _CUT, scaled, torch.zeros_like(scaled))


def _find_directions(changes: Changes) -> list[tuple[str, str, Any, Tensor]]:
    """Give (label, module, rows, C) of each part; C is B without its scale."""
    assert changes.files is not None
    scale = changes.files.manifest.scale
    found = []
    for part in changes.parts:
        B, _ = changes.factors(part, changes.load_weight(part))
        found.append((part.label, part.module, part.rows, B / scale if scale else B))
    return found


def _make_maps(
    label: str, output: Tensor | None, rows: Any, C: Tensor, grid: tuple[int, int] | None
) -> dict[str, Any]:
    reason = None
    if output is None:
        reason = "the module took no part in the forward pass"
    elif output.ndim != 3 or output.shape[0] != 1:
        reason = "its output is cut into windows"
    else:
        tokens = output.shape[1]
        square = math.isqrt(tokens)
        if grid is None or tokens < math.prod(grid):
            grid = (square, square) if square**2 == tokens else None
        if grid is None:
            reason = f"its {tokens} outputs are no grid of patches"
    if reason is not None or output is None or grid is None:
        return {"label": label, "grid": None, "maps": [], "reason": reason}
    patches = output[0, output.shape[1] - math.prod(grid) :].double()
    if rows is not None:
        patches = torch.cat([patches[:, start:stop] for start, stop in rows], dim=1)
    maps = normalise(patches @ C).T.reshape(-1, *grid)
    rounded = [[[round(v, _DIGITS) for v in line] for line in one] for one in maps.tolist()]
    return {"label": label, "grid": list(grid), "maps": rounded, "reason": None}


def _find_grid(config: Any, pixels: Tensor) -> tuple[int, int] | None:
    """Give rows and columns of patches, where the model cuts the image once."""
    size = getattr(config, "patch_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return pixels.shape[-2] // height, pixels.shape[-1] // width


@contextmanager
def _recorded(model: nn.Module, changes: Changes) -> Iterator[dict[str, Tensor | None]]:
    """Keep the output of every adapted module, by its name in the files, while the block runs."""
    outputs: dict[str, Tensor | None] = dict.fromkeys((part.module for part in changes.parts), None)
    linears = find_linears(model)
    handles = []
    for stored in outputs:
        name = find_module_name(model, stored, linears)

        def keep(module: nn.Module, args: Any, output: Tensor, stored: str = stored) -> None:
            outputs[stored] = output.detach()

        assert name is not None  # attach_files has found it
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _load(changes: Changes) -> tuple[nn.Module, Any]:
    from transformers import AutoImageProcessor

    folder = str(changes.base_dir)
    try:
        with quiet_transformers():
            processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(
            f"the base is no model of images: {lines[0] if lines else error}",
            file=folder,
            key="--image",
        ) from None
    return load_backbone(changes.base_dir), processor
