"""How a run begins: its folder and lock, whether it goes on, and the base that it stands on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.artifacts.adapter import CONFIG_NAME, WEIGHTS_NAME
from wegeft_cli.artifacts.checkpoint import Checkpoint, find_newest_checkpoint, load_checkpoint
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.artifacts.run_directory import RunDirectory, now
from wegeft_cli.data.fingerprint import check_same_data
from wegeft_cli.distributed.failures import is_lost_process, tell_lost_process
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import UserError
from wegeft_cli.models.device_memory import is_out_of_memory, out_of_memory_error
from wegeft_cli.models.loading import find_base_folder
from wegeft_cli.planning.preflight import RunInputs, count_checkpoints
from wegeft_cli.recipe.load import recipe_to_yaml
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter
from wegeft_cli.runs.describe import describe_data
from wegeft_cli.runs.resume_rules import check_same_recipe
from wegeft_cli.storage.atomic import check_free_space, heal_folder

AUTO = "auto"


@dataclass
class Start:
    """Where a run stands when it begins.

    Args:
        checkpoint: Where it goes on; None at its beginning.
        is_done: It has its adapter already.
        earlier: run.json as the run left it; empty at its beginning.
        fingerprint: The base's; None while it is still on a hub, or has no safetensors.
    """

    checkpoint: Checkpoint | None = None
    is_done: bool = False
    earlier: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done before."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def check_start(
    folder: RunDirectory, recipe: Recipe, resume: str | None, processes: Processes
) -> Checkpoint | None:
    """Check, before anything is read, that the run may begin or go on in its folder.

    Args:
        folder: The run's folder.
        recipe: The recipe as the run keeps it.
        resume: None begins, auto goes on, a path goes on from that checkpoint.
        processes: The processes of the run.

    Returns:
        The checkpoint that was named, if one was.

    Raises:
        UserError: If the folder holds another run, or the recipe is not the run's own.
    """
    if resume is None:
        if processes.is_main:  # a later process may meet what the first has written
            folder.check_unused()
        return None
    many = processes.count
    check_same_recipe(folder, recipe, num_processes=many)
    if resume == AUTO:
        return None
    path = Path(resume).expanduser()
    if RunDirectory(path).checkpoints_dir.is_dir():
        raise UserError(
            "this is a run's folder, not one of its checkpoints",
            file=resume,
            key="--resume",
            hint="name a folder such as checkpoints/step-00000100 in it, or say --resume auto",
        )
    given = load_checkpoint(path)
    # The checkpoint of another run must fit that run's recipe.
    check_same_recipe(RunDirectory.of_checkpoint(path), recipe, num_processes=many)
    return given


def may_go_on(folder: RunDirectory, resume: str | None) -> bool:
    """Tell, without reading checkpoints, whether a run will go on rather than begin."""
    return resume is not None and (resume != AUTO or bool(folder.checkpoint_dirs()))


@contextmanager
def begin_run(
    folder: RunDirectory,
    recipe: Recipe,
    resume: str | None,
    given: Checkpoint | None,
    inputs: RunInputs,
    processes: Processes,
    reporter: Reporter,
) -> Iterator[Start]:
    """Hold the run's folder for as long as the body runs, and tell in run.json how it fails.

    Until the run is under way, a fault leaves the run.json of an earlier one as it is.

    Args:
        folder: The run's folder.
        recipe: The recipe as the run keeps it.
        resume: As for `check_start`.
        given: What that gave.
        inputs: What was read for the run.
        processes: The processes of the run; the first process holds the folder for all.
        reporter: Where words go.

    Yields:
        Where the run stands.

    Raises:
        UserError: If another process holds the folder, or the run cannot go on.
        MachineError: If the body runs out of memory.
    """
    is_main = processes.is_main
    with folder.lock() if is_main else contextlib.nullcontext():
        if is_main and heal_folder(folder.adapter_dir, (CONFIG_NAME, WEIGHTS_NAME)):
            reporter.note(f"{folder.adapter_dir} was being replaced when a process was killed")
        if is_main and resume is None:
            folder.check_unused()  # a run may have come and gone since the first look
        start = Start(given)
        if resume == AUTO:
            start.checkpoint = _find_checkpoint(folder, reporter)
        if start.checkpoint is None and folder.adapter_dir.exists():
            folder.check_unused()  # its checkpoints are gone, its adapter stays
        if start.checkpoint is not None:
            start.earlier = dict(folder.load_record())
            if folder.adapter_dir.exists():
                _check_nothing_left(folder, recipe, inputs, start.checkpoint, resume)
                start.is_done = True
                yield start
                return
            _check_data(folder, resume, inputs)
            _tell_threads(start, processes, reporter)
        note_base(start, recipe, folder, is_loaded=False)
        with _told_in_run_json(folder, recipe, inputs.estimated_gib, processes):
            if is_main:
                progress = {} if start.checkpoint is None else start.checkpoint.state["progress"]
                folder.write_recipe(recipe_to_yaml(recipe))
                folder.truncate_lines(
                    start.step, redo_validation=progress.get("validation_due", False)
                )
            yield start


def note_base(start: Start, recipe: Recipe, folder: RunDirectory, *, is_loaded: bool) -> None:
    """Fingerprint the base where it is on this machine; a run goes on upon its own base alone.

    Args:
        start: Where the run stands; takes the fingerprint.
        recipe: Names the base.
        folder: The run's folder, for the message.
        is_loaded: The base has been loaded; before that it may still be on a hub.

    Raises:
        UserError: If the base is not the one on which the run began.
    """
    base_dir = find_base_folder(recipe.model.name_or_path, recipe.model.revision)
    start.fingerprint = fingerprint_base(base_dir) if base_dir is not None else None
    before = start.earlier.get("base_fingerprint")
    if start.fingerprint is None and not is_loaded:
        return
    if before is not None and before != start.fingerprint:
        raise UserError(
            f"the base {recipe.model.name_or_path!r} has changed since the run began",
            file=str(folder.record_path),
            key="base_fingerprint",
            hint="give the same weights, or begin a new run with another output_dir",
        )


def _check_data(folder: RunDirectory, resume: str | None, inputs: RunInputs) -> None:
    """Refuse other data than those of the checkpoint's own run; every process looks for itself."""
    if resume is not None and resume != AUTO:
        folder = RunDirectory.of_checkpoint(Path(resume).expanduser())
    check_same_data(folder.record(), describe_data(inputs), folder.record_path)


