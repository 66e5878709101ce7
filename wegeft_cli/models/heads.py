"""The head of a classifier: its outputs, what they are called, and which modules make it up."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from wegeft_cli.errors import BaseModelError
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
    """Find the modules that a classifier has beyond its backbone: those are new for each task."""
    prefix = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, child in model.named_children()
        if name != prefix and any(True for _ in child.parameters())
    ]


def make_fresh(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Draw a head anew: normal weights of the model's own width, no bias."""
    std = getattr(model.config, "initializer_range", None) or _STD
    for name in names:
        for part, module in model.get_submodule(name).named_modules(prefix=name):
            for kind, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.LayerNorm):
                    parameter.data.fill_(1.0 if kind == "weight" else 0.0)
                elif kind == "bias":
                    parameter.data.zero_()
                else:
                    # torch reads the lower 32 bits of a seed alone.
                    mixed = zlib.crc32(f"{seed} {part}.{kind}".encode())
                    random = torch.Generator().manual_seed(mixed)
                    drawn = torch.randn(parameter.shape, generator=random) * std
                    parameter.data.copy_(drawn)


def check_loaded(missing: Collection[str], head: Collection[str], saved: Collection[str]) -> None:
    """Refuse a base that leaves a part of the backbone without trained weights.

    Raises:
        UserError: If others are missing: they would stay random.
    """
    lost = sorted({name.rpartition(".")[0] for name in missing if name.split(".")[0] not in head})
    lost = [name for name in lost if not any(_covers(asked, name) for asked in saved)]
    if lost:
        raise BaseModelError(
            f"the base holds no weights for {', '.join(lost[:3])}: they would stay random",
            hint=f"train them: `adapter.modules_to_save: [{lost[0]}]`",
        )


def _covers(asked: str, name: str) -> bool:
    return f".{asked}." in f".{name}."


def image_options(model: nn.Module, image_size: int) -> dict[str, Any]:
    """Return what a model's forward needs for images of another size than it was trained on."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    own = getattr(base.config, "image_size", image_size)
    own = own[0] if isinstance(own, list | tuple) else own
    takes = "interpolate_pos_encoding" in inspect.signature(base.forward).parameters
    return {"interpolate_pos_encoding": True} if takes and own != image_size else {}


def finish_head(model: Any, head: HeadSpec, saved: Sequence[str], seed: int) -> None:
    """Draw the head anew where the base has none for these classes, and check the backbone.

    Raises:
        UserError: If a part of the backbone has no weights and is not trained.
    """
    names = find_head_modules(model)
    missing = model.missing_weights
    check_loaded(missing, names, saved)
    if not head.keeps_base_head or any(name.split(".")[0] in names for name in missing):
        make_fresh(model, names, seed)
    if head.drop_path_rate is not None and not hasattr(model.config, "drop_path_rate"):
        check_drop_path(model)


def pad_as_tokenizer(model: Any, tokenizer: Any) -> None:
    """Copy the tokenizer's padding id: decoders find a row's last token by it.

    The tokenizer pads, so its padding id takes precedence over the configuration's.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is not None:
        model.config.pad_token_id = pad


def with_head(section: AdapterSection, model: nn.Module) -> AdapterSection:
    """Return the recipe's `adapter` with the head's modules first among those trained whole.

    `model` is the base before an adapter is injected; it may be on the meta device.
    """
    names = dict.fromkeys([*find_head_modules(model), *section.modules_to_save])
    return replace(section, modules_to_save=list(names))
