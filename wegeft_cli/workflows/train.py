"""A recipe becomes an adapter: recipe, data, model, generators, loop, adapter, one call each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from wegeft_cli.checkpoints.files import atomic_folder, check_free_space, lock_folder
from wegeft_cli.checkpoints.fingerprint import fingerprint_base
from wegeft_cli.checkpoints.resume import (
    Checkpoint,
    find_newest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from wegeft_cli.data.pipeline import PreparedData, build_datasets
from wegeft_cli.data.sources import find_local
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.generators.inject import get_generators, inject_generators
from wegeft_cli.models.base import find_base_folder, load_model, load_tokenizer, pad_token_id
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe, recipe_to_yaml
from wegeft_cli.recipe.schema import DataSource, Recipe
from wegeft_cli.training.loop import LoopHooks, LoopResult, LoopSettings, run_loop
from wegeft_cli.training.loss import CausalLoss
from wegeft_cli.training.meters import StepMetrics
from wegeft_cli.training.optim import build_optimizer, build_schedule, count_warmup_steps
from wegeft_cli.training.state import Snapshot
from wegeft_cli.workflows.adapters import save_adapter
from wegeft_cli.workflows.batches import PlannedBatches
from wegeft_cli.workflows.card import write_card
from wegeft_cli.workflows.prepare import (
    GroupPlan,
    build_skeleton,
    build_step_plan,
    count_steps,
    find_run_dir,
    plan_groups,
    tell_places,
)
from wegeft_cli.workflows.reporter import Reporter, SilentReporter
from wegeft_cli.workflows.resume import check_same_recipe
from wegeft_cli.workflows.run_folder import RunFolder, describe_environment, now

# Bytes that a checkpoint takes per learned parameter: the factor and AdamW's two moments, float32.
_CHECKPOINT_BYTES = 12


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        run_dir: Its folder.
        adapter_dir: Its adapter; None where it was stopped or only checked.
        status: finished, interrupted, or checked (a dry run).
        num_steps: Optimizer steps done (of a dry run: to do).
        final_loss: Mean loss of the last line of metrics.
        trainable_parameters: What learned.
        validation_loss: Loss of the last validation.
        stopped_early: Whether patience ran out.
    """

    run_dir: Path
    adapter_dir: Path | None
    status: str
    num_steps: int
    final_loss: float | None
    trainable_parameters: int
    validation_loss: float | None = None
    stopped_early: bool = False

    def to_json(self) -> dict[str, Any]:
        """Give the result as a JSON object, paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def train(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: str | None = None,
    dry_run: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train a recipe's adapter.

    Args:
        recipe_path: A recipe file, or the name of a shipped one.
        overrides: `key=value` texts that win over the file.
        resume: auto goes on from the run's newest whole checkpoint, a path from that checkpoint.
        dry_run: Check everything that is cheap and stop before the weights.
        should_stop: Asked after every step; true saves a checkpoint and leaves.
        reporter: Where words and progress go.

    Returns:
        How it ended.

    Raises:
        UserError: If the recipe, the data, the model or the folder is at fault.
        ExceptionGroup: If there are several such faults.
        MachineError: If the machine failed: full disk, out of memory, divergence.
    """
    reporter = reporter or SilentReporter()
    loaded = load_recipe(recipe_path, overrides)
    for note in loaded.notes:
        reporter.note(note)
    with tell_places(loaded):
        return _train(loaded, resume, dry_run, should_stop, reporter)


