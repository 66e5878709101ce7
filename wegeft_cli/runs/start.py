"""Open a run's directory, for a new run or to resume from a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from wegeft_cli.artifacts.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from wegeft_cli.artifacts.checkpoint import Checkpoint, find_newest_checkpoint, load_checkpoint
from wegeft_cli.artifacts.environment import describe_environment
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.artifacts.prompt_record import PROMPT_KEY, PromptRecord
from wegeft_cli.artifacts.run_directory import RunDirectory, now
from wegeft_cli.data.fingerprint import check_same_data
from wegeft_cli.data.text.template_settings import TemplateSettings, recorded_settings
from wegeft_cli.data.text.trained_form import describe_prompt
from wegeft_cli.distributed.failures import is_lost_peer, lost_peer_error
from wegeft_cli.errors import UserError
from wegeft_cli.models.base_folder import find_base_folder
from wegeft_cli.models.device_memory import is_out_of_memory, out_of_memory_error
from wegeft_cli.planning.preflight import count_checkpoints
from wegeft_cli.recipe.load import recipe_to_yaml
from wegeft_cli.runs.resume_rules import MATCHED, check_same_recipe, has_stopped_early
from wegeft_cli.runs.run import Run
from wegeft_cli.storage.atomic import check_free_space, heal_folder
from wegeft_cli.training.loop_settings import LoopResult

if TYPE_CHECKING:
    from wegeft_cli.planning.run_setup import RunSetup

AUTO = "auto"
"""Value of `--resume` that means the newest checkpoint of the run."""


@dataclass
class RunState:
    """The state from which a run starts.

    Args:
        checkpoint: The checkpoint to resume from; None for a new run.
        is_done: Whether the run has its adapter already.
        record: Values of run.json as the last process left them; empty for a new run.
        fingerprint: Fingerprint of the base; None while it is still on a hub, or without
            safetensors files.
    """

    checkpoint: Checkpoint | None = None
    is_done: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done before."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def check_resume(run: Run, resume: str | None, *, overwrite: bool = False) -> Checkpoint | None:
    """Check, before anything is read, that the run may start or resume in its directory.

    Args:
        resume: None starts a new run, `auto` resumes from the newest checkpoint, a path from that
            checkpoint.
        overwrite: Whether a new run replaces one in the directory.

    Raises:
        UserError: If the directory holds another run, or the recipe differs from the run's.
    """
    if run.processes.is_main:  # a later process may find what the first one has written
        run.directory.check_place()
    if resume is None:
        if run.processes.is_main and not overwrite:
            run.directory.check_unused()
        return None
    if overwrite:
        raise UserError(
            "contradicts --resume: the one replaces a run, the other continues it",
            key="--overwrite",
            hint="use one of them",
        )
    num_processes = run.processes.count
    check_same_recipe(run.directory, run.recipe, num_processes=num_processes)
    if resume == AUTO:
        return None
    path = Path(resume).expanduser()
    if RunDirectory(path).checkpoints_dir.is_dir():
        raise UserError(
            "this is a run's folder, not one of its checkpoints",
            file=resume,
            key="--resume",
            hint="give a folder in it such as checkpoints/step-00000100, or use --resume auto",
        )
    checkpoint = load_checkpoint(path)
    # The checkpoint of another run must fit that run's recipe.
    check_same_recipe(RunDirectory.of_checkpoint(path), run.recipe, num_processes=num_processes)
    return checkpoint


def can_resume(directory: RunDirectory, resume: str | None) -> bool:
    """Return whether a run will resume rather than start anew, without reading checkpoints."""
    return resume is not None and (resume != AUTO or bool(directory.checkpoint_dirs()))


@contextmanager
def open_run(
    run: Run,
    resume: str | None,
    named: Checkpoint | None,
    setup: RunSetup,
    *,
    overwrite: bool = False,
) -> Iterator[RunState]:
    """Lock the run's directory while the body runs, and record a failure of the body in run.json.

    `overwrite` removes an earlier run's files.

    A fault before the run starts leaves the run.json of an earlier process unchanged.

    Raises:
        UserError: If another process holds the directory, or the run cannot be resumed.
        MachineError: If the body runs out of memory, or another process of the run has ended.
    """
    directory, is_main = run.directory, run.processes.is_main
    with directory.lock() if is_main else contextlib.nullcontext():
        if is_main and heal_folder(directory.adapter_dir, (CONFIG_NAME, WEIGHTS_NAME)):
            run.reporter.note(
                f"{directory.adapter_dir} was being replaced when a process was killed"
            )
        if is_main and overwrite:
            directory.clear()
        run.processes.wait()  # the others look into the folder only now
        if is_main and resume is None:
            directory.check_unused()  # a run may have started and ended since `check_resume`
        state = RunState(named)
        if resume == AUTO:
            state.checkpoint = _find_checkpoint(run)
        if state.checkpoint is None and directory.adapter_dir.exists():
            directory.check_unused()  # its checkpoints are gone, its adapter stays
        if state.checkpoint is not None:
            state.record = dict(directory.load_record())
            if directory.adapter_dir.exists():
                _check_nothing_left(run, setup, state.checkpoint, resume)
                state.is_done = True
                yield state
                return
            _check_data(run, resume, setup)
            _warn_of_threads(run, state)
        record_base_fingerprint(run, state, is_loaded=False)
        with record_failure(run, setup.estimated_gib):
            run.update_record(_start_record(run, setup, state))
            if is_main:
                progress = {} if state.checkpoint is None else state.checkpoint.state["progress"]
                directory.write_recipe(recipe_to_yaml(run.recipe))
                directory.truncate_lines(
                    state.step, redo_validation=progress.get("validation_due", False)
                )
            yield state


def _start_record(run: Run, setup: RunSetup, state: RunState) -> dict[str, Any]:
    """Return the values of run.json before the first step; they replace an earlier attempt's."""
    recipe, processes = run.recipe, run.processes
    return {
        **asdict(LoopResult("running", state.step, None)),
        "started_at": now(),
        "finished_at": None,
        "error": None,
        "peak_memory_gib": None,
        "adapter_step": None,
        **describe_environment(),
        "device": str(processes.device),
        "num_processes": processes.count,
        "num_threads": torch.get_num_threads(),
        "seed": recipe.seed,
        "base_model_name_or_path": recipe.model.name_or_path,
        "init_from": recipe.adapter.init_from,
        MATCHED: None if (matched := setup.targets.matched) is None else matched.to_json(),
        "omitted": [asdict(omission) for omission in setup.targets.omitted],
        **input_record(setup),
        **_data_record(setup),
        PROMPT_KEY: None if (prompt := describe_form(run, setup)) is None else prompt.to_json(),
    }


