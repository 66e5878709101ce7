"""Token-clustering maps: an image's tokens projected on the directions C = W phi of each layer.

Source: the vision figures of arXiv 2312.00700v5. Each token's output y of an adapted layer is
projected on the r columns of C, which gives r maps over the image; each is min-max normalized and
values below one half are set to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.analysis.feature_maps import lay_out, recorded
from wegeft_cli.analysis.weight_changes import Changes
from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.run_directory import find_recipe_of
from wegeft_cli.errors import UserError
from wegeft_cli.inference.loaded_model import ModelTarget
from wegeft_cli.methods.layers.targets import find_linears
from wegeft_cli.methods.wegeft.layer_names import find_module_name
from wegeft_cli.methods.wegeft.save_load import attach_files
from wegeft_cli.models.heads import image_inputs
from wegeft_cli.models.image_processor import make_array, make_picture, make_thumbnail
from wegeft_cli.models.loading import load_backbone, load_image_processor
from wegeft_cli.reporter import Reporter
from wegeft_cli.tasks.support.classifier import build_transform

_CUT = 0.5
_DIGITS = 4


def draw_maps(
    changes: Changes, pictures: Sequence[tuple[Path, Any]], reporter: Reporter
) -> list[dict[str, Any]]:
    """Project each image's tokens on the directions of every adapted layer.

    Returns:
        For each image: image, thumbnail (the model's view, a PNG as data URI), modules: label, grid
        [rows, columns], maps [r][rows][columns], 0 or 0.5 to 1; if a module's output is not one
        vector per patch, no maps, and the reason.

    Raises:
        UserError: If the adapter or its base is not for images.
    """
    if changes.files is None:
        raise UserError("maps are drawn of WeGeFT adapters", key="--image")
    model, see = _load(changes)
    # The maps show the encoder; a trained head does not affect them.
    manifest = replace(changes.files.manifest, modules_to_save=())
    factors_alone = AdapterFiles(manifest, changes.files.factors, {})
    attach_files(model, factors_alone, changes.adapter_dir)
    model.eval()
    directions = _find_directions(changes)
    names = _find_names(model, changes)
    found = []
    with reporter.progress("drawing maps", len(pictures)) as advance:
        for number, (path, picture) in enumerate(pictures, start=1):
            seen = see(picture)
            with torch.no_grad(), recorded(model, names) as recording:
                pixels = seen.pixels[None].to(next(model.parameters()).dtype)
                model(**image_inputs(model, pixels))
            grid = _find_grid(model.config, pixels)
            kind = model.config.model_type  # type: ignore[union-attr]
            modules = [
                _make_maps(label, *lay_out(recording, module, grid, kind), rows, C)  # type: ignore[arg-type]
                for label, module, rows, C in directions
            ]
            thumbnail = make_thumbnail(seen.show())
            found.append({"image": str(path), "thumbnail": thumbnail, "modules": modules})
            advance(number)
    return found


def normalise(scores: Tensor) -> Tensor:
    """Min-max normalize each map of [tokens, r], and set values below 0.5 to 0.

    A map without any contrast becomes 0.
    """
    low, high = scores.amin(dim=0), scores.amax(dim=0)
    spread = high - low
    scaled = (scores - low) / torch.where(spread > 0, spread, torch.ones_like(spread))
    return torch.where(scaled >= _CUT, scaled, torch.zeros_like(scaled))


def _find_directions(changes: Changes) -> list[tuple[str, str, Any, Tensor]]:
    """Return (label, module, rows, C) of each part; C is B without its scale."""
    assert changes.files is not None
    scale = changes.files.manifest.scale
    found = []
    for part in changes.parts:
        B, _ = changes.factors(part, changes.load_weight(part))
        found.append((part.label, part.module, part.rows, B / scale if scale else B))
    return found


def _make_maps(
    label: str, plane: Tensor | None, reason: str | None, rows: Any, C: Tensor
) -> dict[str, Any]:
    if plane is None:
        return {"label": label, "grid": None, "maps": [], "reason": reason}
    height, width, _ = plane.shape
    patches = plane.reshape(height * width, -1).double()
    if rows is not None:
        patches = torch.cat([patches[:, start:stop] for start, stop in rows], dim=1)
    maps = normalise(patches @ C).T.reshape(-1, height, width)
    rounded = [[[round(v, _DIGITS) for v in line] for line in one] for one in maps.tolist()]
    return {"label": label, "grid": [height, width], "maps": rounded, "reason": None}


def _find_grid(config: Any, pixels: Tensor) -> tuple[int, int] | None:
    """Return rows and columns of patches, if the model cuts the image into patches once."""
    size = getattr(config, "patch_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return pixels.shape[-2] // height, pixels.shape[-1] // width


def _find_names(model: nn.Module, changes: Changes) -> dict[str, str]:
    """Return the model's name of each adapted module, by its name in the files."""
    linears = find_linears(model)
    names = {}
    recorded = {} if changes.files is None else changes.files.manifest.checkpoint_names
    for part in changes.parts:
        name = find_module_name(model, part.module, linears, recorded)
        assert name is not None  # attach_files has found it
        names[part.module] = name
    return names


@dataclass(frozen=True)
class _Seen:
    """The model's view of an image.

    Args:
        pixels: `[channels, height, width]`, scaled.
        mean: The mean that was subtracted from each channel.
        std: The divisor of each channel.
    """

    pixels: Tensor
    mean: Sequence[float]
    std: Sequence[float]

    def show(self) -> Any:
        """Return the view as a picture; the maps are drawn over it, not over the file's image."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return make_picture(self.pixels.float() * std + mean)


def _load(changes: Changes) -> tuple[nn.Module, Callable[[Any], _Seen]]:
    """Load the base without its head, and the function that makes its input from an image.

    A classifier's adapter stores its preprocessing; otherwise the base's processor is used.
    """
    folder = str(changes.base_dir)
    try:
        processor = load_image_processor(folder)
    except UserError as error:
        raise UserError(
            f"the base is no model of images: {error.message}", file=folder, key="--image"
        ) from None
    model = load_backbone(changes.base_dir)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    mode = "L" if len(mean) == 1 else "RGB"
    recipe = find_recipe_of(changes.adapter_dir)
    target = ModelTarget.resolve(changes.adapter_dir, recipe, base=folder)
    if target.head is not None:
        transform = build_transform(target.classifier()[1], processor, model.config)
        return model, lambda picture: _Seen(transform(picture.convert(mode)), mean, std)

    def see(picture: Any) -> _Seen:
        channels = {"input_data_format": "channels_first"} if mode == "L" else {}
        given = make_array(picture.convert(mode))
        made = processor(images=given, return_tensors="pt", **channels)["pixel_values"]
        return _Seen(made[0], mean, std)

    return model, see