def _train(
    loaded: LoadedRecipe,
    resume: str | None,
    dry_run: bool,
    should_stop: Callable[[], bool],
    reporter: Reporter,
) -> TrainResult:
    recipe = loaded.recipe
    kept_recipe = _with_found_paths(loaded)
    # Without `cpu`, Accelerate takes each of several CPU processes for a run of its own.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    folder = RunFolder(find_run_dir(recipe))
    if resume is None:
        if accelerator.is_main_process:  # a later process may meet what the first has written
            folder.check_unused()
    else:
        check_same_recipe(folder.path / "recipe.yaml", kept_recipe)
    given = None
    if resume not in (None, "auto"):
        given = load_checkpoint(Path(resume))
        # <run>/checkpoints/step-00000100: the checkpoint of another run brings that run's recipe.
        own_recipe = Path(resume).resolve().parent.parent / "recipe.yaml"
        check_same_recipe(own_recipe, kept_recipe)
    tokenizer, data, groups = _prepare(loaded, reporter)
    plan = build_step_plan(recipe, len(data.train), accelerator.num_processes)
    trainable = sum(group.num_parameters for group in groups)
    if dry_run:
        return TrainResult(folder.path, None, "checked", plan.num_steps, None, trainable)
    check_free_space(folder.path, 3 * _CHECKPOINT_BYTES * trainable, "the run's checkpoints")

    # Until a run is under way, a fault must leave the run.json of an earlier one as it is.
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone_in(folder, accelerator))
        checkpoint = given
        if resume == "auto":
            checkpoint = _find_checkpoint(folder, reporter)
        if checkpoint is None and folder.adapter_dir.exists():
            folder.check_unused()  # its checkpoints are gone, its adapter stays
        if checkpoint is not None and folder.adapter_dir.exists():
            _check_nothing_left(folder, checkpoint, plan.num_steps, given is not None)
            return _tell_finished(folder, checkpoint, trainable, reporter)
        resuming = checkpoint is not None
        fingerprint = _fingerprint_base(recipe, folder, resuming=resuming)
        earlier = folder.adopt().get("validation", {}) if resuming else {}
        stack.enter_context(_told_in_run_json(folder, accelerator))
        if accelerator.is_main_process:
            folder.write_recipe(recipe_to_yaml(kept_recipe))
            folder.start_metrics(checkpoint.step if checkpoint else 0)
            folder.update(_describe_start(recipe, data, accelerator, trainable))
            folder.update({"base_fingerprint": fingerprint})
        model = _load_base(recipe)
        if fingerprint is None:  # a hub's model is on this machine only now
            fingerprint = _fingerprint_base(recipe, folder, resuming=resuming)
            if accelerator.is_main_process:
                folder.update({"base_fingerprint": fingerprint})
        set_seed(recipe.seed)
        model = _inject(model, recipe)
        model.to(accelerator.device)
        if recipe.train.gradient_checkpointing:
            _enable_checkpointing(model)
        # Dropout differs from process to process, the factors do not.
        set_seed(recipe.seed + accelerator.process_index)
        source = PlannedBatches(
            data.train,
            plan,
            validation=data.validation,
            rank=accelerator.process_index,
            eval_batch_size=recipe.train.per_device_eval_batch_size,
            pad_token_id=pad_token_id(tokenizer),
        )
        result = _run(model, recipe, source, folder, accelerator, checkpoint, should_stop, reporter)
        done = checkpoint.step if checkpoint is not None else 0
        before = {int(step): loss for step, loss in earlier.items() if int(step) <= done}
        result.validation = {**before, **result.validation}
        if result.status == "finished" and accelerator.is_main_process:
            _save(model, recipe, folder, result, fingerprint)
        if accelerator.is_main_process:
            folder.update(_describe_end(result))
        _leave_group(accelerator)
    finished = result.status == "finished"
    return TrainResult(
        run_dir=folder.path,
        adapter_dir=folder.adapter_dir if finished else None,
        status=result.status,
        num_steps=result.num_steps,
        final_loss=result.final_loss,
        trainable_parameters=trainable,
        validation_loss=next(reversed(result.validation.values()), None),
        stopped_early=result.stopped_early,
    )


