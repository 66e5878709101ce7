"""A method of fine-tuning: what `adapter.type` in a recipe or `peft_type` on disk selects.

A method is one file in this folder, or a package with a `method.py`, that defines `METHOD`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import AdapterSection, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wegeft_cli.artifacts.adapter import Adapter
    from wegeft_cli.artifacts.prompt_record import PromptRecord
    from wegeft_cli.methods.layers.targets import Target
    from wegeft_cli.methods.lora_equivalent.pairs import LoraPairs
    from wegeft_cli.methods.tensor_changes import TensorChange
    from wegeft_cli.recipe.rules import Fault

MODULES_TO_SAVE = "modules_to_save"
"""Name of the group of modules that are trained whole."""


@dataclass(frozen=True)
class ParameterGroup:
    """One group of learned parameters.

    Args:
        name: The group; `modules_to_save` holds the modules that are trained whole.
        num_layers: Layers, or row ranges of layers, that use the group, or its modules.
        width: d of the group's pair; None for a method without pairs.
        num_parameters: Learned parameters.
    """

    name: str
    num_layers: int
    width: int | None
    num_parameters: int


@dataclass(frozen=True)
class Omission:
    """Weights of the base that are not adapted.

    Args:
        what: What they are, and why they are not adapted.
        names: Their modules, or the parameters of stacked experts.
        num_parameters: Parameters of the base in them.
    """

    what: str
    names: tuple[str, ...]
    num_parameters: int

    def __str__(self) -> str:
        """Return a clause with the count and the first names."""
        more = ", ..." if len(self.names) > 2 else ""
        return (
            f"{self.what} ({self.num_parameters:,} parameters: {', '.join(self.names[:2])}{more})"
        )


@dataclass(frozen=True)
class LayerChoice:
    """The layers that a method adapts in a model.

    Args:
        targets: The layers.
        omitted: What of the model, or of the named layers, is not adapted.
        as_written: Whether `target_modules` as it is selects these layers.
    """

    targets: tuple[Target, ...]
    omitted: tuple[Omission, ...] = ()
    as_written: bool = True


@dataclass(frozen=True)
class AdapterRecord:
    """What is stored beside an adapter's tensors.

    Args:
        recipe: The run's recipe.
        task_type: PEFT's name of the task; None where PEFT has none.
        base_fingerprint: The base's fingerprint, where it is known.
        card: Text of README.md.
        more_files: Further files, name -> text.
        prompt: The prompt form of the training rows; None for a classifier.
    """

    recipe: Recipe
    task_type: str | None
    base_fingerprint: str | None
    card: str
    more_files: Mapping[str, str] = field(default_factory=dict)
    prompt: PromptRecord | None = None


_GENERATOR_KEYS = ("scale_rule", "share", "groups", "side", "init", "view")  # keys of `adapter`
LAYER_KEYS = ("r", "alpha", "target_modules")
"""Keys of `adapter` that describe what is added to layers."""
UNREAD_WITHOUT_GENERATORS = (
    *(f"adapter.{name}" for name in (*_GENERATOR_KEYS, "dropout")),
    "train.lr_ratio",
)
"""Dotted keys that only generators read."""


def check_without_generators(recipe: Recipe) -> Iterator[Fault]:
    """Yield every key of a recipe that only generators read, where it is set."""
    adapter, train = recipe.adapter, recipe.train
    if adapter.dropout > 0:
        yield (
            "adapter.dropout",
            f"{adapter.dropout} acts on the frozen weight's entries, which only `wegeft` reads; "
            f"`adapter.type` is {adapter.type!r}",
            "set it to 0; a PEFT method's own goes under `adapter.peft` (`lora_dropout`)",
        )
    for name in _GENERATOR_KEYS:
        value = getattr(adapter, name)
        if value != getattr(AdapterSection(), name):
            message = f"{value!r} is read by `wegeft` alone; `adapter.type` is {adapter.type!r}"
            yield f"adapter.{name}", message, "remove it"
    if train.lr_ratio != 1:
        message = (
            f"{train.lr_ratio} is the rate of phi over that of psi, which only `wegeft` has; "
            f"`adapter.type` is {adapter.type!r}"
        )
        yield "train.lr_ratio", message, "remove it"
    if train.strategy != "replicated":
        message = (
            f"`{train.strategy}` shards the base before the method prepares it, which is not "
            f"tested with {adapter.type!r}"
        )
        yield "train.strategy", message, "set `train.strategy: replicated`"


def check_unread(recipe: Recipe, names: Sequence[str], why: str = "") -> Iterator[Fault]:
    """Yield keys of `adapter` that a method does not read, where they are set."""
    for name in names:
        value = getattr(recipe.adapter, name)
        if value != getattr(AdapterSection(), name):
            message = f"{value!r} is not read by `adapter.type` {recipe.adapter.type!r}{why}"
            yield f"adapter.{name}", message, "remove it"


def count_whole(model: nn.Module, names: Sequence[str]) -> list[ParameterGroup]:
    """Return the group of the modules that are trained whole, or nothing without any."""
    if not names:
        return []
    parameters = [p for name in names for p in model.get_submodule(name).parameters()]
    total = sum(parameter.numel() for parameter in parameters)
    return [ParameterGroup(MODULES_TO_SAVE, len(names), None, total)]


def check_no_peft_keys(recipe: Recipe) -> Iterator[Fault]:
    """Yield `adapter.peft` where a method that is not PEFT's does not read it."""
    if recipe.adapter.peft:
        message = f"holds keys of a PEFT method, and `adapter.type` is `{recipe.adapter.type}`"
        yield "adapter.peft", message, "remove it, or set `adapter.type`"


