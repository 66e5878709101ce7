"""Small classifiers and their rows: a ViT with images, an encoder with texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

try:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
except ImportError:  # transformers before 5.4
    from transformers import ViTImageProcessor as ViTImageProcessorPil

EDGE = 8


def _find_output() -> str:
    """Return what the installed transformers calls the output projection of a ViT's attention."""
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_hidden_layers=1))
    modules = dict(model.named_modules())
    names = ("o_proj", "attention.output.dense")
    (found,) = (name for name in names if any(each.endswith(f".{name}") for each in modules))
    return found


# As target, and as the group of tensors that such targets share.
VIT_OUTPUT = _find_output()
VIT_GROUP = VIT_OUTPUT.rpartition(".")[2]


def write_vit(folder: Path, **changes: Any) -> Path:
    """A two-block ViT for grey images of 8 x 8, with a head of its own for three other classes."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": EDGE,
        "patch_size": 4,
        "num_channels": 1,
        "initializer_range": 0.2,
        "id2label": {0: "x", 1: "y", 2: "z"},
        "label2id": {"x": 0, "y": 1, "z": 2},
    }
    ViTForImageClassification(ViTConfig(**{**settings, **changes})).save_pretrained(folder)
    write_processor(folder, num_channels=1)
    return folder


def write_processor(folder: Path, num_channels: int = 3, edge: int = EDGE) -> None:
    """What tells how images are scaled."""
    size = {"height": edge, "width": edge}
    half = [0.5] * num_channels
    ViTImageProcessorPil(size=size, image_mean=half, image_std=half).save_pretrained(folder)


def write_images(folder: Path, splits: dict[str, dict[str, int]]) -> Path:
    """`<split>/<class>/<n>.png`: dark images for the first class, lighter for the next, noisy."""
    random = np.random.default_rng(0)
    classes = sorted({name for split in splits.values() for name in split})
    for split, counts in splits.items():
        for name, count in counts.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                level = 60 * classes.index(name) + 30
                pixels = np.clip(random.normal(level, 12, (EDGE, EDGE)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:02d}.png")
    return folder


def write_bert(folder: Path, tokenizer: Any, *, pooler: bool = True) -> Path:
    """A two-layer BERT encoder with its tokenizer and no head."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_texts(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(folder: Path, name: str = "tiny", **sections: Any) -> Path:
    """A small classification recipe; sections are merged over it."""
    values: dict[str, Any] = {
        "seed": 7,
        "output_dir": str(folder / "runs" / name),
        "task": "image_classification",
        "model": {},
        "adapter": {"r": 4, "alpha": 4, "target_modules": [VIT_OUTPUT], "init": "psi_zero"},
        "data": {},
        "train": {
            "per_device_train_batch_size": 4,
            "num_train_epochs": 8,
            "learning_rate": 0.02,
            "save_steps": 0,
        },
    }
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
