"""A recipe becomes an adapter: recipe, inputs, model, loop, adapter, one call each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.distributed.sharding import build_sharding, check_launcher
from wegeft_cli.models.loading import load_base
from wegeft_cli.planning.preflight import RunInputs, attach_locations, find_run_dir, read_inputs
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.runs.build import build_learning, build_method, build_model
from wegeft_cli.runs.callbacks.checkpoints import CheckpointCallback
from wegeft_cli.runs.callbacks.progress import ProgressCallback
from wegeft_cli.runs.callbacks.run_files import RunFilesCallback
from wegeft_cli.runs.callbacks.sample_prompts import SamplePromptsCallback
from wegeft_cli.runs.callbacks.skipped_steps import SkippedStepsCallback
from wegeft_cli.runs.callbacks.trackers import Trackers, TrackersCallback
from wegeft_cli.runs.callbacks.validation import BenchmarksCallback, TaskMetricsCallback
from wegeft_cli.runs.describe import describe_end, describe_settings, describe_start
from wegeft_cli.runs.finalize import recall_adapter_step, recall_result, write_adapter
from wegeft_cli.runs.resume_rules import keep_recipe
from wegeft_cli.runs.start import Start, begin_run, check_disk, check_start, may_go_on, note_base
from wegeft_cli.tasks.registry import find_task
from wegeft_cli.training.callbacks import Callback, StopCallback
from wegeft_cli.training.snapshot import Snapshot
from wegeft_cli.training.trainer import LoopResult, Trainer


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
        adapter_step: The step that the adapter is of.
        best_step: The step of the best validation.
        best_metric: What `train.metric_for_best_model` was there.
        num_skipped: Steps whose loss or gradient was not finite.
        estimated_memory_gib: The plan's estimate of the peak memory of one device.
        peak_memory_gib: The measured one.
        waste: `padding_share`, `packed_sequences` and `head_share` of an epoch's positions; of a
            stream `estimated_from_rows` too, the first ones, which are all that was looked at.
    """

    run_dir: Path
    adapter_dir: Path | None
    status: str
    num_steps: int
    final_loss: float | None
    trainable_parameters: int
    validation_loss: float | None = None
    stopped_early: bool = False
    adapter_step: int | None = None
    best_step: int | None = None
    best_metric: float | None = None
    num_skipped: int = 0
    estimated_memory_gib: float | None = None
    peak_memory_gib: float | None = None
    waste: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the result as a JSON object, paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def train(
    recipe_path: str | Path | LoadedRecipe,
    overrides: Sequence[str] = (),
    *,
    resume: str | None = None,
    dry_run: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train a recipe's adapter.

    Args:
        recipe_path: A recipe file, the name of a shipped one, or a recipe that is read already.
        overrides: `key=value` texts that win over the file.
        resume: auto goes on from the run's newest whole checkpoint, a path from that checkpoint.
        dry_run: Check everything that is cheap and stop before the weights.
        should_stop: Asked after every pass of a step, and between the batches of a validation; true
            saves a checkpoint and leaves.
        reporter: Where words and progress go.

    Returns:
        How it ended.

    Raises:
        UserError: If the recipe, the data, the model or the folder is at fault.
        ExceptionGroup: If there are several such faults.
        MachineError: If the machine failed: full disk, out of memory, divergence.
    """
    reporter = reporter or SilentReporter()
    if isinstance(recipe_path, LoadedRecipe):
        loaded = recipe_path
    else:
        loaded = load_recipe(recipe_path, overrides)
    for note in loaded.notes:
        reporter.note(note)
    with attach_locations(loaded):
        return _train(loaded, resume, dry_run, should_stop, reporter)


def _train(
    loaded: LoadedRecipe,
    resume: str | None,
    dry_run: bool,
    should_stop: Callable[[], bool],
    reporter: Reporter,
) -> TrainResult:
    recipe = keep_recipe(loaded)
    check_launcher()
    processes = Processes.join(timedelta(seconds=recipe.train.ddp_timeout))
    sharding = build_sharding(recipe.train, processes)
    folder = RunDirectory(find_run_dir(recipe))
    given = check_start(folder, recipe, resume, processes)
    if resume is not None:  # before the first process writes what the others compare
        processes.wait()
    inputs = read_inputs(loaded, processes, reporter, resuming=may_go_on(folder, resume))
    check_disk(folder, recipe, inputs)
    if dry_run:
        return _tell_checked(folder, inputs)
    with begin_run(folder, recipe, resume, given, inputs, processes, reporter) as start:
        if start.is_done:
            return _tell_finished(recipe, folder, inputs, start, processes, reporter)
        if processes.is_main:
            folder.update(describe_start(recipe, inputs, processes))
            known = start.fingerprint or start.earlier.get("base_fingerprint")
            folder.update({"base_fingerprint": known})
        with _tracked(recipe, inputs, folder, start, processes, reporter) as trackers:
            base = load_base(recipe.model, head=inputs.head, **sharding)
            task = find_task(recipe.task)
            task.initialize_head(base, inputs.head, recipe)
            task.prepare_base(base, inputs.head, inputs.tokenizer)
            if start.fingerprint is None:  # a hub's model is on this machine only now
                note_base(start, recipe, folder, is_loaded=True)
                if processes.is_main:
                    folder.update({"base_fingerprint": start.fingerprint})
            model = build_model(
                base,
                recipe,
                processes,
                base_fingerprint=start.fingerprint,
                resuming=start.checkpoint is not None,
                warn=reporter.warn,
            )
            result = _run(
                model, recipe, inputs, folder, start, trackers, processes, should_stop, reporter
            )
            if processes.is_main:
                result.validation = folder.validation()
            ended = describe_end(result, processes)
            if processes.is_main:
                if result.status == "finished":
                    ended["adapter_step"] = write_adapter(
                        model,
                        recipe,
                        folder,
                        result,
                        start.fingerprint,
                        reporter,
                        head=inputs.head,
                    )
                folder.update(ended)
            trackers.status = result.status
        processes.leave()
    told = {"estimated_memory_gib": inputs.estimated_gib, "waste": inputs.waste, **ended}
    return _tell_ended(folder, inputs, result, told)


def _run(
    model: nn.Module,
    recipe: Recipe,
    inputs: RunInputs,
    folder: RunDirectory,
    start: Start,
    trackers: Trackers,
    processes: Processes,
    should_stop: Callable[[], bool],
    reporter: Reporter,
) -> LoopResult:
    """Train, with the run's folder, the trackers and the user listening."""
    source, checkpoint = inputs.source, start.checkpoint
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, schedule, settings = build_learning(recipe, parameters, source.num_steps)
    task = find_task(recipe.task)
    loss = task.loss(model, recipe)
    method, training_loss = build_method(model, recipe, loss, source.num_steps)
    with reporter.progress("training", source.num_steps) as advance:
        callbacks: list[Callback] = [
            StopCallback(should_stop),
            ProgressCallback(advance, reporter),
            RunFilesCallback(folder),
            TrackersCallback(trackers),
            SkippedStepsCallback(folder, inputs.tokenizer, reporter),
            CheckpointCallback(folder, recipe.train),
            TaskMetricsCallback(task, loss, inputs.head),
        ]
        if inputs.tasks:
            callbacks.append(BenchmarksCallback(recipe, inputs, reporter, advance))
        if inputs.prompts is not None:
            callbacks.append(
                SamplePromptsCallback(inputs.prompts, inputs.tokenizer, folder, trackers, reporter)
            )
        trainer = Trainer(
            model,
            parameters,
            training_loss,
            optimizer,
            schedule,
            source,
            settings,
            processes,
            method,
            callbacks,
        )
        return trainer.fit(Snapshot(checkpoint.tensors, checkpoint.state) if checkpoint else None)


@contextmanager
def _tracked(
    recipe: Recipe,
    inputs: RunInputs,
    folder: RunDirectory,
    start: Start,
    processes: Processes,
    reporter: Reporter,
) -> Iterator[Trackers]:
    """Open the run's trackers in the process that writes, and close them however it ends."""
    trackers = Trackers(
        inputs.trackers if processes.is_main else (),
        project=recipe.logging.project,
        run_name=recipe.logging.run_name or folder.path.resolve().name,
        run_dir=folder.path,
        earlier=start.earlier.get("trackers", {}),
        step=start.step,
        warn=reporter.warn,
    )
    if processes.is_main:
        # One that is down now may be up again when the run next goes on.
        folder.update({"trackers": {**start.earlier.get("trackers", {}), **trackers.ids}})
    try:
        trackers.log_config(describe_settings(recipe))
        yield trackers
    except KeyboardInterrupt:
        trackers.status = "interrupted"
        raise
    finally:
        trackers.finish()


def _tell_checked(folder: RunDirectory, inputs: RunInputs) -> TrainResult:
    """Give the result of a dry run."""
    return TrainResult(
        folder.path,
        None,
        "checked",
        inputs.source.num_steps,
        None,
        inputs.trainable,
        estimated_memory_gib=inputs.estimated_gib,
        waste=inputs.waste,
    )


def _tell_ended(
    folder: RunDirectory, inputs: RunInputs, result: LoopResult, told: Mapping[str, Any]
) -> TrainResult:
    """Give the result of a run that trained, and what its run.json tells beside it."""
    is_finished = result.status == "finished"
    return TrainResult(
        run_dir=folder.path,
        adapter_dir=folder.adapter_dir if is_finished else None,
        status=result.status,
        num_steps=result.num_steps,
        final_loss=result.final_loss,
        trainable_parameters=inputs.trainable,
        validation_loss=next(reversed(result.validation.values()), {}).get("eval_loss"),
        stopped_early=result.stopped_early,
        adapter_step=told.get("adapter_step") if is_finished else None,
        best_step=result.best_step,
        best_metric=result.best_metric,
        num_skipped=result.num_skipped,
        estimated_memory_gib=told.get("estimated_memory_gib"),
        peak_memory_gib=told.get("peak_memory_gib"),
        waste=told.get("waste"),
    )


def _tell_finished(
    recipe: Recipe,
    folder: RunDirectory,
    inputs: RunInputs,
    start: Start,
    processes: Processes,
    reporter: Reporter,
) -> TrainResult:
    """Give the result of a run that has its adapter: there is nothing left to do."""
    assert start.checkpoint is not None
    reporter.note(f"{folder.path} is finished already")
    result = recall_result(recipe, folder, start.checkpoint)
    told = {**start.earlier, **describe_end(result, processes), "error": None}
    # This process trained nothing: what it measures of itself is not the run's.
    told["peak_memory_gib"] = start.earlier.get("peak_memory_gib")
    if start.earlier.get("status") == "finished":
        told["finished_at"] = start.earlier.get("finished_at")
    else:  # killed between the adapter and run.json
        told["adapter_step"] = recall_adapter_step(recipe, folder, result, reporter)
    if processes.is_main:
        folder.update(told)
    return _tell_ended(folder, inputs, result, told)