class Method(ABC):
    """A method of fine-tuning; a subclass overrides what the method does differently.

    Module level of a method's file imports no torch, so that recipes are checked without it.
    """

    names: ClassVar[tuple[str, ...]] = ()
    """Values of `adapter.type`. A method with `takes_any_name` also takes the ones of no other."""
    peft_types: ClassVar[tuple[str, ...]] = ()
    """Values of `peft_type` in `adapter_config.json`."""
    takes_any_name: ClassVar[bool] = False
    """Whether names and types that no other method has are this one's."""
    has_generators: ClassVar[bool] = False
    """Whether the adapter is WeGeFT's: merges of several with weights, editing, rows of a batch."""
    is_streamed: ClassVar[bool] = False
    """Whether `tensor_changes` describes a merge, so that the base is not loaded for it."""
    trains_in_place: ClassVar[bool] = False
    """Whether the adapter holds the base's own parameters, and so cannot be switched off."""
    is_lora: ClassVar[bool] = False
    """Whether the adapter is a pair B A beside each layer, as PEFT stores LoRA."""
    needs_package: ClassVar[bool] = False
    """Whether only this package loads the adapter."""

    def describe(self, peft_type: str) -> str:
        """Return a noun phrase for an adapter of the method."""
        return f"a {peft_type} adapter"

    def explain_name(self, name: str) -> tuple[str, str] | None:
        """Return why a name near this method's is refused and what to use instead, or None."""
        return None

    def unread_keys(self, name: str) -> tuple[str, ...]:
        """Return the dotted recipe keys that the method does not read."""
        return ()

    def reads_rank(self, section: AdapterSection) -> bool:
        """Return whether the number of learned parameters follows `adapter.r`."""
        return "adapter.r" not in self.unread_keys(section.type)

    def check(self, recipe: Recipe) -> Iterator[Fault]:
        """Yield every rule of the method that a recipe breaks.

        Nothing is refused by default. Most methods yield from `check_without_generators` and
        `check_no_peft_keys`, and refuse each of `LAYER_KEYS` that they do not read.
        """
        yield from ()

    def check_schedule(self, section: AdapterSection, num_steps: int) -> Fault | None:
        """Return the rule that a run of `num_steps` optimizer steps breaks, if any."""
        return None

    def choose_layers(self, skeleton: nn.Module, section: AdapterSection) -> LayerChoice | None:
        """Return the layers that a section's `target_modules` name, or None without such a key.

        Args:
            skeleton: The base on the meta device.
            section: The recipe's `adapter`.

        Returns:
            The layers and what is omitted of the model.

        Raises:
            UserError: If the targets do not fit the model.
            ExceptionGroup: If there are several such faults.
        """
        return None

    def with_layers(
        self, skeleton: nn.Module, section: AdapterSection, targets: Sequence[Target]
    ) -> AdapterSection:
        """Return a section that adapts only some of the layers of `choose_layers`.

        Args:
            skeleton: The base on the meta device.
            section: The section that the layers were chosen by.
            targets: The layers.

        Returns:
            The section with these layers alone.
        """
        return section

    def scale(self, skeleton: nn.Module, section: AdapterSection) -> float | None:
        """Return the scale of WeGeFT's weight change; None for a method of another equation."""
        return None

    @abstractmethod
    def count(
        self, skeleton: nn.Module, section: AdapterSection, task_type: str | None
    ) -> list[ParameterGroup]:
        """Count the learned parameters on a model without weights, which is not changed.

        Args:
            skeleton: The base on the meta device.
            section: The recipe's `adapter`, a classification head among its `modules_to_save`.
            task_type: PEFT's name of the task; None where PEFT has none.

        Returns:
            The groups.

        Raises:
            UserError: If nothing can be trained as the section says.
            ExceptionGroup: If there are several such faults.
        """

    @abstractmethod
    def inject(
        self, model: nn.Module, section: AdapterSection, *, task_type: str | None, seed: int
    ) -> nn.Module:
        """Prepare a base for training and return it, or PEFT's wrapper of it.

        Args:
            model: The base, which is changed.
            section: The recipe's `adapter`. Its `modules_to_save` must learn; a new classification
                head is one of them, and would otherwise stay random and unsaved.
            task_type: PEFT's name of the task; None where PEFT has none.
            seed: Seed of the initial values.

        Returns:
            The model whose learned parameters require gradients, and no others.

        Raises:
            UserError: If the section does not fit the model.
            ExceptionGroup: If there are several such faults.
        """

    def check_start(
        self, skeleton: nn.Module, section: AdapterSection, start: Adapter, base_dir: Path | None
    ) -> None:
        """Check on a model without weights that training can start from an adapter.

        Args:
            skeleton: The base on the meta device.
            section: The recipe's `adapter`.
            start: The adapter.
            base_dir: The base's files, where they are on this machine.

        Raises:
            UserError: If the adapter is damaged, or a setting differs. By default always: the
                method does not start from an adapter.
            ExceptionGroup: If several settings differ.
        """
        raise UserError(
            f"{section.type!r} does not start from an adapter",
            key="adapter.init_from",
            hint="remove it",
        )

    def start_from(
        self,
        model: nn.Module,
        start: Adapter,
        base_fingerprint: str | None,
        warn: Callable[[str], None],
    ) -> None:
        """Copy an adapter's tensors into a freshly injected model.

        Args:
            model: What `inject` returned.
            start: The adapter, see `check_start`.
            base_fingerprint: The model's own fingerprint, where it is known.
            warn: Called where the base cannot be compared with the adapter's.

        Raises:
            UserError: If the adapter is damaged or does not fit.
        """
        raise TypeError(f"{type(self).__name__} overrides check_start alone")

    def trains_everything(self, section: AdapterSection) -> bool:
        """Return whether every parameter of the base is trained."""
        return False

    def stepper(
        self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], num_steps: int
    ) -> tuple[Any, Callable[[nn.Module, Any], Tensor]]:
        """Return what runs after each optimizer step (a `MethodState` or None) and the loss."""
        return None, loss

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Apply the state of an earlier checkpoint before the adapter is saved."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, record: AdapterRecord) -> None:
        """Write the adapter's folder, whole or not at all.

        `adapter_config.json` holds at least `peft_type`, one of `peft_types`, and
        `base_model_name_or_path`; README.md is the record's card.

        Args:
            model: The trained model.
            folder: The adapter's folder.
            record: What is stored beside the tensors.

        Raises:
            UserError: If the folder holds something else.
            MachineError: If the disk fails.
        """

    def check_adapter(self, adapter: Adapter) -> None:
        """Check an adapter's config before its base is looked for.

        Args:
            adapter: The adapter.

        Raises:
            UserError: If the config is damaged, or of a newer format.
            ExceptionGroup: If there are several such faults.
        """

    @abstractmethod
    def load(
        self,
        model: nn.Module,
        adapter: Adapter,
        *,
        base_dir: Path | None,
        warn: Callable[[str], None],
    ) -> nn.Module:
        """Load an adapter onto its base.

        Args:
            model: The base, which is changed.
            adapter: The adapter.
            base_dir: The base's files, where they are on this machine.
            warn: Called where the base cannot be compared with the adapter's.

        Returns:
            The model, or PEFT's wrapper of it.

        Raises:
            UserError: If the adapter is damaged or belongs to another base.
        """

    def disabled(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context in which the model computes as its base."""
        return nullcontext()

    @abstractmethod
    def fold(self, model: Any, adapter: Adapter) -> tuple[nn.Module, int]:
        """Fold a loaded adapter into the base's weights.

        Args:
            model: What `load` returned.
            adapter: The adapter that was loaded.

        Returns:
            The base alone, and how many of its tensors or layers changed.

        Raises:
            UserError: If the method cannot be merged.
        """

    def foresee_merge(self, skeleton: nn.Module, section: AdapterSection) -> str | None:
        """Return before a run a warning of how its merged model will differ from the base's form.

        Args:
            skeleton: The base on the meta device.
            section: The recipe's `adapter`, with the layers that are adapted.

        Returns:
            The warning, which says whether the base's class loads the merged model; None without a
            difference.
        """
        return None

    def tensor_changes(
        self,
        adapter: Adapter,
        weight: float,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        model: nn.Module | None = None,
    ) -> dict[str, TensorChange] | None:
        """Return what an adapter changes in each stored tensor, for a streamed merge.

        Args:
            adapter: The adapter.
            weight: Factor of the change.
            shapes: Tensor name in the base -> its shape.
            model: The base in memory, if `shapes` are its parameters'; it resolves names that the
                base's files spell in another way.

        Returns:
            Tensor name -> change. None if the method has no streamed merge, if it needs the model,
            or if `shapes` lacks a tensor that the adapter changes.

        Raises:
            UserError: If the adapter is damaged, or a shape differs.
        """
        return None

    def has_lora_equivalent(self, adapter: Adapter) -> bool:
        """Return whether an adapter's change is exactly a LoRA pair for each layer."""
        return False

    def lora_pairs(
        self,
        adapter: Adapter,
        model: nn.Module,
        base_dir: Path,
        *,
        trust_remote_code: bool,
        warn: Callable[[str], None],
    ) -> LoraPairs:
        """Return the exact LoRA pairs of an adapter that has some.

        Args:
            adapter: The adapter.
            model: The base on the meta device.
            base_dir: The base's files.
            trust_remote_code: Whether the code that comes with the base is run.
            warn: Called where the base cannot be compared with the adapter's.

        Returns:
            The pairs; weights are read when one is made.

        Raises:
            UserError: If the adapter is damaged or belongs to another base.
        """
        raise TypeError(f"{type(self).__name__} overrides has_lora_equivalent alone")