def _tell_threads(start: Start, processes: Processes, reporter: Reporter) -> None:
    """Say so where a CPU will sum in another order than before: the last bits then differ."""
    before, here = start.earlier.get("num_threads"), torch.get_num_threads()
    if processes.device.type == "cpu" and before is not None and before != here:
        reporter.warn(
            f"the run began with {before} CPU threads and goes on with {here}: its figures will "
            f"differ in the last digits from a run that was not stopped (OMP_NUM_THREADS={before} "
            "keeps them)"
        )


def _find_checkpoint(folder: RunDirectory, reporter: Reporter) -> Checkpoint | None:
    checkpoint, notes = find_newest_checkpoint(folder.checkpoints_dir)
    for note in notes:
        reporter.warn(note)
    if checkpoint is None:
        reporter.note(f"{folder.path} holds no checkpoint: the run starts at its beginning")
    else:
        reporter.note(f"going on from step {checkpoint.step}")
    return checkpoint


def has_stopped_early(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Tell whether patience had run out when a checkpoint was saved."""
    patience = recipe.train.early_stopping_patience
    return patience is not None and checkpoint.state["progress"]["num_bad_evals"] >= patience


def check_disk(folder: RunDirectory, recipe: Recipe, inputs: RunInputs) -> None:
    """Find a disk too small for the checkpoints that a run still adds.

    Args:
        folder: The run's folder; where it holds an adapter, nothing will be added.
        recipe: The recipe.
        inputs: What was read for the run.

    Raises:
        MachineError: If less is free.
    """
    if folder.adapter_dir.exists():
        return
    num_in_all = count_checkpoints(recipe.train, inputs.source.num_steps) or 0
    num_there = len(folder.checkpoint_dirs())
    # However many are there, the next one is whole before an old one goes.
    num_bytes = max(1, num_in_all - num_there) * inputs.checkpoint_bytes
    check_free_space(folder.path, int(num_bytes), "the run's checkpoints")


def _check_nothing_left(
    folder: RunDirectory,
    recipe: Recipe,
    inputs: RunInputs,
    checkpoint: Checkpoint,
    resume: str | None,
) -> None:
    """Refuse to train on in the folder of a run that has its adapter."""
    is_given = resume != AUTO
    # The checkpoint tells, not run.json: a kill may have come before it was written.
    is_done = checkpoint.step >= inputs.source.num_steps or has_stopped_early(checkpoint, recipe)
    if is_given or not is_done:
        place = resume if is_given else folder.checkpoint_dir(checkpoint.step)
        raise UserError(
            "this run has its adapter already, and it is not replaced",
            file=str(folder.adapter_dir),
            key="--resume",
            hint=f"the longer run needs a folder of its own: --resume {place} output_dir=NEW",
        )


@contextmanager
def _told_in_run_json(
    folder: RunDirectory, recipe: Recipe, estimated_gib: float | None, processes: Processes
) -> Iterator[None]:
    """Write down how the run failed, if it does, and translate what torch says."""
    try:
        yield
    except BaseException as error:
        told: BaseException = error
        if is_out_of_memory(error):
            told = out_of_memory_error(error, recipe, processes.device, estimated_gib)
        elif processes.count > 1 and is_lost_process(error):
            told = tell_lost_process(recipe.train.ddp_timeout)
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if processes.is_main and folder.record_path.exists():
            with contextlib.suppress(UserError, OSError):
                folder.update({"status": status, "error": str(told), "finished_at": now()})
        if told is not error:
            raise told from error
        raise
