"""`wegeft train`: check the recipe, build the model, train, write the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.data.batches.layout import Layout
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.distributed.sharding import build_sharding, check_launcher
from wegeft_cli.errors import UserError
from wegeft_cli.methods.registry import find_method
from wegeft_cli.models.file_names import rename_checkpoint
from wegeft_cli.planning.preflight import attach_locations, find_run_dir
from wegeft_cli.planning.run_setup import RunSetup, build_setup
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe
from wegeft_cli.recipe.parameter_budget import MatchedRank
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Advance, Reporter, SilentReporter
from wegeft_cli.runs.build import build_learning, build_model, load_prepared_base
from wegeft_cli.runs.callbacks.evaluation import BenchmarksCallback, TaskMetricsCallback
from wegeft_cli.runs.callbacks.progress import ProgressCallback
from wegeft_cli.runs.callbacks.run_files import (
    CheckpointCallback,
    MetricsFileCallback,
    SkippedStepsCallback,
)
from wegeft_cli.runs.callbacks.sample_prompts import SamplePromptsCallback
from wegeft_cli.runs.callbacks.trackers import Trackers, TrackersCallback
from wegeft_cli.runs.cpu_advice import advise_dtype, warn_of_few_cores
from wegeft_cli.runs.finalize import export_adapter, find_adapter_step, load_finished_result
from wegeft_cli.runs.resume_rules import (
    find_matched_rank,
    find_output_dir,
    with_absolute_paths,
)
from wegeft_cli.runs.run import Run, TrainResult, end_record, recipe_settings, result_from_record
from wegeft_cli.runs.start import (
    AUTO,
    RunState,
    can_resume,
    check_disk,
    check_resume,
    find_form,
    input_record,
    open_run,
    pass_record,
    record_base_fingerprint,
)
from wegeft_cli.tasks.base import Loss
from wegeft_cli.tasks.registry import find_task
from wegeft_cli.training.callbacks import Callback, StopCallback
from wegeft_cli.training.loop_settings import LoopResult
from wegeft_cli.training.snapshot import Snapshot, optimizer_order
from wegeft_cli.training.trainer import Trainer


@checked_arguments
def train(
    recipe_path: str | Path | LoadedRecipe,
    overrides: Sequence[str] = (),
    *,
    resume: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train a recipe's adapter.

    Args:
        recipe_path: A recipe file, the name of a shipped recipe, or a loaded recipe.
        overrides: `key=value` texts that win over the file.
        resume: `auto` resumes from the run's newest complete checkpoint, a path from that one.
        dry_run: Make all cheap checks and stop before the weights are loaded.
        overwrite: Replace an earlier run in the output folder, once all checks have passed. Its
            adapter, checkpoints, metrics and evaluations are removed, other files are kept.
        should_stop: Called after every forward pass of a step, and between the batches of a
            validation; true saves a checkpoint and returns.
        reporter: Receives messages and progress.

    Returns:
        How it ended.

    Raises:
        UserError: If the recipe, the data, the model or the directory is invalid.
        ExceptionGroup: If there are several such faults.
        MachineError: If the machine failed: full disk, out of memory, divergence.
    """
    reporter = reporter or SilentReporter()
    loaded = load_recipe(recipe_path, overrides)
    for note in loaded.notes:
        reporter.note(note)
    with attach_locations(loaded):
        return _train(loaded, resume, dry_run, overwrite, should_stop, reporter)


