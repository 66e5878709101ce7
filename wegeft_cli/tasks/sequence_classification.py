"""Sequence classification: one text or a pair, and a class or a number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import DataSource, ModelSection, Recipe
from wegeft_cli.tasks.base import TaskData, refuse_image_folders
from wegeft_cli.tasks.causal_lm import check_context
from wegeft_cli.tasks.classification import LANGUAGE_ONLY, ClassificationTask

if TYPE_CHECKING:
    from torch import nn

    from wegeft_cli.data.batches.base import BatchShape
    from wegeft_cli.data.batches.labelled import Collator
    from wegeft_cli.data.batches.layout import Kind, Layout
    from wegeft_cli.data.labelled.texts import LabelledRows
    from wegeft_cli.models.heads import HeadSpec


class SequenceClassification(ClassificationTask):
    """The rows are tokenized texts.

    The layers see them end to end. Where that changes a row's logits, they are padded on the right,
    or laid out as `find_layout` finds.
    """

    auto_class = "AutoModelForSequenceClassification"
    noun = "sequence classifier"
    peft_task_type = "SEQ_CLS"
    pipeline_tag = "text-classification"
    ignored_keys = (
        *LANGUAGE_ONLY, "data.image_size", "data.image_transform", "model.drop_path_rate"
    )  # fmt: skip

    def check_sources(self, recipe: Recipe) -> Iterator[Fault]:
        yield from refuse_image_folders(recipe)

    def load_processor(self, section: ModelSection) -> Any:
        from wegeft_cli.tasks.support.classifier import load_padding_tokenizer

        return load_padding_tokenizer(section)

    def read_source(
        self, recipe: Recipe, source: DataSource, recipe_dir: Path | None
    ) -> LabelledRows:
        from wegeft_cli.data.labelled.texts import read_texts

        is_regression = recipe.data.problem_type == "regression"
        return read_texts(source, recipe_dir=recipe_dir, is_regression=is_regression)

    def check_model(self, recipe: Recipe, skeleton: Any, data: TaskData | None) -> None:
        from wegeft_cli.models.context import check_token_ids
        from wegeft_cli.tasks.support.classifier import check_shortest

        super().check_model(recipe, skeleton, data)
        check_context(recipe, skeleton)
        if data is not None:
            for part in ("train", "validation"):
                split: Any = getattr(data, part)
                if split is None:
                    continue
                largest = max((max(row["input_ids"], default=0) for row in split.inputs), default=0)
                check_token_ids(skeleton, largest, key="model.name_or_path")
                check_shortest(skeleton, int(split.lengths.min()), f"data.{part}")

    def prepare_base(self, model: nn.Module, head: HeadSpec | None, processor: Any) -> None:
        from wegeft_cli.models.heads import pad_as_tokenizer

        pad_as_tokenizer(model, processor)

    def find_layout(
        self, model: nn.Module, processor: Any, recipe: Recipe, batch_size: int
    ) -> Layout:
        from wegeft_cli.tasks.support.padding_check import find_class_layout

        if batch_size == 1:
            return super().find_layout(model, processor, recipe, batch_size)
        return find_class_layout(model, processor, recipe)

    def expect_layout(self, skeleton: nn.Module, recipe: Recipe) -> Kind:
        from wegeft_cli.tasks.support.flat_check import expects_flat_classes

        if _has_single_rows(recipe) or not expects_flat_classes(skeleton, recipe):
            return super().expect_layout(skeleton, recipe)
        return "flat"

    def check_built(
        self, model: nn.Module, processor: Any, recipe: Recipe, *, may_be_flat: bool = True
    ) -> Layout:
        from wegeft_cli.data.batches.layout import Layout
        from wegeft_cli.tasks.support.flat_check import check_flat_classes

        if _has_single_rows(recipe):
            return super().check_built(model, processor, recipe)
        reason: str | None = "the run was begun with padded batches"
        if may_be_flat:
            reason = check_flat_classes(model, processor, recipe)
        if reason is None:
            return Layout("flat")
        return replace(super().check_built(model, processor, recipe), reason=reason)

    def collator(self, recipe: Recipe, processor: Any, model: nn.Module) -> Collator:
        from wegeft_cli.data.batches.labelled import TextCollator

        return TextCollator(processor)

    def fake_inputs(self, model: Any, recipe: Recipe, shape: BatchShape) -> dict[str, Any]:
        import torch

        size = (shape.num_sequences, shape.length)
        ids = torch.zeros(size, dtype=torch.int64, device=next(model.parameters()).device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def digest_inputs(
        self, recipe: Recipe, recipe_dir: Path | None, processor: Any
    ) -> dict[str, Any]:
        from wegeft_cli.tasks.support.classifier import digest_tokenizer

        return {"tokenizer_sha256": digest_tokenizer(processor)}


def _has_single_rows(recipe: Recipe) -> bool:
    train = recipe.train
    return train.per_device_train_batch_size == train.per_device_eval_batch_size == 1


TASK = SequenceClassification()
