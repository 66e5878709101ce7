"""`Task`: what a recipe's `task` selects. One module of this package per task.

A module that defines `TASK`, an instance of a subclass of `Task`, adds a task whose name is the
module's name. Nothing outside this package asks which task a recipe has: it reads an attribute of
the task, or calls one of its methods. Module level of these files loads no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import (
    AdapterSection,
    DataSection,
    EvalSection,
    LoggingSection,
    ModelSection,
    Recipe,
    TrainSection,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from wegeft_cli.data.batches.base import BatchShape, BatchSource
    from wegeft_cli.data.batches.layout import Kind, Layout
    from wegeft_cli.data.batches.sampler import StepPlan
    from wegeft_cli.models.heads import HeadSpec
    from wegeft_cli.recipe.load import LoadedRecipe


class Split(Protocol):
    """Training, validation or test rows of a task."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens, or patches, of each row, int64 `[rows]`."""
        ...

    @property
    def label_counts(self) -> np.ndarray:
        """Labels that carry loss in each row, int64 `[rows]`."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def describe(self, number: int) -> dict[str, Any]:
        """Return a row as a record of skipped rows shows it."""
        ...


class DataStatistics(Protocol):
    """Statistics of a task's rows that every task has."""

    @property
    def num_rows(self) -> int:
        """Training rows; of a stream, the first ones."""
        ...

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens, or patches, per training row: p50, p95, max."""
        ...

    @property
    def streaming(self) -> bool:
        """Whether the rows are the first ones of a stream."""
        ...

    @property
    def warnings(self) -> list[str]:
        """Sentences for the user."""
        ...


class TaskData(Protocol):
    """The rows of a recipe, and what the model's head learns from them."""

    @property
    def train(self) -> Split:
        """Training rows."""
        ...

    @property
    def validation(self) -> Split | None:
        """Validation rows, if there are any."""
        ...

    @property
    def report(self) -> DataStatistics:
        """Statistics of the rows."""
        ...

    @property
    def mixture(self) -> Any:
        """How often each source is drawn; None takes every row once per epoch."""
        ...

    @property
    def packs(self) -> Any:
        """Row numbers of each pack; None without packing."""
        ...

    @property
    def head(self) -> HeadSpec | None:
        """The head that the rows need; None for a task that uses the base's own."""
        ...


class Preview(Protocol):
    """Rows as the model reads them; the result of `wegeft preview`."""

    @property
    def kind(self) -> str:
        """What is shown of a row: "tokens", "labels", or another word for JSON alone."""
        ...

    @property
    def warnings(self) -> list[str]:
        """Sentences for the user."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the preview as a JSON object."""
        ...


class Loss(Protocol):
    """The loss that the training loop minimizes."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss summed over the labels of a batch, a scalar."""
        ...


@dataclass(frozen=True)
class FakePass:
    """A forward pass that runs on tensors with shapes and no values.

    Args:
        head: The module where the backbone ends; memory is counted up to it and from it on.
        loss: Returns the summed loss of a batch of the given shape.
    """

    head: nn.Module
    loss: Callable[[BatchShape], Tensor]