def _train(
    loaded: LoadedRecipe,
    resume: str | None,
    dry_run: bool,
    overwrite: bool,
    should_stop: Callable[[], bool],
    reporter: Reporter,
) -> TrainResult:
    recipe = replace(with_absolute_paths(loaded), output_dir=find_output_dir(loaded))
    if recipe.output_dir != loaded.recipe.output_dir:
        reporter.note(
            f"the run is in {recipe.output_dir}, the folder of its recipe.yaml; its `output_dir` "
            f"was {loaded.recipe.output_dir}"
        )
    directory = RunDirectory(find_run_dir(recipe))
    matched = _find_matched_rank(directory, recipe, resume)
    if matched is not None:
        recipe = replace(recipe, adapter=matched.settle(recipe.adapter))
        adapter = matched.settle(loaded.recipe.adapter)
        loaded = replace(loaded, recipe=replace(loaded.recipe, adapter=adapter))
    check_launcher()
    processes = Processes.join(timedelta(seconds=recipe.train.ddp_timeout))
    sharding = build_sharding(recipe.train, processes)
    run = Run(
        recipe=recipe,
        task=find_task(recipe.task),
        method=find_method(recipe.adapter.type),
        directory=directory,
        processes=processes,
        reporter=reporter,
    )
    named = check_resume(run, resume, overwrite=overwrite)
    if resume is not None:
        processes.wait()  # all compare the recipe before the main process writes it
    setup = build_setup(loaded, processes, reporter, resuming=can_resume(run.directory, resume))
    matched = matched or setup.targets.matched
    if matched is not None:
        run = replace(run, recipe=replace(recipe, adapter=matched.settle(recipe.adapter)))
        setup = replace(setup, targets=replace(setup.targets, matched=matched))
    check_disk(run, setup)
    if dry_run:
        return _checked_result(run, setup)
    warn_of_few_cores(run)
    with open_run(run, resume, named, setup, overwrite=overwrite) as state:
        if state.is_done:
            return _finished_result(run, setup, state)
        fingerprint = state.fingerprint or state.record.get("base_fingerprint")
        run.update_record({"base_fingerprint": fingerprint})
        with _open_trackers(run, setup, state) as trackers:
            model, layout = _load_model(run, setup, state, sharding)
            loss = run.task.loss(model, recipe, layout)
            result = _fit(model, loss, run, setup, state, trackers, should_stop)
            record = _close_run(model, run, setup, state, result)
            trackers.status = result.status
        processes.leave()
    return result_from_record(run.directory, {**input_record(setup), **record})


def _find_matched_rank(
    directory: RunDirectory, recipe: Recipe, resume: str | None
) -> MatchedRank | None:
    """Return the rank that the resumed run has chosen for the recipe's parameter budget."""
    if resume is None:
        return None
    if resume != AUTO:
        directory = RunDirectory.of_checkpoint(Path(resume).expanduser())
    return find_matched_rank(directory, recipe)


def _load_model(
    run: Run, setup: RunSetup, state: RunState, sharding: Mapping[str, Any]
) -> tuple[nn.Module, Layout]:
    """Load the base and prepare it for training; see `build_model`."""
    run.reporter.note(f"loading the weights of {run.recipe.model.name_or_path}")
    base = load_prepared_base(run, setup.head, setup.tokenizer, sharding)
    if state.fingerprint is None:  # a model of the hub is on this machine from now on
        record_base_fingerprint(run, state, is_loaded=True)
        run.update_record({"base_fingerprint": state.fingerprint})
    advise_dtype(run, base)
    run.reporter.note("adding the adapter and testing the model on a few rows")
    model, layout = build_model(
        base, run, setup, base_fingerprint=state.fingerprint, checkpoint=state.checkpoint
    )
    run.update_record({"layout": layout.kind, **pass_record(setup)})
    return model, layout


