"""Image files read and made small by Pillow."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wegeft_cli.errors import UserError

_THUMBNAIL = 160  # pixels of the longer edge


def read_image(path: Path) -> Any:
    """Read an image file as RGB.

    Args:
        path: The file.

    Returns:
        A Pillow image.

    Raises:
        UserError: If it is missing, no image or too large, or Pillow is not installed.
    """
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
    """Give a picture's values, uint8: [3, height, width] of colours, [1, height, width] of grey."""
    values = np.asarray(picture)
    return values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)


def make_picture(values: Tensor) -> Any:
    """Give values as a picture.

    Args:
        values: [channels, height, width] from 0 to 1; what lies beyond is cut.

    Returns:
        A Pillow image, grey of one channel.
    """
    from PIL import Image

    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def make_thumbnail(picture: Any) -> str:
    """Give a small PNG of an image as a data URI."""
    small = picture.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