def _prepare(loaded: LoadedRecipe, reporter: Reporter) -> tuple[Any, PreparedData, list[GroupPlan]]:
    """Do every cheap check: the model's shape and targets, the tokenizer, the rows."""
    recipe = loaded.recipe
    config, skeleton = build_skeleton(recipe.model)
    groups = plan_groups(skeleton, recipe.adapter)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and recipe.data.max_length > context:
        raise UserError(
            f"rows of {recipe.data.max_length} tokens exceed the model's context of {context}",
            key="data.max_length",
            hint=f"use {context} or less",
        )
    tokenizer = load_tokenizer(
        recipe.model.name_or_path,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    data = build_datasets(recipe.data, tokenizer=tokenizer, recipe_dir=loaded.path.parent)
    report = data.report
    reporter.note(
        f"{report.num_rows:,} rows, {report.num_tokens:,} tokens, "
        f"{report.num_label_tokens / report.num_tokens:.0%} of them learned"
    )
    for warning in report.warnings:
        reporter.warn(warning)
    return tokenizer, data, groups


def _with_found_paths(loaded: LoadedRecipe) -> Recipe:
    """Write out paths that were found beside the recipe, so that the run's copy finds them too."""

    def found(sources: list[DataSource]) -> list[DataSource]:
        paths = [(source, find_local(source.path, loaded.path.parent)) for source in sources]
        return [
            source
            if path is None or path == Path(source.path)
            else replace(source, path=str(path.resolve()))
            for source, path in paths
        ]

    data = loaded.recipe.data
    template = find_local(data.template, loaded.path.parent)
    if template is not None and template != Path(data.template):
        data = replace(data, template=str(template.resolve()))
    data = replace(data, train=found(data.train), validation=found(data.validation))
    return replace(loaded.recipe, data=data)


def _load_base(recipe: Recipe) -> nn.Module:
    return load_model(
        recipe.model.name_or_path,
        revision=recipe.model.revision,
        dtype=recipe.model.dtype,
        attn_implementation=recipe.model.attn_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def _inject(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Put what learns into the base: generators, or a PEFT method as a baseline."""
    section = recipe.adapter
    if section.type == "wegeft":
        inject_generators(
            model,
            rank=section.r,
            alpha=section.alpha,
            target_modules=section.target_modules,
            share=section.share,  # type: ignore[arg-type]
            groups=section.groups,
            side=section.side,  # type: ignore[arg-type]
            init=section.init,  # type: ignore[arg-type]
            dropout=section.dropout,
            view=section.view,  # type: ignore[arg-type]
            seed=recipe.seed,
        )
        return model
    from wegeft_cli.interop.peft import inject_peft

    return inject_peft(
        model,
        section.type,
        rank=section.r,
        alpha=section.alpha,
        target_modules=section.target_modules,
        options=section.peft,
    )


def _enable_checkpointing(model: Any) -> None:
    # Reentrant checkpointing gives wrong gradients for parameters shared by layers, in silence,
    # as soon as something hooks into the backward pass; it is never used.
    model.activation_checkpointing_enable({"use_reentrant": False})


def _run(
    model: nn.Module,
    recipe: Recipe,
    source: PlannedBatches,
    folder: RunFolder,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
    should_stop: Callable[[], bool],
    reporter: Reporter,
) -> LoopResult:
    """Build optimizer and schedule, and train with the run's folder listening."""
    section = recipe.train
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(
        section.optim,
        parameters.values(),
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        betas=(section.adam_beta1, section.adam_beta2),
        epsilon=section.adam_epsilon,
    )
    warmup = count_warmup_steps(source.num_steps, section.warmup_ratio, section.warmup_steps)
    schedule = build_schedule(
        section.lr_scheduler_type, optimizer, num_steps=source.num_steps, warmup_steps=warmup
    )
    settings = LoopSettings(
        max_grad_norm=section.max_grad_norm,
        mixed_precision=section.mixed_precision,
        logging_steps=section.logging_steps,
        eval_steps=count_steps(section.eval_steps, source.num_steps),
        save_steps=count_steps(section.save_steps, source.num_steps),
        early_stopping_patience=section.early_stopping_patience,
    )
    is_main = accelerator.is_main_process

    with reporter.progress("training", source.num_steps) as advance:

        def on_metrics(metrics: StepMetrics) -> None:
            advance(
                metrics.step,
                loss=f"{metrics.loss:.4f}",
                lr=f"{metrics.learning_rate:.2e}",
                tokens_per_s=f"{metrics.tokens_per_second:,.0f}",
                memory=f"{metrics.peak_memory_gib:.2f} GiB",
            )
            if is_main:
                folder.append_metrics(metrics.to_json())

        def on_validation(step: int, loss: float) -> None:
            reporter.note(f"step {step}: validation loss {loss:.4f}")
            if is_main:
                folder.append_metrics({"step": step, "eval_loss": loss})

        def on_save(step: int, snapshot: Snapshot) -> None:
            if is_main:
                save_checkpoint(
                    folder.checkpoints_dir,
                    step,
                    tensors=snapshot.tensors,
                    state=snapshot.state,
                    keep=section.save_total_limit,
                )

        return run_loop(
            model,
            parameters,
            CausalLoss(model),
            optimizer,
            schedule,
            source,
            settings,
            accelerator=accelerator,
            resume_from=Snapshot(checkpoint.tensors, checkpoint.state) if checkpoint else None,
            hooks=LoopHooks(
                on_step=lambda step, loss: advance(step),
                on_metrics=on_metrics,
                on_validation=on_validation,
                on_save=on_save,
                should_stop=should_stop,
            ),
        )


def _fingerprint_base(recipe: Recipe, folder: RunFolder, *, resuming: bool) -> str | None:
    """Fingerprint the base before the first step; a run goes on upon its own base alone."""
    base_dir = find_base_folder(recipe.model.name_or_path, recipe.model.revision)
    fingerprint = fingerprint_base(base_dir) if base_dir is not None else None
    before = folder.adopt().get("base_fingerprint") if resuming else None
    if before is not None and before != fingerprint:
        raise UserError(
            f"the base {recipe.model.name_or_path!r} has changed since the run began",
            file=str(folder.path / "run.json"),
            key="base_fingerprint",
            hint="give the same weights, or begin a new run with another output_dir",
        )
    return fingerprint


def _check_nothing_left(
    folder: RunFolder, checkpoint: Checkpoint, num_steps: int, is_given: bool
) -> None:
    """Refuse to train on in the folder of a run that has its adapter."""
    stopped_early = bool(folder.adopt().get("stopped_early"))
    if is_given or (checkpoint.step < num_steps and not stopped_early):
        raise UserError(
            "this run has its adapter already, and it is not replaced",
            file=str(folder.adapter_dir),
            key="--resume",
            hint="choose another output_dir for the longer run",
        )


def _leave_group(accelerator: Accelerator) -> None:
    """End a run of many processes together: one that leaves early takes the others down."""
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        accelerator.end_training()


def _tell_finished(
    folder: RunFolder, checkpoint: Checkpoint, trainable: int, reporter: Reporter
) -> TrainResult:
    """Give the result of a run that has its adapter: there is nothing left to do."""
    reporter.note(f"{folder.path} is finished already")
    loss = checkpoint.state["progress"]["last_loss"]
    folder.adopt()
    folder.update({"status": "finished", "num_steps": checkpoint.step, "final_loss": loss})
    return TrainResult(
        folder.path, folder.adapter_dir, "finished", checkpoint.step, loss, trainable
    )


def _save(
    model: nn.Module,
    recipe: Recipe,
    folder: RunFolder,
    result: LoopResult,
    fingerprint: str | None,
) -> None:
    """Write the adapter's folder, whole or not at all."""
    card = write_card(recipe, result.num_steps, result.final_loss)
    if get_generators(model) is not None:
        asked = recipe.adapter.target_modules
        save_adapter(
            model,
            folder.adapter_dir,
            base_model_name_or_path=recipe.model.name_or_path,
            revision=recipe.model.revision,
            base_fingerprint=fingerprint,
            target_modules=asked if isinstance(asked, str) else tuple(asked),
            card=card,
        )
        return
    from wegeft_cli.interop.peft import save_peft

    with atomic_folder(folder.adapter_dir) as temporary:
        save_peft(model, temporary, base_model_name_or_path=recipe.model.name_or_path)
        (temporary / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _alone_in(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run's folder against a second run; the first process of a run holds it for all."""
    with lock_folder(folder.path) if accelerator.is_main_process else contextlib.nullcontext():
        yield


@contextmanager
def _told_in_run_json(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """Write down how the run failed, if it does, and translate running out of memory."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if accelerator.is_main_process and (folder.path / "run.json").exists():
            with contextlib.suppress(UserError, OSError):
                folder.update({"status": status, "error": str(error), "finished_at": now()})
        if _is_out_of_memory(error):
            raise MachineError(
                f"out of memory: {str(error).splitlines()[0] if str(error) else 'no more left'}",
                key="train.per_device_train_batch_size",
                hint="lower it and raise train.gradient_accumulation_steps, lower "
                "data.max_length, or set train.gradient_checkpointing: true; while validating, "
                "lower train.per_device_eval_batch_size",
            ) from error
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _find_checkpoint(folder: RunFolder, reporter: Reporter) -> Checkpoint | None:
    checkpoint, notes = find_newest_checkpoint(folder.checkpoints_dir)
    for note in notes:
        reporter.warn(note)
    if checkpoint is None:
        reporter.note(f"{folder.path} holds no checkpoint: the run starts at its beginning")
    else:
        reporter.note(f"going on from step {checkpoint.step}")
    return checkpoint


def _describe_start(
    recipe: Recipe, data: PreparedData, accelerator: Accelerator, trainable: int
) -> dict[str, Any]:
    return {
        "status": "running",
        "started_at": now(),
        **describe_environment(),
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
        "seed": recipe.seed,
        "base_model_name_or_path": recipe.model.name_or_path,
        "trainable_parameters": trainable,
        "data": asdict(data.report),
    }


def _describe_end(result: LoopResult) -> dict[str, Any]:
    return {
        "status": result.status,
        "finished_at": now(),
        "num_steps": result.num_steps,
        "final_loss": result.final_loss,
        "validation": {str(step): loss for step, loss in result.validation.items()},
        "stopped_early": result.stopped_early,
    }
