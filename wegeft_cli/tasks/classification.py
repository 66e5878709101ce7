"""What sequence and image classification share: labels, a head, its metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import (
    CLASS_METRICS,
    METRICS,
    REGRESSION_METRICS,
    AdapterSection,
    DataSource,
    Recipe,
)
from wegeft_cli.tasks.base import FakePass, Loss, Preview, Task, TaskData, list_sources

if TYPE_CHECKING:
    from torch import nn

    from wegeft_cli.data.batches.base import BatchShape, BatchSource
    from wegeft_cli.data.batches.labelled import Collator
    from wegeft_cli.data.batches.layout import Layout
    from wegeft_cli.data.batches.sampler import StepPlan
    from wegeft_cli.data.labelled.texts import LabelledRows
    from wegeft_cli.models.heads import HeadSpec
    from wegeft_cli.recipe.load import LoadedRecipe

LANGUAGE_ONLY = (
    "data.template", "data.chat_template_kwargs", "data.system", "data.system_turn",
    "data.loss_on", "data.packing", "data.streaming", "data.cache_dir",
    "train.eval_tasks", "train.use_liger_kernel", "logging.sample_prompts", "eval.tasks",
    "eval.max_new_tokens", "eval.protocol", "eval.answer_metric",
    "model.load_in_4bit", "model.load_in_8bit", "model.special_tokens",
    "train.strategy", "train.compile",
)  # fmt: skip
"""Keys that only language modeling reads."""


class ClassificationTask(Task):
    """A model with a head of one output per class, or of one number."""

    has_head = True

    @abstractmethod
    def read_source(
        self, recipe: Recipe, source: DataSource, recipe_dir: Path | None
    ) -> LabelledRows:
        """Return the rows of one source with their labels.

        Raises:
            UserError: If it cannot be read, or a row is bad.
            ExceptionGroup: If several rows are bad.
        """

    @abstractmethod
    def collator(self, recipe: Recipe, processor: Any, model: nn.Module) -> Collator:
        """Return what makes the model's inputs; `model` may be on the meta device."""

    @abstractmethod
    def fake_inputs(self, model: Any, recipe: Recipe, shape: BatchShape) -> dict[str, Any]:
        """Return the model's inputs of a batch of the given shape, on the model's device."""

    def tokenizer_of(self, processor: Any) -> Any | None:
        """Return the tokenizer of a task that reads text, else None."""
        return None if self.reads_images else processor

    def check(self, recipe: Recipe) -> Iterator[Fault]:
        yield from super().check(recipe)
        yield from self.check_sources(recipe)
        for key, source in list_sources(recipe):
            if source.format != "auto":
                message = f"{source.format!r} is a form of language rows; `task` is {recipe.task!r}"
                yield f"{key}.format", message, "leave it out, and name columns in `columns`"
            if source.weight is not None:
                message = f"mixtures are for causal_lm; `task` is {recipe.task!r}"
                yield f"{key}.weight", message, "remove it"
        metric, known = recipe.eval.metric, self.validation_metrics(recipe)
        if metric in METRICS and metric not in known:
            message = f"{metric!r} does not measure a {recipe.data.problem_type}"
            yield "eval.metric", message, f"use one of {', '.join(known)}"

    def check_sources(self, recipe: Recipe) -> Iterator[Fault]:
        """Yield what is wrong with the recipe's sources for this task's inputs."""
        yield from ()

    def validation_metrics(self, recipe: Recipe) -> tuple[str, ...]:
        return REGRESSION_METRICS if recipe.data.problem_type == "regression" else CLASS_METRICS

    def load_data(self, recipe: Recipe, recipe_dir: Path | None, processor: Any) -> TaskData:
        from wegeft_cli.data.labelled.dataset import read_class_data
        from wegeft_cli.models.loading import load_base_config

        config, tokenizer = load_base_config(recipe.model), self.tokenizer_of(processor)
        return read_class_data(recipe, recipe_dir, config, tokenizer, self.read_source)

    def assumed_head(self, recipe: Recipe) -> HeadSpec | None:
        from wegeft_cli.data.labelled.dataset import without_data
        from wegeft_cli.models.loading import load_base_config

        return without_data(recipe, load_base_config(recipe.model))

    def describe_data(self, data: Any) -> list[str]:
        report = data.report
        of = f" of {len(report.labels)} classes" if report.labels else ""
        counts = (("validation", report.num_validation_rows), ("test", report.num_test_rows))
        others = ", ".join(f"{count:,} {name}" for name, count in counts if count)
        beside = f" ({others} beside them)" if others else ""
        notes = [f"{report.num_rows:,} {self.row_noun}{of}{beside}"]
        if data.head.keeps_base_head:
            notes.append("the base's head already has these classes, and is the start")
        return notes

    def check_model(self, recipe: Recipe, skeleton: Any, data: TaskData | None) -> None:
        from wegeft_cli.models.stochastic_depth import check_drop_path
        from wegeft_cli.tasks.support.classifier import check_metrics

        if data is not None and data.head is not None:
            check_metrics(recipe, data.head)
        if recipe.model.drop_path_rate and not hasattr(skeleton.config, "drop_path_rate"):
            check_drop_path(skeleton)

    def adapter_section(self, section: AdapterSection, model: nn.Module) -> AdapterSection:
        from wegeft_cli.models.heads import with_head

        return with_head(section, model)

    def initialize_head(self, model: nn.Module, head: HeadSpec | None, recipe: Recipe) -> None:
        from wegeft_cli.methods.registry import find_method
        from wegeft_cli.models.heads import finish_head

        assert head is not None
        section = recipe.adapter
        trains_all = find_method(section.type).trains_everything(section)
        finish_head(model, head, section.modules_to_save, recipe.seed, trains_all=trains_all)

    def find_layout(
        self, model: nn.Module, processor: Any, recipe: Recipe, batch_size: int
    ) -> Layout:
        """Return the layout of batches that does not change a row's logits."""
        from wegeft_cli.data.batches.layout import Layout

        return Layout("right")

    def check_built(
        self, model: nn.Module, processor: Any, recipe: Recipe, *, may_be_flat: bool = True
    ) -> Layout:
        train = recipe.train
        batch_size = max(train.per_device_train_batch_size, train.per_device_eval_batch_size)
        return self.find_layout(model, processor, recipe, batch_size)

    def batches(
        self, loaded: LoadedRecipe, data: Any, plan: StepPlan, processor: Any, model: nn.Module,
        rank: int,
    ) -> BatchSource:  # fmt: skip
        from wegeft_cli.data.batches.labelled import ClassBatches

        recipe = loaded.recipe
        return ClassBatches(
            data.train,
            plan,
            self.collator(recipe, processor, model),
            validation=data.validation,
            validation_counts=data.validation_counts,
            rank=rank,
            eval_batch_size=recipe.train.per_device_eval_batch_size,
        )

    def loss(self, model: nn.Module, recipe: Recipe, layout: Layout) -> Loss:
        from wegeft_cli.training.classification_loss import ClassLoss

        is_regression = recipe.data.problem_type == "regression"
        return ClassLoss(is_regression=is_regression, layout=layout.kind)

    def measure_validation(
        self, loss: Any, head: HeadSpec | None, gather: Callable[[Any], list[Any]]
    ) -> dict[str, float]:
        from wegeft_cli.tasks.support.classifier import gather_metrics

        assert head is not None
        return gather_metrics(loss, head, gather)

    def fake_pass(self, model: nn.Module, recipe: Recipe) -> FakePass:
        from wegeft_cli.tasks.support.fake_passes import classifier_pass

        return classifier_pass(model, recipe, self.fake_inputs)

    def preview(self, loaded: LoadedRecipe, num_rows: int, row: int | None) -> Preview:
        from wegeft_cli.tasks.support.label_preview import preview_labels

        return preview_labels(loaded, self, num_rows, row)
