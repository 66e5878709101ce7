"""The adapter of a checkpoint: `wegeft merge RUN/checkpoints/step-N`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from wegeft_cli.artifacts.checkpoint import Checkpoint, load_checkpoint
from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import UserError
from wegeft_cli.methods.registry import find_method
from wegeft_cli.models.loading import build_skeleton
from wegeft_cli.planning.run_setup import build_setup
from wegeft_cli.planning.targets import settle_targets
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe
from wegeft_cli.reporter import Reporter
from wegeft_cli.runs.build import load_prepared_base
from wegeft_cli.runs.finalize import load_parameters, save_adapter_of
from wegeft_cli.runs.resume_rules import with_absolute_paths
from wegeft_cli.runs.run import Run
from wegeft_cli.runs.start import fingerprint_same_base
from wegeft_cli.storage.atomic import remove_folder
from wegeft_cli.tasks.registry import find_task, inject_adapter
from wegeft_cli.training.loop_settings import LoopResult


def write_checkpoint_adapter(path: Path, reporter: Reporter, *, base: str | None = None) -> Path:
    """Write the adapter of a checkpoint to `adapter-step-<8 digits>` in the folder of its run.

    `base` replaces the base that the recipe names.

    Raises:
        UserError: If the checkpoint is damaged, or its run or its base is lost.
    """
    directory = RunDirectory.of_checkpoint(path)
    if not directory.recipe_path.is_file():
        raise UserError(
            "this checkpoint is outside of its run, whose recipe.yaml is needed to make an adapter",
            file=str(path),
            hint="give it in its place: RUN/checkpoints/step-N",
        )
    checkpoint = load_checkpoint(path)
    loaded = load_recipe(directory.recipe_path, need_data=False)
    recipe = replace(with_absolute_paths(loaded), output_dir=str(directory.path))
    if base is not None:
        model = replace(recipe.model, name_or_path=base, revision=None)
        recipe = replace(recipe, model=model)
    run = Run(
        recipe=recipe,
        task=find_task(recipe.task),
        method=find_method(recipe.adapter.type),
        directory=directory,
        processes=Processes.single(),
        reporter=reporter,
    )
    folder = directory.path / f"adapter-step-{checkpoint.step:08d}"
    reporter.note(f"the adapter of step {checkpoint.step} is written to {folder}")
    if folder.is_dir():  # of an earlier call, maybe of a run that has been replaced
        remove_folder(folder)
    _save(run, loaded, checkpoint, folder)
    return folder


def _save(run: Run, loaded: LoadedRecipe, checkpoint: Checkpoint, folder: Path) -> None:
    head, processor = None, None
    if run.task.has_head:
        setup = build_setup(loaded, run.processes, run.reporter, resuming=True)
        head, processor, targets = setup.head, setup.tokenizer, setup.targets
    else:
        processor = run.task.load_processor(run.recipe.model)
        targets = settle_targets(run.recipe, build_skeleton(run.recipe.model)[1])
    fingerprint = fingerprint_same_base(run, run.directory.record())
    base = load_prepared_base(run, head, processor)
    model = inject_adapter(base, run.recipe, targets.section)
    load_parameters(model, run, checkpoint)
    progress = checkpoint.state["progress"]
    result = LoopResult("interrupted", checkpoint.step, progress["last_loss"])
    result.validation = run.directory.validation()
    save_adapter_of(
        model, run, result, checkpoint.step, folder, base_fingerprint=fingerprint, head=head
    )
