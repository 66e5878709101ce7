"""How a run ends: its adapter, of the last step or of the best one, written whole."""

from __future__ import annotations

import torch
from torch import nn

from wegeft_cli.artifacts.checkpoint import Checkpoint, load_checkpoint, tidy_checkpoints
from wegeft_cli.artifacts.head_file import HEAD_NAME, head_to_json
from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.methods.base import AdapterRecord
from wegeft_cli.methods.registry import find_method
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.publishing.model_card import write_card
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter
from wegeft_cli.runs.start import has_stopped_early
from wegeft_cli.tasks.registry import find_task
from wegeft_cli.training.snapshot import Progress
from wegeft_cli.training.trainer import LoopResult


def write_adapter(
    model: nn.Module,
    recipe: Recipe,
    folder: RunDirectory,
    result: LoopResult,
    fingerprint: str | None,
    reporter: Reporter,
    *,
    head: HeadSpec | None = None,
) -> int:
    """Write the adapter's folder, whole or not at all.

    Args:
        model: The trained model; with `train.load_best_model_at_end` it gets the best step's
            factors, or their average where one is kept.
        recipe: The recipe.
        folder: The run's folder.
        result: How the loop ended.
        fingerprint: The base's.
        reporter: Told where the best checkpoint cannot be read.
        head: A classifier's head, which is told beside its weights.

    Returns:
        The step that the adapter is of.

    Raises:
        UserError: If the folder holds something already.
        MachineError: If the disk fails.
    """
    method = find_method(recipe.adapter.type)
    best = _find_best(recipe, folder, result, reporter)
    tidy_checkpoints(folder.checkpoints_dir)  # no save follows, which would do it
    step = result.num_steps if best is None else best.step
    if best is not None:
        tensors = best.tensors.get("ema") or best.tensors["parameters"]
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)
        if best.state.get("method"):
            method.restore(model, best.state["method"])
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    num_learned = sum(sizes[name] for name in learned)
    num_base = sum(sizes.values())
    if not method.trains_in_place:
        # Modules that are trained whole are beside the base's own in the model, as generators are.
        num_base -= num_learned
    card = write_card(
        recipe,
        result.num_steps,
        result.final_loss,
        adapter_step=step,
        parameters=(num_learned, num_base),
        validation=result.validation,
    )
    more = {} if head is None else {HEAD_NAME: describe_head(head, recipe)}
    record = AdapterRecord(recipe, find_task(recipe.task).peft_task_type, fingerprint, card, more)
    method.save(model, folder.adapter_dir, record)
    return step


def describe_head(head: HeadSpec, recipe: Recipe) -> str:
    """Give the text of `head.json`: what the head tells apart, and how its inputs are made.

    Args:
        head: The model's head.
        recipe: The recipe.

    Returns:
        JSON.
    """
    return head_to_json(
        {
            "task": head.task,
            "problem_type": head.problem_type,
            "labels": list(head.labels),
            "image_size": recipe.data.image_size,
            "image_transform": recipe.data.image_transform,
            "max_length": recipe.data.max_length,
        }
    )


def recall_result(recipe: Recipe, folder: RunDirectory, checkpoint: Checkpoint) -> LoopResult:
    """Give how the loop of a finished run ended, from what it left.

    Args:
        recipe: The recipe.
        folder: The run's folder.
        checkpoint: The run's last one.

    Returns:
        The result; all validations of the run are in it.
    """
    progress = Progress(**checkpoint.state["progress"])
    loss = progress.last_loss
    if progress.label_tokens:
        loss = progress.loss_sum / progress.label_tokens
    return LoopResult(
        "finished",
        checkpoint.step,
        loss,
        validation=folder.validation(),
        stopped_early=has_stopped_early(checkpoint, recipe),
        best_step=progress.best_step,
        best_metric=progress.best_metric,
        num_skipped=progress.num_skipped,
    )


def recall_adapter_step(
    recipe: Recipe, folder: RunDirectory, result: LoopResult, reporter: Reporter
) -> int:
    """Give the step that `write_adapter` took, where a kill came before it was written down.

    Args:
        recipe: The recipe.
        folder: The run's folder.
        result: How the loop ended.
        reporter: Told where the best checkpoint cannot be read.

    Returns:
        The step.

    Raises:
        MachineError: If the disk fails.
    """
    best = _find_best(recipe, folder, result, reporter)
    return result.num_steps if best is None else best.step


def _find_best(
    recipe: Recipe, folder: RunDirectory, result: LoopResult, reporter: Reporter
) -> Checkpoint | None:
    """Read the checkpoint of the best step, where the adapter is to be of an earlier one.

    A checkpoint that is gone must not cost the run.
    """
    step = result.best_step
    if not recipe.train.load_best_model_at_end or step is None or step == result.num_steps:
        return None
    try:
        return load_checkpoint(folder.checkpoint_dir(step))
    except MachineError:
        raise
    except UserError as fault:
        reporter.warn(
            f"the adapter is of the last step, as the best one's checkpoint cannot be read: {fault}"
        )
        return None
