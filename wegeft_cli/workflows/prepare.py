"""What `train`, `plan` and `--dry-run` find out of a recipe before any weight is read."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from wegeft_cli.data.mixture import Mixture
from wegeft_cli.data.order import StepPlan
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.generators.equations import count_parameters
from wegeft_cli.generators.groups import assign_groups, group_widths
from wegeft_cli.generators.inject import select_targets
from wegeft_cli.generators.inplace import select_parameters
from wegeft_cli.generators.saved import find_saved_modules
from wegeft_cli.models.base import build_meta_model, load_config
from wegeft_cli.models.heads import HeadSpec, find_head_modules
from wegeft_cli.recipe.budget import find_phase_fault
from wegeft_cli.recipe.load import LoadedRecipe
from wegeft_cli.recipe.schema import AdapterSection, ModelSection, Recipe, TrainSection
from wegeft_cli.recipe.values import INPLACE_TYPES
from wegeft_cli.training.optim import check_optimizer
from wegeft_cli.training.schedules import check_schedule, count_warmup_steps

_SAVED = "modules_to_save"
# Steps enough for every warm-up and decay that a run could have.
_MANY_STEPS = 10**9

TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "image_classification": None,
}
"""PEFT's names of the tasks; it has none for images."""


@dataclass(frozen=True)
class GroupPlan:
    """One group's share of what learns.

    Args:
        name: The group; `modules_to_save` are the modules that are trained whole.
        num_layers: Layers, or row parts of layers, that use it; of modules, how many.
        width: d of its pair; None for a method without groups.
        num_parameters: Learned parameters.
    """

    name: str
    num_layers: int
    width: int | None
    num_parameters: int


@contextmanager
def tell_places(loaded: LoadedRecipe) -> Iterator[None]:
    """Say of a fault that names a key alone where in the recipe that key was set.

    Args:
        loaded: The recipe, which knows the places.

    Yields:
        Nothing.

    Raises:
        UserError: The fault, with its place.
        ExceptionGroup: If there are several.
    """

    def place(error: Exception) -> None:
        if isinstance(error, ExceptionGroup):
            for each in error.exceptions:
                place(each)
        elif isinstance(error, UserError) and error.file is None and error.key is not None:
            error.file = loaded.find_place(error.key)

    try:
        yield
    except (UserError, ExceptionGroup) as error:
        place(error)
        raise


def load_base_config(section: ModelSection) -> Any:
    """Load the configuration that the recipe's `model` names."""
    return load_config(
        section.name_or_path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )


def build_skeleton(section: ModelSection, head: HeadSpec | None = None) -> tuple[Any, nn.Module]:
    """Build the base without weights.

    Args:
        section: The recipe's `model`.
        head: A classifier's head; None builds a causal language model.

    Returns:
        Its configuration, and the model on torch's meta device.

    Raises:
        UserError: If there is no such model.
    """
    config = load_base_config(section)
    if head is not None:
        head.apply(config)
    task = "causal_lm" if head is None else head.task
    trusts = section.trust_remote_code
    return config, build_meta_model(config, trust_remote_code=trusts, task=task)


def with_head(section: AdapterSection, model: nn.Module, task: str) -> AdapterSection:
    """Add a classifier's head to the modules that learn whole: it is new, so it learns always.

    Args:
        section: The recipe's `adapter`.
        model: The base before anything is put into it; the meta device will do.
        task: The recipe's task.

    Returns:
        The section; of a language model as it is.
    """
    if task == "causal_lm":
        return section
    names = dict.fromkeys([*find_head_modules(model), *section.modules_to_save])
    return replace(section, modules_to_save=list(names))


def plan_groups(
    skeleton: nn.Module, section: AdapterSection, task: str = "causal_lm"
) -> list[GroupPlan]:
    """Count what learns, group by group, on a model without weights.

    Args:
        skeleton: The base on the meta device; it is not changed.
        section: The recipe's `adapter`, see `with_head`.
        task: The recipe's task.

    Returns:
        The groups; a PEFT method's counts are summed by kind of layer.

    Raises:
        UserError: If a target matches nothing, a group has two widths, or a module cannot be
            trained whole.
        ExceptionGroup: If there are several such faults.
    """
    if section.type in INPLACE_TYPES:
        return _plan_inplace(skeleton, section)
    if section.type != "wegeft":
        return _plan_peft(skeleton, section, task)
    targets = select_targets(skeleton, section.target_modules, section.groups)
    assigned = assign_groups(
        targets,
        share=section.share,  # type: ignore[arg-type]
        groups=section.groups,
        side=section.side,  # type: ignore[arg-type]
    )
    widths = group_widths(assigned, section.side)  # type: ignore[arg-type]
    groups = [
        GroupPlan(name, len(members), widths[name], count_parameters(widths[name], section.r))
        for name, members in assigned.items()
    ]
    saved = find_saved_modules(skeleton, section.modules_to_save, targets)
    if saved:
        modules = [skeleton.get_submodule(name) for name in saved]
        total = sum(p.numel() for module in modules for p in module.parameters())
        groups.append(GroupPlan(_SAVED, len(saved), None, total))
    return groups


class PlannedData(Protocol):
    """What steps are cut from: rows that know their lengths."""

    @property
    def train(self) -> Any:
        """Training rows, with `lengths` and `label_counts`."""
        ...

    @property
    def packs(self) -> list[list[int]] | None:
        """The numbers of each pack's rows."""
        ...

    @property
    def mixture(self) -> Mixture | None:
        """Which rows an epoch takes."""
        ...