def describe_form(run: Run, setup: RunSetup) -> PromptRecord | None:
    """Return the prompt form of the training rows; None for a classifier."""
    if not run.task.generates_text:
        return None
    names = cast(Any, setup.report).template
    record = describe_prompt(run.recipe.data, names, setup.tokenizer)
    return replace(record, special_tokens=run.recipe.model.special_tokens)


def find_form(run: Run, setup: RunSetup) -> TemplateSettings | None:
    """Return the prompt form in which a model in training is asked; None for a classifier."""
    record = describe_form(run, setup)
    return None if record is None else recorded_settings(record)


def input_record(setup: RunSetup) -> dict[str, Any]:
    """Return the values of run.json that follow from the inputs and appear in the result."""
    return {
        "trainable_parameters": setup.trainable,
        "estimated_memory_gib": setup.estimated_gib,
        "waste": setup.waste,
    }


def pass_record(setup: RunSetup) -> dict[str, Any]:
    """Return the values of run.json that the size and layout of the forward passes determine."""
    return {"max_tokens_per_pass": setup.source.max_tokens, "waste": setup.waste}


def record_base_fingerprint(run: Run, state: RunState, *, is_loaded: bool) -> None:
    """Fingerprint the base if it is on this machine; raise UserError if the run used another."""
    state.fingerprint = fingerprint_same_base(run, state.record, is_loaded=is_loaded)


