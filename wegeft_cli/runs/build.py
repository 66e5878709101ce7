"""Build what the trainer takes from a recipe: model, optimizer, scheduler and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wegeft_cli.artifacts.checkpoint import Checkpoint
from wegeft_cli.data.batches.layout import LAYOUT_KEY, LIMIT_KEY, Layout
from wegeft_cli.errors import UserError
from wegeft_cli.methods.init_from import init_from_adapter
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.models.kernels import apply_liger, compile_layers, enable_checkpointing
from wegeft_cli.models.loading import load_base
from wegeft_cli.models.running_statistics import moves_statistics
from wegeft_cli.models.stochastic_depth import add_drop_path
from wegeft_cli.planning.preflight import count_schedule_steps, count_steps
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.runs.run import Run
from wegeft_cli.tasks.registry import inject_adapter
from wegeft_cli.training.loop_settings import LoopSettings
from wegeft_cli.training.neftune import add_neftune
from wegeft_cli.training.optimizer import AdamSettings, build_optimizer
from wegeft_cli.training.scheduler import build_schedule, count_warmup_steps

if TYPE_CHECKING:
    from wegeft_cli.planning.run_setup import RunSetup


def load_prepared_base(
    run: Run, head: HeadSpec | None, processor: Any, sharding: Mapping[str, Any] | None = None
) -> nn.Module:
    """Load the base with its head and what the task changes in it, for `build_model`."""
    base = load_base(run.recipe.model, head=head, warn=run.reporter.warn, **(sharding or {}))
    run.task.initialize_head(base, head, run.recipe)
    run.task.prepare_base(base, head, processor)
    return base


def build_model(
    base: nn.Module,
    run: Run,
    setup: RunSetup,
    *,
    base_fingerprint: str | None,
    checkpoint: Checkpoint | None,
) -> tuple[nn.Module, Layout]:
    """Prepare a loaded base for training: kernels, adapter, device, checkpointing, noise.

    Return the model and the layout of its batches.

    Raises:
        UserError: If the adapter, a kernel or packing does not fit the model.
    """
    recipe, train = run.recipe, run.recipe.train
    if train.use_liger_kernel:
        apply_liger(base)
    set_seed(recipe.seed)
    model = inject_adapter(base, recipe, setup.targets.section)
    if recipe.model.drop_path_rate and not hasattr(base.config, "drop_path_rate"):
        add_drop_path(base, recipe.model.drop_path_rate)
    if recipe.adapter.init_from is not None and checkpoint is None:
        init_from_adapter(
            model,
            recipe.adapter.init_from,
            recipe.adapter,
            base_fingerprint=base_fingerprint,
            warn=run.reporter.warn,
        )
    if run.processes.count > 1 and moves_statistics(model):
        raise UserError(
            "the model has running statistics (BatchNorm), which each process would move its own "
            "way",
            key="adapter.type",
            hint="train this model with one process, or take a method that freezes the base",
        )
    model.to(run.processes.device)
    if train.gradient_checkpointing:
        enable_checkpointing(model)
    layout = _choose_layout(model, run, setup, checkpoint)
    if train.neftune_noise_alpha is not None:
        add_neftune(model, train.neftune_noise_alpha)
    if train.compile:
        compile_layers(model)
    return model, layout


def _choose_layout(
    model: nn.Module, run: Run, setup: RunSetup, checkpoint: Checkpoint | None
) -> Layout:
    """Choose the layout of the batches, and let the source make such batches."""
    source = setup.source
    earlier = None if checkpoint is None else checkpoint.state.get("source", {})
    max_tokens = source.max_tokens
    if earlier is not None:  # the recorded size, or a lower one of the recipe
        sizes = (earlier.get(LIMIT_KEY), run.recipe.train.max_tokens_per_pass)
        max_tokens = min((size for size in sizes if size is not None), default=None)
    may_be_flat = earlier is None or earlier.get(LAYOUT_KEY) == "flat"
    layout = run.task.check_built(model, setup.tokenizer, run.recipe, may_be_flat=may_be_flat)
    if layout.note is not None:
        run.reporter.warn(layout.note)
    elif layout.reason is not None:
        run.reporter.note(f"rows are padded to the longest of a forward pass: {layout.reason}")
    source.use_layout(layout.kind, max_tokens)
    return layout


def build_learning(
    recipe: Recipe,
    parameters: Mapping[str, nn.Parameter],
    num_steps: int,
    steps_per_epoch: int,
) -> tuple[Optimizer, LRScheduler, LoopSettings]:
    """Build the optimizer, the learning rate scheduler and the settings of the loop.

    Raises:
        UserError: If the optimizer or the scheduler does not accept its settings.
    """
    train = recipe.train
    optimizer = build_optimizer(
        train.optim,
        parameters,
        learning_rate=train.learning_rate,
        lr_ratio=train.lr_ratio,
        weight_decay=train.weight_decay,
        adam=AdamSettings(train.adam_beta1, train.adam_beta2, train.adam_epsilon),
        options=train.optim_args,
    )
    schedule_steps = count_schedule_steps(train, num_steps)
    schedule = build_schedule(
        train.lr_scheduler_type,
        optimizer,
        num_steps=schedule_steps,
        warmup_steps=count_warmup_steps(schedule_steps, train.warmup_ratio, train.warmup_steps),
        options=train.lr_scheduler_kwargs,
    )
    settings = LoopSettings(
        max_grad_norm=train.max_grad_norm,
        mixed_precision=train.mixed_precision,
        logging_steps=train.logging_steps,
        eval_steps=steps_per_epoch
        if train.eval_strategy == "epoch"
        else count_steps(train.eval_steps, num_steps),
        save_steps=steps_per_epoch
        if train.save_strategy == "epoch"
        else count_steps(train.save_steps, num_steps),
        early_stopping_patience=train.early_stopping_patience,
        max_skipped_steps=train.max_skipped_steps,
        ema_decay=train.ema_decay,
        check_steps=train.check_steps,
        seed=recipe.seed,
        activation_offload=train.activation_offload,
        metric_for_best_model=train.metric_for_best_model,
        greater_is_better=train.metric_for_best_model != "eval_loss",
        save_best=train.load_best_model_at_end,
        # Generating answers takes much longer than saving.
        save_before_validation=bool(train.eval_tasks or recipe.logging.sample_prompts),
    )
    return optimizer, schedule, settings
