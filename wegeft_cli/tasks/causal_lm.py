"""Causal language modeling: the model learns to continue a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import ModelSection, Recipe
from wegeft_cli.tasks.base import FakePass, Loss, Preview, Task, TaskData, refuse_image_folders

if TYPE_CHECKING:
    from torch import nn

    from wegeft_cli.data.batches.base import BatchSource
    from wegeft_cli.data.batches.layout import Kind, Layout
    from wegeft_cli.data.batches.sampler import StepPlan
    from wegeft_cli.recipe.load import LoadedRecipe


class CausalLM(Task):
    """The loss is the cross-entropy of the next token over the labeled tokens."""

    auto_class = "AutoModelForCausalLM"
    noun = "causal language model"
    peft_task_type = "CAUSAL_LM"
    pipeline_tag = "text-generation"
    generates_text = True
    ignored_keys = (
        "data.test", "data.problem_type", "eval.metric", "data.image_size", "data.image_transform",
        "model.drop_path_rate",
    )  # fmt: skip

    def check(self, recipe: Recipe) -> Iterator[Fault]:
        yield from super().check(recipe)
        yield from refuse_image_folders(recipe)

    def load_processor(self, section: ModelSection) -> Any:
        from wegeft_cli.models.loading import load_tokenizer_of

        return load_tokenizer_of(section)

    def load_data(self, recipe: Recipe, recipe_dir: Path | None, processor: Any) -> TaskData:
        from wegeft_cli.data.text.dataset import build_datasets

        return build_datasets(recipe.data, tokenizer=processor, recipe_dir=recipe_dir)

    def describe_data(self, data: Any) -> list[str]:
        report = data.report
        which = "looked at of the stream: the first " if report.streaming else ""
        return [
            f"{which}{report.num_rows:,} rows, {report.num_tokens:,} tokens, "
            f"{report.num_label_tokens / report.num_tokens:.0%} of them learned"
        ]

    def check_model(self, recipe: Recipe, skeleton: nn.Module, data: TaskData | None) -> None:
        from wegeft_cli.models.context import check_token_ids
        from wegeft_cli.tasks.support.causality_check import check_decoder

        check_decoder(skeleton)
        check_context(recipe, skeleton)
        if data is not None:
            splits: list[Any] = [data.train, data.validation]
            ids = [split.ids.max() for split in splits if split is not None and len(split.ids)]
            check_token_ids(skeleton, int(max(ids, default=0)), key="model.name_or_path")

    def expect_layout(self, skeleton: nn.Module, recipe: Recipe) -> Kind:
        from wegeft_cli.tasks.support.flat_check import expect_flat

        return "flat" if expect_flat(skeleton, recipe) is None else "left"

    def check_built(
        self, model: nn.Module, processor: Any, recipe: Recipe, *, may_be_flat: bool = True
    ) -> Layout:
        from wegeft_cli.data.batches.layout import Layout
        from wegeft_cli.tasks.support.causality_check import check_causality
        from wegeft_cli.tasks.support.flat_check import check_flat
        from wegeft_cli.tasks.support.packing_check import check_packing
        from wegeft_cli.tasks.support.padding_check import find_causal_layout

        check_causality(model, recipe)
        reason: str | None = "the run was begun with padded batches"
        if may_be_flat:
            reason = check_flat(model, recipe)
        if reason is None:
            return Layout("flat")
        check_packing(model, recipe)
        return replace(find_causal_layout(model, recipe), reason=reason)

    def batches(
        self, loaded: LoadedRecipe, data: Any, plan: StepPlan, processor: Any, model: nn.Module,
        rank: int,
    ) -> BatchSource:  # fmt: skip
        from wegeft_cli.data.batches.text import build_source, build_streamed_source
        from wegeft_cli.models.context import fitting_pad_id
        from wegeft_cli.models.loading import pad_token_id

        pad = fitting_pad_id(model, pad_token_id(processor))
        if loaded.recipe.data.streaming:
            return build_streamed_source(loaded, processor, data, plan, rank=rank, pad_token_id=pad)
        return build_source(loaded.recipe, data, plan, rank=rank, pad_token_id=pad)

    def loss(self, model: nn.Module, recipe: Recipe, layout: Layout) -> Loss:
        from wegeft_cli.training.loss import CausalLoss

        return CausalLoss(model, padding_side=layout.kind)

    def fake_pass(self, model: nn.Module, recipe: Recipe) -> FakePass:
        from wegeft_cli.tasks.support.fake_passes import causal_pass

        return causal_pass(model, recipe)

    def digest_inputs(
        self, recipe: Recipe, recipe_dir: Path | None, processor: Any
    ) -> dict[str, Any]:
        from wegeft_cli.data.fingerprint import digest_inputs

        return digest_inputs(recipe.data, processor, recipe_dir)

    def preview(self, loaded: LoadedRecipe, num_rows: int, row: int | None) -> Preview:
        from wegeft_cli.tasks.support.token_preview import preview_tokens

        return preview_tokens(loaded, num_rows, row)


def check_context(recipe: Recipe, skeleton: Any) -> None:
    """Check that the model's context holds the recipe's longest row.

    Raises:
        UserError: If rows may be longer.
    """
    from wegeft_cli.errors import UserError
    from wegeft_cli.models.context import find_context

    context = find_context(skeleton)
    if context is not None and recipe.data.max_length > context:
        raise UserError(
            f"rows of {recipe.data.max_length} tokens exceed the model's context of {context}",
            key="data.max_length",
            hint=f"use {context} or less",
        )


TASK = CausalLM()
