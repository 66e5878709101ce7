"""Transforms against torch's own interpolation and by hand; random ones hang on their seed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from wegeft_cli.errors import UserError
from wegeft_cli.models.image_processor import ImageTransform, check_images, decode_image, short_side

HALF = ((0.5,) * 3, (0.5,) * 3)
FLOAT32 = 1e-5


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_published_short_sides():
    assert [short_side(size) for size in (224, 448, 384)] == [256, 512, 438]


def test_values_are_scaled_by_mean_and_deviation():
    image = Image.new("RGB", (8, 8), (0, 255, 51))
    transform = ImageTransform(8, "resize", (0.5, 0.5, 0.2), (0.5, 0.25, 1.0))
    assert torch.allclose(transform(image)[:, 0, 0], torch.tensor([-1.0, 2.0, 0.0]), atol=FLOAT32)


def test_resize_loses_the_aspect_and_does_not_antialias():
    image = make_image(40, 20)
    found = ImageTransform(8, "resize", *HALF)(image, np.random.default_rng(0))
    rows = np.asarray(image, dtype=np.float64) / 255 * 2 - 1
    # Pixel (1, 3) of 8 x 8 lies at ((1 + .5) * 20 / 8 - .5, (3 + .5) * 40 / 8 - .5).
    y, x = (1 + 0.5) * 20 / 8 - 0.5, (3 + 0.5) * 40 / 8 - 0.5
    top, left = int(y), int(x)
    wy, wx = y - top, x - left
    square = rows[top : top + 2, left : left + 2]
    expected = (
        square[0, 0] * (1 - wy) * (1 - wx)
        + square[0, 1] * (1 - wy) * wx
        + square[1, 0] * wy * (1 - wx)
        + square[1, 1] * wy * wx
    )
    assert np.allclose(found[:, 1, 3].numpy(), expected, atol=FLOAT32)


def test_crop_takes_the_centre_of_the_short_side_when_scored():
    image = make_image(30, 16)  # the short side is that of 14 already
    found = ImageTransform(14, "crop_flip", *HALF)(image)
    centre = np.asarray(image, dtype=np.float32)[1:15, 8:22].transpose(2, 0, 1) / 255 * 2 - 1
    assert np.allclose(found.numpy(), centre, atol=FLOAT32)


@pytest.mark.parametrize(("kind", "flips"), [("crop_flip", True), ("crop", False)])
def test_training_crops_lie_in_the_image_and_flip_where_asked(kind, flips):
    image = make_image(20, 16)
    whole = torch.from_numpy(np.asarray(image).transpose(2, 0, 1) / 255 * 2 - 1).float()
    transform = ImageTransform(14, kind, *HALF)
    seen, flipped = set(), 0
    for seed in range(40):
        found = transform(image, np.random.default_rng(seed))
        windows = {}
        for top in range(3):
            for left in range(7):
                part = whole[:, top : top + 14, left : left + 14]
                windows[top, left, 0] = torch.allclose(part, found, atol=FLOAT32)
                windows[top, left, 1] = torch.allclose(part.flip(-1), found, atol=FLOAT32)
        (place,) = [key for key, is_it in windows.items() if is_it]
        seen.add(place[:2])
        flipped += place[2]
    assert len(seen) > 10
    assert (10 < flipped < 30) if flips else flipped == 0


def test_one_seed_gives_one_picture():
    transform, image = ImageTransform(14, "crop_flip", *HALF), make_image(30, 20)
    one, two, other = (transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_grey_colour_bytes_and_rotated_photos(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (4, 2), (255, 0, 0, 10)).save(path)
    assert decode_image(path, num_channels=1).mode == "L"
    assert decode_image(path.read_bytes(), num_channels=3).getpixel((0, 0)) == (255, 0, 0)
    turned = Image.new("RGB", (4, 2))
    notes = turned.getexif()
    notes[0x0112] = 6  # a camera held upright
    stream = io.BytesIO()
    turned.save(stream, "jpeg", exif=notes)
    assert decode_image(stream.getvalue(), num_channels=3).size == (2, 4)


def test_what_cannot_be_read_is_named(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("L", (2, 2)).save(good)
    bad.write_bytes(b"no image")
    (fault,) = check_images([good, bad, b"bytes are looked at when they are used"])
    assert fault.file == str(bad)
    with pytest.raises(UserError, match="no image that can be read"):
        decode_image(bad, num_channels=3)
