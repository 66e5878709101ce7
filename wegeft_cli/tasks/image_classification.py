"""Image classification: one image, and its class."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import DataSource, ModelSection, Recipe
from wegeft_cli.tasks.base import TaskData
from wegeft_cli.tasks.classification import LANGUAGE_ONLY, ClassificationTask

if TYPE_CHECKING:
    from wegeft_cli.data.batches.base import BatchShape
    from wegeft_cli.data.batches.labelled import Collator
    from wegeft_cli.data.labelled.texts import LabelledRows

_EDGE = 224


class ImageClassification(ClassificationTask):
    """The rows are image files, decoded and transformed for each batch."""

    auto_class = "AutoModelForImageClassification"
    noun = "image classifier"
    peft_task_type = None
    pipeline_tag = "image-classification"
    reads_images = True
    row_noun = "images"
    ignored_keys = (
        *LANGUAGE_ONLY, "train.neftune_noise_alpha", "train.group_by_length",
        "train.max_tokens_per_pass", "data.max_length"
    )  # fmt: skip

    def check_sources(self, recipe: Recipe) -> Iterator[Fault]:
        if recipe.data.problem_type == "regression":
            message = (
                "'regression' is for sequence_classification; `task` is 'image_classification'"
            )
            yield "data.problem_type", message, "use `single_label_classification`"

    def load_processor(self, section: ModelSection) -> Any:
        from wegeft_cli.models.loading import load_image_processor

        return load_image_processor(
            section.name_or_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )

    def read_source(
        self, recipe: Recipe, source: DataSource, recipe_dir: Path | None
    ) -> LabelledRows:
        from wegeft_cli.data.labelled.images import read_images

        return read_images(source, recipe_dir=recipe_dir)

    def check_rows(self, data: Any) -> None:
        from wegeft_cli.errors import raise_all
        from wegeft_cli.models.image_processor import check_images

        held_out = [] if data.validation is None else data.validation.shown
        raise_all(check_images([*data.train.shown, *held_out]))

    def check_model(self, recipe: Recipe, skeleton: Any, data: TaskData | None) -> None:
        from wegeft_cli.errors import BaseModelError

        super().check_model(recipe, skeleton, data)
        if "pixel_values" not in inspect.signature(skeleton.forward).parameters:
            raise BaseModelError(
                f"{type(skeleton).__name__} reads no pixels: its inputs are tokens that another "
                "program makes of an image",
                hint="take another image model, such as a ViT",
            )

    def collator(self, recipe: Recipe, processor: Any, model: Any) -> Collator:
        import torch

        from wegeft_cli.data.batches.labelled import ImageCollator
        from wegeft_cli.models.heads import image_inputs
        from wegeft_cli.tasks.support.classifier import build_transform

        transform = build_transform(recipe, processor, model.config)
        finish = partial(image_inputs, model)
        finish(torch.zeros(1, len(transform.mean), transform.size, transform.size))
        return ImageCollator(transform, finish)

    def fake_inputs(self, model: Any, recipe: Recipe, shape: BatchShape) -> dict[str, Any]:
        import torch

        from wegeft_cli.models.heads import image_inputs

        config = model.config
        own = getattr(config, "image_size", _EDGE)
        own = own[0] if isinstance(own, list | tuple) else own
        edge = recipe.data.image_size or own
        first = next(model.parameters())
        size = (shape.num_sequences, getattr(config, "num_channels", 3), edge, edge)
        pixels = torch.zeros(size, dtype=first.dtype, device=first.device)
        return image_inputs(model, pixels)

    def digest_inputs(
        self, recipe: Recipe, recipe_dir: Path | None, processor: Any
    ) -> dict[str, Any]:
        return {"tokenizer_sha256": None}


TASK = ImageClassification()
