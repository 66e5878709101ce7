"""Tiny checkpoints of every family, with a tokenizer or an image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

try:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
except ImportError:  # transformers before 5.4
    from transformers import ViTImageProcessor as ViTImageProcessorPil

from families.names import DIMENSIONS, EDGE, EXTRA, VOCABULARY, WHOLE_MODEL, WITH_IMAGES

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
TEXTS = [
    "one two three four five six seven eight nine ten eleven twelve",
    "Below is a question. Write the answer. Question: Answer: true false yes no",
    "the sky is blue, the grass is green, a farmer has seventeen sheep",
]
_SMALL_STD = 0.1
_STD = 0.2


def build_tokenizer(task: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that adds BOS, and EOS to what a classifier reads."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A" if task == "causal_lm" else "<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def build_config(model_type: str) -> Any:
    """Return the config of a family with every dimension small and every dropout zero."""
    extra = EXTRA.get(model_type, {})
    return AutoConfig.for_model(model_type, **_shrink(AutoConfig.for_model(model_type), extra))


def _shrink(default: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that make a config of this class tiny."""
    values = default.to_dict()
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in DIMENSIONS and isinstance(value, int | float | None):
            if value is not None:
                found[key] = DIMENSIONS[key]
        elif isinstance(value, float | int) and not isinstance(value, bool) and "drop" in key:
            found[key] = type(value)(0)
    for key in ("layer_types", "layers_block_type"):
        kinds = list(dict.fromkeys(values.get(key) or ()))
        if len(kinds) > 1:
            found["num_hidden_layers"], found[key] = len(kinds), kinds
    if values.get("kv_lora_rank") and "num_key_value_heads" in values:
        found["num_key_value_heads"] = found["num_attention_heads"]
    specials = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    found |= {key: value for key, value in specials.items() if key in values}
    for key, value in values.items():
        is_token = key.endswith(("_token_id", "_token_index")) and key not in specials
        if is_token and isinstance(value, int) and value >= VOCABULARY:
            found[key] = VOCABULARY - 1
    for key in default.sub_configs:
        sub = getattr(default, key, None)
        if sub is not None:
            found[key] = {
                "model_type": sub.model_type,
                **_shrink(sub, {**EXTRA.get(sub.model_type, {}), **extra.get(key, {})}),
            }
    return {**found, **{k: v for k, v in extra.items() if k not in default.sub_configs}}


def write_checkpoint(task: str, model_type: str, folder: Path) -> None:
    """Write a family's tiny random checkpoint with all that loading it needs."""
    torch.manual_seed(0)
    config = build_config(model_type)
    if task == "image_classification":
        if model_type not in WHOLE_MODEL:
            names = {0: "x", 1: "y", 2: "z"}
            config.id2label, config.label2id = names, {name: n for n, name in names.items()}
        whole = model_type in WHOLE_MODEL
        kind = AutoModel if whole else AutoModelForImageClassification
        half = [0.5] * 3
        edge = read_edge(config)
        size = {"height": edge, "width": edge}
        ViTImageProcessorPil(size=size, image_mean=half, image_std=half).save_pretrained(folder)
    else:
        kind = AutoModelForCausalLM if task == "causal_lm" else AutoModel
        if task == "causal_lm" and model_type in WITH_IMAGES:
            kind = AutoModelForImageTextToText
        build_tokenizer(task).save_pretrained(folder)
    config.architectures = config.architectures or []
    model = kind.from_config(config).float()
    _spread(model)
    model.save_pretrained(folder)


def read_edge(config: Any) -> int:
    """Return the edge of the images that a config is made for."""
    size = getattr(config, "image_size", None) or EDGE
    return int(size[0] if isinstance(size, list | tuple) else size)


def _spread(model: nn.Module) -> None:
    """Draw weights large enough that every layer matters to the output."""
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_floating_point():
                    continue
                if parameter.ndim >= 2:
                    if parameter.numel() > 1 and float(parameter.std()) < _SMALL_STD:
                        width = parameter.shape[1:].numel()
                        parameter.normal_(0, min(_STD, 1.5 * width**-0.5))
                elif name in ("weight", "bias") or not parameter.any():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                # A row of zeros divides by zero in some norms, and published ones are not zero.
                module.weight[module.padding_idx].normal_(0, _STD)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    buffer.normal_(0, 0.1)
                elif name == "running_var":
                    buffer.uniform_(0.8, 1.2)


def write_rows(task: str, folder: Path, edge: int = EDGE) -> dict[str, list[dict[str, str]]]:
    """Write training and validation rows; return the recipe's data sources."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    if task == "image_classification":
        _write_images(folder / "images", edge)
        return {
            part: [{"path": str(folder / "images"), "split": part}]
            for part in ("train", "validation")
        }
    words = TEXTS[0].split()
    rows: list[dict[str, str]] = []
    for n in range(8):
        text = " ".join(words[: 1 + (5 * n) % 11])
        if task == "causal_lm":
            rows.append({"prompt": f"{text} ", "completion": " ".join(words[n : n + 1 + n % 3])})
        else:
            rows.append({"text": text, "label": ("yes", "no", "maybe")[n % 3]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {part: [{"path": str(path)}] for part in ("train", "validation")}


def _write_images(folder: Path, edge: int) -> None:
    random = np.random.default_rng(0)
    for part, count in (("train", 3), ("validation", 2)):
        for kind in range(3):
            place = folder / part / f"class{kind}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.normal(60 * kind + 60, 40, (edge, edge, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
