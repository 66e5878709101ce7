"""The head of a classifier: its outputs, what they are called, and which modules make it up."""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.artifacts.stored_names import spell_name
from wegeft_cli.errors import BaseModelError, UserError
from wegeft_cli.models.completeness import refuse_missing
from wegeft_cli.models.context import check_token_ids
from wegeft_cli.models.module_names import is_inside_any, unwrap
from wegeft_cli.models.running_statistics import has_statistics
from wegeft_cli.models.stochastic_depth import check_drop_path
from wegeft_cli.recipe.schema import AdapterSection

_STD = 0.02


@dataclass(frozen=True)
class HeadSpec:
    """What a classifier's head is to be.

    Args:
        task: sequence_classification or image_classification.
        labels: Class names in the order of the outputs; none of a regression.
        problem_type: single_label_classification or regression.
        keeps_base_head: The base's head has exactly these classes, and is the start.
        drop_path_rate: Stochastic depth; None leaves the model's own.
    """

    task: str
    labels: tuple[str, ...]
    problem_type: str = "single_label_classification"
    keeps_base_head: bool = False
    drop_path_rate: float | None = None

    @property
    def auto_class(self) -> str:
        """Class of transformers that loads the model: `AutoModelForSequenceClassification`."""
        return "AutoModelFor" + "".join(word.title() for word in self.task.split("_"))

    @property
    def noun(self) -> str:
        """The model in words, e.g. "sequence classifier"."""
        return self.task.replace("_", " ").replace("classification", "classifier")

    def apply(self, config: Any) -> None:
        """Write the head into a model's configuration."""
        names = self.labels or ("value",)
        config.num_labels = len(names)  # a value of its own in PVT
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        config.problem_type = self.problem_type
        if self.drop_path_rate is not None and hasattr(config, "drop_path_rate"):
            config.drop_path_rate = self.drop_path_rate


def read_labels(config: Any) -> tuple[str, ...]:
    """Return the class names of a configuration in the order of the outputs."""
    names = getattr(config, "id2label", None) or {}
    return tuple(str(names[number]) for number in sorted(names))


def find_head_modules(model: Any) -> list[str]:
    """Find the modules that a classifier adds to its backbone, which every task trains.

    They are the children beside the backbone, or the output layers if the class does not keep its
    backbone in one child. A child with running statistics belongs to the backbone.
    """
    prefix = getattr(model, "base_model_prefix", "")
    children = dict(model.named_children())
    beside = [
        name
        for name, child in children.items()
        if name != prefix and any(True for _ in child.parameters()) and not has_statistics(child)
    ]
    return beside if beside and prefix in children else find_output_modules(model)


def find_output_modules(model: Any) -> list[str]:
    """Find the layers of a classifier whose shape depends on the number of labels."""
    config = copy.deepcopy(model.config)
    config.num_labels += 1
    with torch.device("meta"):
        other = type(model)(config)
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    names = [
        name.rpartition(".")[0]
        for name, parameter in model.named_parameters()
        if name in shapes and shapes[name] != parameter.shape
    ]
    return list(dict.fromkeys(names))


def make_fresh(model: nn.Module, names: Collection[str], seed: int) -> None:
    """Draw parameters anew: normal weights of the model's own width, no bias, unit norms."""
    std = getattr(model.config, "initializer_range", None) or _STD
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        if name.endswith("bias"):
            parameter.data.zero_()
        elif parameter.ndim == 1 and name.endswith("weight"):
            parameter.data.fill_(1.0)
        else:
            # torch reads the lower 32 bits of a seed alone.
            mixed = zlib.crc32(f"{seed} {name}".encode())
            random = torch.Generator().manual_seed(mixed)
            drawn = torch.randn(parameter.shape, generator=random) * std
            parameter.data.copy_(drawn)


