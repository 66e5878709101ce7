"""Image transforms of FGVC and VTAB-1k, with Pillow."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wegeft_cli.errors import UserError

_FLIP_PROBABILITY = 0.5
_BYTE = 255.0


@dataclass(frozen=True)
class ImageTransform:
    """Preprocessing of an image for a classifier.

    Args:
        size: Edge of the square, in pixels.
        kind: crop_flip, crop or resize, see `data.image_transform`.
        mean: Per channel, from 0 to 1; one channel is gray, three are red, green, blue.
        std: Per channel.
    """

    size: int
    kind: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Any, random: np.random.Generator | None = None) -> Tensor:
        """Transform a Pillow image to `[channels, size, size]`, float32.

        The values are (value / 255 - mean) / std. `random` draws crop and flip; None crops the
        center and does not flip.
        """
        if self.kind == "resize":
            pixels = _resize_plainly(_as_tensor(image), self.size)
        else:
            image = _crop(_resize_short_side(image, short_side(self.size)), self.size, random)
            pixels = _as_tensor(image)
            flips = self.kind == "crop_flip" and random is not None
            if flips and random is not None and random.random() < _FLIP_PROBABILITY:
                pixels = pixels.flip(-1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels / _BYTE - mean) / std

    def load(self, source: Path | bytes, random: np.random.Generator | None = None) -> Tensor:
        """Decode and transform an image from a path or from a file's bytes."""
        return self(decode_image(source, num_channels=len(self.mean)), random)


def short_side(size: int) -> int:
    """Return the short side before the crop: 256 for 224, 512 for 448, 438 for 384."""
    return size * 8 // 7


def decode_image(source: Path | bytes, *, num_channels: int) -> Any:
    """Decode an image (a path, or a file's bytes), rotated as its metadata says.

    `num_channels` is 1 for gray, 3 for color.
    """
    image_module = _import_pillow()
    from PIL import ImageOps

    try:
        with image_module.open(
            io.BytesIO(source) if isinstance(source, bytes) else source
        ) as image:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("L" if num_channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise _unreadable(source, error) from error


def check_images(sources: Sequence[Path | bytes], *, limit: int = 5) -> list[UserError]:
    """Read the header of every image file and return the errors, at most `limit`."""
    image_module = _import_pillow()
    faults: list[UserError] = []
    for source in sources:
        if isinstance(source, bytes):
            continue
        try:
            with image_module.open(source):
                pass
        except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
            faults.append(_unreadable(source, error))
            if len(faults) == limit:
                break
    return faults


def read_size(source: Path | bytes) -> tuple[tuple[int, int], str]:
    """Read (width, height) in pixels and Pillow's name of the mode from an image's header."""
    image_module = _import_pillow()
    try:
        with image_module.open(
            io.BytesIO(source) if isinstance(source, bytes) else source
        ) as image:
            return image.size, image.mode
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise _unreadable(source, error) from error


def _import_pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            "images need the package Pillow",
            key="task",
            hint="pip install 'wegeft-cli[vision]'",
        ) from error
    return Image


def _unreadable(source: Path | bytes, error: Exception) -> UserError:
    place = "an image in the table" if isinstance(source, bytes) else str(source)
    return UserError(f"no image that can be read: {error}", file=place, hint="leave it out")


def _as_tensor(image: Any) -> Tensor:
    """Return an image as `[channels, height, width]`, float32 from 0 to 255."""
    pixels = np.array(image, dtype=np.float32)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def _resize_short_side(image: Any, target: int) -> Any:
    """Resize bilinearly with antialiasing and the aspect kept (long side rounded down)."""
    width, height = image.size
    if min(width, height) == target:
        return image
    short = min(width, height)
    new = (
        (target, target * height // width) if width == short else (target * width // height, target)
    )
    return image.resize(new, _import_pillow().Resampling.BILINEAR)


def _crop(image: Any, size: int, random: np.random.Generator | None) -> Any:
    width, height = image.size
    if random is None:
        left, top = round((width - size) / 2), round((height - size) / 2)
    else:
        top = int(random.integers(height - size + 1))
        left = int(random.integers(width - size + 1))
    return image.crop((left, top, left + size, top + size))


def _resize_plainly(pixels: Tensor, size: int) -> Tensor:
    """Resize bilinearly between pixel centers without antialiasing, as `tf.image.resize`."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return torch.nn.functional.interpolate(
        pixels[None], (size, size), mode="bilinear", align_corners=False
    )[0]


_THUMBNAIL = 160  # pixels of the longer edge


def read_image(path: Path) -> Any:
    """Read an image file as RGB."""
    try:
        from PIL import Image
    except ImportError:
        hint = "pip install 'wegeft-cli[plot]'"
        raise UserError("images need Pillow", key="--image", hint=hint) from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read this image: {error}", file=str(path), key="--image") from None


def make_array(picture: Any) -> np.ndarray:
    """Return an image as uint8: [3, height, width] in color, or [1, height, width] in gray."""
    values = np.asarray(picture)
    return values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)


def make_picture(values: Tensor) -> Any:
    """Convert [channels, height, width] to a Pillow image; values are clipped to 0 to 1."""
    from PIL import Image

    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def make_thumbnail(picture: Any) -> str:
    """Return a small PNG of an image as a data URI."""
    small = picture.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
