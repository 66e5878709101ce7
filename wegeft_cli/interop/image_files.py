"""Image files read and made small by Pillow."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

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


def make_thumbnail(picture: Any) -> str:
    """Give a small PNG of an image as a data URI."""
    small = picture.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
