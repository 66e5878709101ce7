"""Write scikit-learn's digits as image folders, and a small ViT pre-trained on some of the classes.

The 1,797 images of 8 x 8 grey pixels (UCI, handwritten by 43 people) become PNG files:
`<folder>/images/<split>/<digit>/<number>.png`, where `base` are the digits 0 to 4, on which a ViT
learns from scratch, and `train`, `validation` and `test` are the digits 5 to 9, which it has not
seen. The ViT is saved as an ordinary checkpoint without a head for those.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

BASE_CLASSES = range(5)
NUM_TRAIN, NUM_VALIDATION = 250, 100
SEED = 0
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 64, 1e-3
EDGE, GREYS = 8, 16


def write_images(folder: Path) -> None:
    """Write the images, the new digits cut into splits by one fixed order."""
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))
    new = [i for i in order if digits.target[i] not in BASE_CLASSES]
    splits = {
        "base": [i for i in order if digits.target[i] in BASE_CLASSES],
        "train": new[:NUM_TRAIN],
        "validation": new[NUM_TRAIN : NUM_TRAIN + NUM_VALIDATION],
        "test": new[NUM_TRAIN + NUM_VALIDATION :],
    }
    for split, numbers in splits.items():
        for i in numbers:
            place = folder / split / str(digits.target[i])
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.round(digits.images[i] * 255 / GREYS).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{i:04d}.png")
        print(f"{split}: {len(numbers)} images")


def build_model() -> ViTForImageClassification:
    """Build the ViT: 4 blocks, 64 wide, 16 patches of 2 x 2 pixels; 202,000 parameters."""
    torch.manual_seed(SEED)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            image_size=EDGE,
            patch_size=2,
            num_channels=1,
            num_labels=len(BASE_CLASSES),
            id2label={i: str(i) for i in BASE_CLASSES},
            label2id={str(i): i for i in BASE_CLASSES},
        )
    )


def train(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Train on all images of the base classes, shifted by up to a pixel; give the last loss."""
    random = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, NUM_STEPS)
    model.train()
    loss = torch.zeros(())
    for _ in range(NUM_STEPS):
        rows = torch.randint(len(pixels), (BATCH_SIZE,), generator=random)
        down, right = torch.randint(-1, 2, (2,), generator=random).tolist()
        batch = torch.roll(pixels[rows], (down, right), (-2, -1))
        loss = nn.functional.cross_entropy(model(pixel_values=batch).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def main() -> None:
    """Write images and model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".cache/digits"))
    folder = parser.parse_args().folder
    if (folder / "model" / "config.json").is_file():
        print(f"{folder} is there already")
        return
    write_images(folder / "images")
    digits = load_digits()
    chosen = np.isin(digits.target, list(BASE_CLASSES))
    scaled = digits.images[chosen] * (255 / GREYS)
    pixels = torch.tensor(np.round(scaled) / 255 * 2 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target[chosen])
    model = build_model()
    start = time.perf_counter()
    loss = train(model, pixels, labels)
    seconds = time.perf_counter() - start
    print(f"pre-trained on {len(pixels)} images in {seconds:.0f} s, last loss {loss:.4f}")
    model.save_pretrained(folder / "model")
    size = {"height": EDGE, "width": EDGE}
    ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        folder / "model"
    )
    print(f"model: {folder / 'model'}")


if __name__ == "__main__":
    main()