def fingerprint_same_base(
    run: Run, record: Mapping[str, Any], *, is_loaded: bool = False
) -> str | None:
    """Return the base's fingerprint if the base is on this machine, or None.

    `record` is the run's record of an earlier process.

    Raises:
        UserError: If the run used another base.
    """
    model = run.recipe.model
    base_dir = find_base_folder(model.name_or_path, model.revision)
    fingerprint = fingerprint_base(base_dir) if base_dir is not None else None
    before = record.get("base_fingerprint")
    if fingerprint is None and not is_loaded:
        return None
    if before is not None and before != fingerprint:
        raise UserError(
            f"the base {model.name_or_path!r} has changed since the run began",
            file=str(run.directory.record_path),
            key="base_fingerprint",
            hint="use the same weights, or start a new run with another output_dir",
        )
    return fingerprint


def check_disk(run: Run, setup: RunSetup) -> None:
    """Raise MachineError if the disk is too small for the checkpoints that a run still adds."""
    if run.directory.adapter_dir.exists():
        return
    num_kept = (
        count_checkpoints(run.recipe.train, setup.source.num_steps, setup.steps_per_epoch) or 0
    )
    num_missing = num_kept - len(run.directory.checkpoint_dirs())
    # A new checkpoint is written before an old one is removed.
    num_bytes = max(1, num_missing) * setup.checkpoint_bytes
    check_free_space(run.directory.path, int(num_bytes), "the run's checkpoints")


@contextmanager
def record_failure(run: Run, estimated_gib: float | None) -> Iterator[None]:
    """Record in run.json how the body failed, and translate what torch raises."""
    try:
        yield
    except BaseException as error:
        raised: BaseException = error
        if is_out_of_memory(error):
            device = run.processes.device
            raised = out_of_memory_error(
                error, run.recipe, device, estimated_gib, can_cut=not run.task.reads_images
            )
        elif not run.processes.local and is_lost_peer(error):
            raised = lost_peer_error(run.recipe.train.ddp_timeout)
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if run.directory.record_path.exists():
            with contextlib.suppress(UserError, OSError):
                run.update_record({"status": status, "error": str(raised), "finished_at": now()})
        if raised is not error:
            raise raised from error
        raise


def _data_record(setup: RunSetup) -> dict[str, Any]:
    """Return the data's values in run.json, which a resumed run compares."""
    return {"data": asdict(cast(Any, setup.report)), **setup.digests}


def _check_data(run: Run, resume: str | None, setup: RunSetup) -> None:
    """Raise UserError if the data differ from those of the checkpoint's run; in every process."""
    directory = run.directory
    if resume is not None and resume != AUTO:
        directory = RunDirectory.of_checkpoint(Path(resume).expanduser())
    check_same_data(directory.record(), _data_record(setup), directory.record_path)


def _warn_of_threads(run: Run, state: RunState) -> None:
    """Warn if a CPU sums in another order than before: the last bits then differ."""
    before, here = state.record.get("num_threads"), torch.get_num_threads()
    if run.processes.device.type == "cpu" and before is not None and before != here:
        run.reporter.warn(
            f"the run began with {before} CPU threads and resumes with {here}: its figures will "
            f"differ in the last digits from those of an uninterrupted run "
            f"(OMP_NUM_THREADS={before} keeps them)"
        )


def _find_checkpoint(run: Run) -> Checkpoint | None:
    checkpoint, notes = find_newest_checkpoint(run.directory.checkpoints_dir)
    for note in notes:
        run.reporter.warn(note)
    if checkpoint is None:
        run.reporter.note(f"{run.directory.path} holds no checkpoint: the run starts from step 0")
    else:
        run.reporter.note(f"resuming from step {checkpoint.step}")
    return checkpoint


def _check_nothing_left(
    run: Run, setup: RunSetup, checkpoint: Checkpoint, resume: str | None
) -> None:
    """Raise UserError if a run that has its adapter would train further in its directory."""
    is_named = resume != AUTO
    # The checkpoint decides, not run.json: a kill may have come before that was written.
    num_steps = setup.source.num_steps
    is_done = checkpoint.step >= num_steps or has_stopped_early(checkpoint, run.recipe)
    if is_named or not is_done:
        place = resume if is_named else run.directory.checkpoint_dir(checkpoint.step)
        raise UserError(
            "this run has its adapter already, and it is not replaced",
            file=str(run.directory.adapter_dir),
            key="--resume",
            hint=f"the longer run needs another folder: --resume {place} output_dir=NEW",
        )