def _fit(
    model: nn.Module,
    loss: Loss,
    run: Run,
    setup: RunSetup,
    state: RunState,
    trackers: Trackers,
    should_stop: Callable[[], bool],
) -> LoopResult:
    """Train the model."""
    source, checkpoint = setup.source, state.checkpoint
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, schedule, settings = build_learning(
        run.recipe, parameters, source.num_steps, setup.steps_per_epoch
    )
    method, training_loss = run.method.stepper(model, loss, source.num_steps)
    with run.reporter.progress("training", source.num_steps) as advance:
        callbacks: list[Callback] = [
            StopCallback(should_stop),
            ProgressCallback(advance, run.reporter),
            MetricsFileCallback(run.directory),
            TrackersCallback(trackers),
            SkippedStepsCallback(run.directory, setup.tokenizer, run.reporter),
            CheckpointCallback(run.directory, run.recipe.train),
            TaskMetricsCallback(run.task, loss, setup.head),
        ]
        if setup.tasks:
            callbacks.append(_benchmarks_callback(run, setup, advance))
        if setup.prompts is not None:
            callbacks.append(
                SamplePromptsCallback(
                    setup.prompts, setup.tokenizer, run.directory, trackers, run.reporter
                )
            )
        trainer = Trainer(
            model,
            parameters,
            training_loss,
            optimizer,
            schedule,
            source,
            settings,
            run.processes,
            method,
            callbacks,
        )
        snapshot = None
        if checkpoint is not None:
            names, own = checkpoint.state.get("names", ()), optimizer_order(parameters, optimizer)
            tensors = rename_checkpoint(model, checkpoint.tensors, own, names)
            snapshot = Snapshot(tensors, checkpoint.state)
        try:
            return trainer.fit(snapshot)
        except BaseException:
            with suppress(UserError, OSError):  # the error itself is what matters
                run.update_record({"num_steps": trainer.step})
            raise


def _benchmarks_callback(run: Run, setup: RunSetup, advance: Advance) -> BenchmarksCallback:
    form = find_form(run, setup)
    return BenchmarksCallback(run.recipe, setup.tokenizer, setup.tasks, run.reporter, advance, form)


def _close_run(
    model: nn.Module, run: Run, setup: RunSetup, state: RunState, result: LoopResult
) -> dict[str, Any]:
    """Write the adapter of a finished run, and return the last values of run.json."""
    is_main = run.processes.is_main
    if is_main:
        result.validation = run.directory.validation()
    record = {**end_record(result, run.processes), **pass_record(setup)}
    if is_main and result.status == "finished":
        record["adapter_step"] = export_adapter(
            model, run, result, base_fingerprint=state.fingerprint, head=setup.head
        )
    run.update_record(record)
    return record


@contextmanager
def _open_trackers(run: Run, setup: RunSetup, state: RunState) -> Iterator[Trackers]:
    """Open the run's trackers in the main process, and close them with the status of the run."""
    logging, directory = run.recipe.logging, run.directory
    earlier = state.record.get("trackers", {})
    trackers = Trackers(
        setup.trackers if run.processes.is_main else (),
        project=logging.project,
        run_name=logging.run_name or directory.path.resolve().name,
        run_dir=directory.path,
        earlier=earlier,
        step=state.step,
        warn=run.reporter.warn,
    )
    # A tracker that is down now may be up again when the run is resumed.
    run.update_record({"trackers": {**earlier, **trackers.ids}})
    try:
        trackers.log_config(recipe_settings(run.recipe))
        yield trackers
    except KeyboardInterrupt:
        trackers.status = "interrupted"
        raise
    finally:
        trackers.finish()


def _checked_result(run: Run, setup: RunSetup) -> TrainResult:
    """Return the result of a dry run."""
    return TrainResult(
        run_dir=run.directory.path,
        adapter_dir=None,
        status="checked",
        num_steps=setup.source.num_steps,
        final_loss=None,
        **input_record(setup),
    )


def _finished_result(run: Run, setup: RunSetup, state: RunState) -> TrainResult:
    """Return the result of a run that has its adapter already, and complete its run.json."""
    assert state.checkpoint is not None
    run.reporter.note(f"{run.directory.path} is finished already")
    result = load_finished_result(run, state.checkpoint)
    record = {**state.record, **end_record(result, run.processes), "error": None}
    # This process has trained nothing, so its own measurement is not the run's.
    record["peak_memory_gib"] = state.record.get("peak_memory_gib")
    if state.record.get("status") == "finished":
        record["finished_at"] = state.record.get("finished_at")
    else:  # killed between the adapter and run.json
        record["adapter_step"] = find_adapter_step(run, result)
    run.update_record(record)
    trainable = {"trainable_parameters": setup.trainable}
    return result_from_record(run.directory, {**record, **trainable})