def check_loaded(missing: Mapping[str, str], trained: Collection[str]) -> None:
    """Refuse a base that leaves a part of the backbone without trained weights.

    `trained` are the modules that are trained whole.

    Raises:
        UserError: If others are missing: they would stay random.
    """
    lost = {name: reason for name, reason in missing.items() if not is_inside_any(name, trained)}
    if lost:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in lost))
        shown = ", ".join(f"{name}{reason}" for name, reason in list(lost.items())[:5])
        raise BaseModelError(
            f"the base holds no weights for {shown}: they would stay random",
            hint=f"fetch the base again, or train them: `adapter.modules_to_save: [{modules[0]}]`",
        )


def image_inputs(model: nn.Module, pixels: Tensor) -> dict[str, Any]:
    """Return what a model's forward takes for square images, `[images, channels, size, size]`.

    Raises:
        UserError: If the model cuts images into patches of a size that does not divide theirs.
    """
    base = unwrap(model)
    known = inspect.signature(base.forward).parameters
    size = pixels.shape[-1]
    if "spatial_shapes" in known:
        return _cut_patches(pixels, base.config.vision_config.patch_size)
    own = getattr(base.config, "image_size", size)
    own = own[0] if isinstance(own, list | tuple) else own
    takes = "interpolate_pos_encoding" in known and own != size
    return {"pixel_values": pixels, **({"interpolate_pos_encoding": True} if takes else {})}


def _cut_patches(pixels: Tensor, patch: int) -> dict[str, Any]:
    """Return images as rows of patches (SigLIP 2), each patch row by row, its channels last."""
    count, channels, size, _ = pixels.shape
    if size % patch:
        raise UserError(
            f"images of {size} pixels are no whole number of patches of {patch}",
            key="data.image_size",
            hint=f"use a multiple of {patch}, such as {max(1, size // patch) * patch}",
        )
    edge = size // patch
    parts = pixels.reshape(count, channels, edge, patch, edge, patch)
    rows = parts.permute(0, 2, 4, 3, 5, 1).reshape(count, edge * edge, -1)
    shapes = torch.full((count, 2), edge, dtype=torch.int64, device=pixels.device)
    mask = torch.ones(rows.shape[:2], dtype=torch.int64, device=pixels.device)
    return {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def finish_head(
    model: Any, head: HeadSpec, saved: Sequence[str], seed: int, *, trains_all: bool = False
) -> None:
    """Draw anew what the base lacks or has for other classes, and check the backbone.

    Other loaded weights stay as they are.

    Args:
        saved: Modules beside the head that are trained whole.
        trains_all: Whether every parameter is trained.

    Raises:
        UserError: If a part of the backbone has no weights and is not trained.
    """
    missing = model.missing_weights
    if not trains_all:
        check_loaded(missing, [*find_head_modules(model), *saved])
    fresh = set(missing)
    if not head.keeps_base_head:
        outputs = tuple(f"{name}." for name in find_output_modules(model))
        fresh |= {name for name, _ in model.named_parameters() if name.startswith(outputs)}
    make_fresh(model, fresh, seed)
    if head.drop_path_rate is not None and not hasattr(model.config, "drop_path_rate"):
        check_drop_path(model)


def check_provided(model: Any, name_or_path: str, provided: Set[str]) -> None:
    """Raise BaseModelError if a classifier lacks weights that its adapter does not provide."""
    prefix = getattr(model, "base_model_prefix", "")
    missing = {
        name: reason
        for name, reason in model.missing_weights.items()
        if provided.isdisjoint(spell_name(name, prefix))
    }
    refuse_missing(model, missing, name_or_path)


def pad_as_tokenizer(model: Any, tokenizer: Any) -> None:
    """Copy the tokenizer's padding id: decoders find a row's last token by it.

    The tokenizer pads, so its padding id takes precedence over the configuration's.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is not None:
        check_token_ids(model, pad, key="model.name_or_path")
        # transformers reads a multimodal model's id from the configuration of its text part.
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = pad


def with_head(section: AdapterSection, model: nn.Module) -> AdapterSection:
    """Return the recipe's `adapter` with the head's modules first among those trained whole.

    `model` is the base before an adapter is injected; it may be on the meta device.
    """
    names = dict.fromkeys([*find_head_modules(model), *section.modules_to_save])
    return replace(section, modules_to_save=list(names))