def build_step_plan(recipe: Recipe, data: PlannedData, world_size: int) -> StepPlan:
    """Cut the rows, or with packing the packs of rows, into optimizer steps as the recipe says.

    Args:
        recipe: The recipe.
        data: Its tokenised rows.
        world_size: Processes.

    Returns:
        The plan; what it calls a row is a pack where rows are packed.
    """
    train = recipe.train
    return StepPlan(
        num_rows=len(data.train if data.packs is None else data.packs),
        per_device_batch_size=train.per_device_train_batch_size,
        accumulation_steps=train.gradient_accumulation_steps,
        world_size=world_size,
        seed=recipe.seed,
        shuffle=recipe.data.shuffle,
        num_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        mixture=data.mixture,
        group_lengths=data.train.lengths if train.group_by_length else None,
    )


def check_context(config: Any, recipe: Recipe) -> None:
    """Check that the model can see as far as the recipe's longest row.

    Args:
        config: The base's configuration.
        recipe: The recipe.

    Raises:
        UserError: If rows may be longer than the model's context.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and recipe.data.max_length > context:
        raise UserError(
            f"rows of {recipe.data.max_length} tokens exceed the model's context of {context}",
            key="data.max_length",
            hint=f"use {context} or less",
        )


def check_learning(recipe: Recipe, device: torch.device | None) -> None:
    """Check that the optimizer and the schedule take what the recipe gives them.

    Where the steps hang on the rows, which are not read yet, the schedule is tried over very many;
    `check_run_schedule` tries it over the run's own.

    Args:
        recipe: The recipe.
        device: Where the run will train; None where that is another machine, maybe.

    Raises:
        UserError: If one of them does not.
        ExceptionGroup: If neither does.
    """
    train = recipe.train
    faults: list[UserError] = []
    try:
        check_optimizer(train.optim, train.optim_args, device)
    except UserError as fault:
        faults.append(fault)
    try:
        check_run_schedule(recipe, train.max_steps if train.max_steps > 0 else _MANY_STEPS)
    except UserError as fault:
        faults.append(fault)
    raise_all(faults)


def check_run_schedule(recipe: Recipe, num_steps: int) -> None:
    """Check that the schedules, the rate's and AdaLoRA's, can be walked over the run's steps.

    Args:
        recipe: The recipe.
        num_steps: Optimizer steps of the run.

    Raises:
        UserError: If one cannot.
    """
    train = recipe.train
    if recipe.adapter.type == "adalora":
        fault = find_phase_fault(recipe.adapter.peft, num_steps)
        if fault is not None:
            key, message, hint = fault
            raise UserError(message, key=key, hint=hint)
    check_schedule(
        train.lr_scheduler_type,
        train.lr_scheduler_kwargs,
        learning_rate=train.learning_rate,
        num_steps=num_steps,
        warmup_steps=count_warmup_steps(num_steps, train.warmup_ratio, train.warmup_steps),
    )


def count_steps(value: float, num_steps: int) -> int:
    """Read a `*_steps` key: a number of steps, or below 1 a share of all steps; 0 is never."""
    if 0 < value < 1:
        return max(1, math.ceil(value * num_steps))
    return int(value)


def _plan_inplace(skeleton: nn.Module, section: AdapterSection) -> list[GroupPlan]:
    named = dict(skeleton.named_parameters())
    chosen = select_parameters(skeleton, section.type, section.modules_to_save)
    return [
        GroupPlan(
            kind,
            len({name.rpartition(".")[0] for name in names}),
            None,
            sum(named[name].numel() for name in names),
        )
        for kind, names in chosen.items()
    ]


def _plan_peft(skeleton: nn.Module, section: AdapterSection, task: str) -> list[GroupPlan]:
    from wegeft_cli.interop.baselines import inject_peft

    model = inject_peft(
        copy.deepcopy(skeleton),
        section.type,
        rank=section.r,
        alpha=section.alpha,
        target_modules=section.target_modules,
        options=section.peft,
        modules_to_save=section.modules_to_save,
        task_type=TASK_TYPES[task],
    )
    counts: dict[str, tuple[int, int]] = {}
    saved: set[str] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # ...layers.0.self_attn.q_proj.lora_A.default.weight: the layer's kind is q_proj
            parts = name.split(".")
            kind = next((p for i, p in enumerate(parts) if _is_method_part(parts, i)), parts[-1])
            if _SAVED in parts:  # ...lm_head.modules_to_save.default.weight
                kind = _SAVED
                saved.add(name.partition(f".{_SAVED}.")[0])
            layers, total = counts.get(kind, (0, 0))
            counts[kind] = (layers + 1, total + parameter.numel())
    if saved:
        counts[_SAVED] = (len(saved), counts[_SAVED][1])
    if not counts:
        raise UserError(f"{section.type!r} leaves nothing to learn", key="adapter.type")
    return [GroupPlan(kind, n, None, total) for kind, (n, total) in counts.items()]


def _is_method_part(parts: list[str], i: int) -> bool:
    """Tell whether the part after `i` is the PEFT method's own (lora_A, ia3_l, vera_lambda_b)."""
    method = ("lora_", "ia3_", "vera_", "hada_", "lokr_", "oft_", "hra_", "boft_", "fourierft_")
    return i + 1 < len(parts) and parts[i + 1].startswith(method)


def count_checkpoints(train: TrainSection, num_steps: int | None) -> int | None:
    """Count the checkpoints that lie side by side at most, the one being written included.

    Args:
        train: The recipe's `train`.
        num_steps: Optimizer steps of the run.

    Returns:
        Their number; None where all are kept and the steps are not known.
    """
    kept = train.save_total_limit
    if kept is None:
        if num_steps is None:
            return None
        every = count_steps(train.save_steps, num_steps)
        kept = num_steps // every if every else 0
    return kept + 1 + train.load_best_model_at_end


def find_run_dir(recipe: Recipe) -> Path:
    """Give the run's folder as the recipe names it."""
    return Path(recipe.output_dir).expanduser()