class Task(ABC):
    """A learning problem: its data, its model, its loss and its measures.

    Methods take plain parts (sections, modules, paths), so that a task depends on nothing above it.
    """

    name: str = ""
    """Value of the recipe's `task`; `find_task` sets it to the module's name."""
    auto_class: ClassVar[str]
    """Class of transformers that loads the model, e.g. `AutoModelForCausalLM`."""
    noun: ClassVar[str]
    """The model in words, e.g. "causal language model"."""
    peft_task_type: ClassVar[str | None]
    """PEFT's name of the task; None where PEFT has none."""
    pipeline_tag: ClassVar[str]
    """The Hub's name of the task, for model cards."""
    generates_text: ClassVar[bool] = False
    """Whether the model answers prompts: generation, chat, text benchmarks, GGUF and vLLM."""
    reads_images: ClassVar[bool] = False
    """Whether the inputs are images: the processor is an image processor."""
    has_head: ClassVar[bool] = False
    """Whether the task replaces the base's head by one for its labels, stored in `head.json`."""
    row_noun: ClassVar[str] = "rows"
    """A training row in words, plural."""
    ignored_keys: ClassVar[tuple[str, ...]] = ()
    """Recipe keys that the task does not read; setting one is a fault."""

    def check(self, recipe: Recipe) -> Iterator[Fault]:
        """Yield key, message and hint of each rule of this task that a recipe breaks."""
        yield from refuse_keys(recipe, self.ignored_keys)

    def validation_metrics(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the metrics of a validation beside its loss, as named in `eval.metric`."""
        return ()

    @abstractmethod
    def load_processor(self, section: ModelSection) -> Any:
        """Load the base's tokenizer or image processor.

        Args:
            section: The recipe's `model`.

        Returns:
            The processor.

        Raises:
            UserError: If there is none, or it cannot serve this task.
        """

    @abstractmethod
    def load_data(self, recipe: Recipe, recipe_dir: Path | None, processor: Any) -> TaskData:
        """Read all rows of a recipe; only the cache's files are written.

        Args:
            recipe: The recipe.
            recipe_dir: The recipe's folder, for relative paths.
            processor: What `load_processor` returned.

        Returns:
            The splits, the head and statistics.

        Raises:
            UserError: If a source cannot be read, or a row is bad.
            ExceptionGroup: If there are several such faults.
        """

    def assumed_head(self, recipe: Recipe) -> HeadSpec | None:
        """Return the head to plan with where the rows cannot be read: as wide as the base's."""
        return None

    def describe_data(self, data: TaskData) -> list[str]:
        """Return the sentences that a run prints about its rows."""
        return []

    def check_rows(self, data: TaskData) -> None:
        """Check what reading left unchecked, once per run, on the first process.

        Args:
            data: The rows.

        Raises:
            UserError: If a row cannot be used.
            ExceptionGroup: If several cannot.
        """

    def check_model(self, recipe: Recipe, skeleton: nn.Module, data: TaskData | None) -> None:
        """Check the recipe against the model without weights and, if known, its rows.

        Args:
            recipe: The recipe.
            skeleton: The base on the meta device.
            data: The rows; None where they cannot be read.

        Raises:
            UserError: If they do not fit.
        """

    def adapter_section(self, section: AdapterSection, model: nn.Module) -> AdapterSection:
        """Return the recipe's `adapter` with the modules of a new head among those to save."""
        return section

    def prepare_base(self, model: nn.Module, head: HeadSpec | None, processor: Any) -> None:
        """Adjust a model of this task to its processor: the padding id."""

    def initialize_head(self, model: nn.Module, head: HeadSpec | None, recipe: Recipe) -> None:
        """Initialize a new head of a loaded base; a pure function of the recipe's seed.

        Args:
            model: The loaded base, which is changed.
            head: The head; None for a task without one.
            recipe: The recipe.

        Raises:
            UserError: If a part of the backbone has no weights and is not trained.
        """

    def expect_layout(self, skeleton: nn.Module, recipe: Recipe) -> Kind:
        """Return the layout that batches most likely have, by a model without weights."""
        return "right"

    @abstractmethod
    def check_built(
        self, model: nn.Module, processor: Any, recipe: Recipe, *, may_be_flat: bool = True
    ) -> Layout:
        """Check the loaded model with its adapter on its device, and choose the batches' layout.

        Args:
            model: The model.
            processor: What `load_processor` returned.
            recipe: The recipe.
            may_be_flat: Whether rows may be laid end to end; a run that was begun with padded
                batches continues with them.

        Returns:
            The layout, for `loss`.

        Raises:
            UserError: If the model cannot train this recipe.
        """

    @abstractmethod
    def batches(
        self,
        loaded: LoadedRecipe,
        data: TaskData,
        plan: StepPlan,
        processor: Any,
        model: nn.Module,
        rank: int,
    ) -> BatchSource:
        """Return one process's batches, a pure function of the step.

        `model` may be on the meta device.
        """  # fmt: skip

    @abstractmethod
    def loss(self, model: nn.Module, recipe: Recipe, layout: Layout) -> Loss:
        """Return the loss of a model that is ready to train; `layout` is that of `check_built`."""

    def measure_validation(
        self, loss: Loss, head: HeadSpec | None, gather: Callable[[Any], list[Any]]
    ) -> dict[str, float]:
        """Return `eval_<metric>` of the validation whose loss was just computed.

        `gather` returns the values of all processes.
        """
        return {}

    @abstractmethod
    def fake_pass(self, model: nn.Module, recipe: Recipe) -> FakePass:
        """Return the forward pass for estimates of memory and operations.

        Called under `FakeTensorMode`, with fake parameters.
        """

    def digest_inputs(
        self, recipe: Recipe, recipe_dir: Path | None, processor: Any
    ) -> dict[str, Any]:
        """Return hashes of the processor and the files, by which a resumed run checks its data."""
        return {}

    @abstractmethod
    def preview(self, loaded: LoadedRecipe, num_rows: int, row: int | None) -> Preview:
        """Return training rows as the model reads them.

        Args:
            loaded: The recipe and its path.
            num_rows: Rows of each kind.
            row: Number of the one row to show instead.

        Returns:
            The preview.

        Raises:
            UserError: If the processor or the data is at fault, or there is no such row.
            ExceptionGroup: If there are several such faults.
        """


def refuse_keys(recipe: Recipe, keys: tuple[str, ...]) -> Iterator[Fault]:
    """Yield a fault for each key that is set although the recipe's task does not read it."""
    defaults: dict[str, Any] = {
        "data": DataSection(),
        "train": TrainSection(),
        "eval": EvalSection(),
        "logging": LoggingSection(),
        "model": type(recipe.model)(),
    }
    for key in keys:
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        if value != getattr(defaults[section], name):
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            what = "" if isinstance(value, list | dict) else f"{shown:.60} "
            message = f"{what}is not read by `task` {recipe.task!r}"
            yield key, message, "remove it"


def list_sources(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield each data source of a recipe with its key."""
    for part in ("train", "validation", "test"):
        for position, source in enumerate(getattr(recipe.data, part)):
            yield f"data.{part}[{position}]", source


def refuse_image_folders(recipe: Recipe) -> Iterator[Fault]:
    """Yield a fault for each `image_dir` of a task that reads no images."""
    for key, source in list_sources(recipe):
        if source.image_dir is not None:
            message = f"{source.image_dir!r} is of no use to {recipe.task}"
            yield f"{key}.image_dir", message, "remove it"


def without_cache(recipe: Recipe) -> Recipe:
    """Return a recipe whose rows are read without writing the cache."""
    return replace(recipe, data=replace(recipe.data, cache_dir=None))
