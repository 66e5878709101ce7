"""The end of a run: export the adapter of the last or the best step, or load a finished result."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from wegeft_cli.artifacts.checkpoint import Checkpoint, load_checkpoint, tidy_checkpoints
from wegeft_cli.artifacts.head_file import HEAD_NAME, head_to_json
from wegeft_cli.artifacts.prompt_record import PROMPT_KEY, PromptRecord
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.methods.base import AdapterRecord, Omission
from wegeft_cli.models.file_names import rename_checkpoint
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.publishing.model_card import write_card
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.runs.resume_rules import has_stopped_early
from wegeft_cli.runs.run import Run
from wegeft_cli.training.loop_settings import LoopResult
from wegeft_cli.training.snapshot import Progress, check_same_parameters


def export_adapter(
    model: nn.Module,
    run: Run,
    result: LoopResult,
    *,
    base_fingerprint: str | None,
    head: HeadSpec | None,
) -> int:
    """Write the adapter's folder, complete or not at all, and return the step of the adapter.

    With `train.load_best_model_at_end` the model first gets the parameters of the best step, or
    their moving average if there is one.
    """
    best = _load_best(run, result)
    tidy_checkpoints(run.directory.checkpoints_dir)  # no later save would do it
    step = result.num_steps if best is None else best.step
    if best is not None:
        load_parameters(model, run, best)
    folder = run.directory.adapter_dir
    save_adapter_of(model, run, result, step, folder, base_fingerprint=base_fingerprint, head=head)
    return step


def load_parameters(model: nn.Module, run: Run, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's parameters, or their moving average if it has one, for an adapter."""
    own = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = rename_checkpoint(model, checkpoint.tensors, own, checkpoint.state.get("names", ()))
    tensors = {**(found.get("ema") or found["parameters"]), **found.get("statistics", {})}
    parameters: dict[str, Tensor] = {
        **dict(model.named_parameters()), **dict(model.named_buffers())
    }  # fmt: skip
    check_same_parameters(tensors.keys() - found.get("statistics", {}).keys(), own)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    if checkpoint.state.get("method"):
        run.method.restore(model, checkpoint.state["method"])


def save_adapter_of(
    model: nn.Module,
    run: Run,
    result: LoopResult,
    step: int,
    folder: Path,
    *,
    base_fingerprint: str | None,
    head: HeadSpec | None,
) -> None:
    """Write the model's adapter, which is that of a step, complete or not at all."""
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_base = sum(p.numel() for p in model.parameters())
    if not run.method.trains_in_place:
        # The model holds trained modules and generators in addition to the base's own modules.
        num_base -= num_trained
    prompt = _read_prompt(run)
    card = write_card(
        run.recipe,
        result,
        adapter_step=step,
        prompt=prompt,
        parameters=(num_trained, num_base),
        omitted=[Omission(**each) for each in run.directory.record().get("omitted", ())],
    )
    more = {} if head is None else {HEAD_NAME: _head_text(head, run.recipe)}
    record = AdapterRecord(
        run.recipe, run.task.peft_task_type, base_fingerprint, card, more, prompt
    )
    run.method.save(model, folder, record)


def _read_prompt(run: Run) -> PromptRecord | None:
    """Return the prompt form in run.json; None for a classifier, and for an older run."""
    values = run.directory.record().get(PROMPT_KEY)
    if values is None:
        return None
    return PromptRecord.from_json(values, file=str(run.directory.record_path))


def load_finished_result(run: Run, checkpoint: Checkpoint) -> LoopResult:
    """Return the loop's result of a finished run from its last checkpoint and its metrics."""
    progress = Progress(**checkpoint.state["progress"])
    loss = progress.last_loss
    if progress.label_tokens:
        loss = progress.loss_sum / progress.label_tokens
    return LoopResult(
        "finished",
        checkpoint.step,
        loss,
        validation=run.directory.validation(),
        stopped_early=has_stopped_early(checkpoint, run.recipe),
        best_step=progress.best_step,
        best_metric=progress.best_metric,
        num_skipped=progress.num_skipped,
    )


def find_adapter_step(run: Run, result: LoopResult) -> int:
    """Return the step of a finished run's adapter, if a kill came before it was recorded."""
    best = _load_best(run, result)
    return result.num_steps if best is None else best.step


def _load_best(run: Run, result: LoopResult) -> Checkpoint | None:
    """Load the best step's checkpoint if the adapter is to be of an earlier step than the last.

    A missing checkpoint must not cost the run: the last step is used then.
    """
    step = result.best_step
    if not run.recipe.train.load_best_model_at_end or step is None or step == result.num_steps:
        return None
    try:
        return load_checkpoint(run.directory.checkpoint_dir(step))
    except MachineError:
        raise
    except UserError as fault:
        run.reporter.warn(
            "the adapter is that of the last step, since the checkpoint of the best step cannot be "
            f"read: {fault}"
        )
        return None


def _head_text(head: HeadSpec, recipe: Recipe) -> str:
    """Return the text of `head.json`: the classes, and how inputs are prepared."""
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
