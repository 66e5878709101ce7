"""A model, or outputs that someone gives, become scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wegeft_cli.checkpoints.files import disk_errors, write_text_atomic
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.evaluation.protocols import PROTOCOLS, find_protocol
from wegeft_cli.evaluation.scoring import TaskScore, read_samples, result_dict, score_outputs
from wegeft_cli.evaluation.tasks import TASKS, Task, find_task, load_task_data
from wegeft_cli.recipe.schema import EvalSection
from wegeft_cli.workflows.reporter import Reporter, SilentReporter
from wegeft_cli.workflows.run_folder import describe_environment, find_recipe_of
from wegeft_cli.workflows.target import find_target, open_target
from wegeft_cli.workflows.tasks import Job, choose_protocol

_RESULT_START = '{\n  "results": ['  # as json.dumps(indent=2) begins it
_SAMPLES_START = '{"model": "'


def evaluate(
    target: str | Path | None = None,
    *,
    tasks: Sequence[str] = (),
    protocol: str | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    output: Path | None = None,
    compare_base: bool = False,
    samples: Path | None = None,
    base: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Score a model on test sets by a named protocol.

    What is left out is taken from the run's own recipe, where the target belongs to a run.

    Args:
        target: An adapter, run or model folder, or a hub id; None takes the newest finished run.
        tasks: Tasks by name.
        protocol: Prompt, decoding and scoring rules by name.
        data_dir: Folder with `<set>/test.json`; None reads the hub.
        limit: Only the first so many rows of each set.
        batch_size: Prompts generated at a time.
        max_new_tokens: Longest answer; None takes the protocol's.
        output: Write the JSON object to this file too.
        compare_base: Score the base model as well.
        samples: Score the outputs in this file instead of a model's.
        base: The base's folder or hub id, where it is not as recorded.
        reporter: Where words and progress go.

    Returns:
        The JSON object of `wegeft eval`: results, base_results, samples_path, target, environment.

    Raises:
        UserError: If a task, a protocol, a test set, the target or the samples are at fault.
        ExceptionGroup: If there are several such faults.
    """
    reporter = reporter or SilentReporter()
    if samples is not None and (target is not None or compare_base):
        raise UserError(
            "given outputs are scored without a model",
            key="--samples",
            hint="leave out TARGET and --compare-base, or leave out --samples",
        )
    path = None if samples is not None else find_target(target)
    recipe = find_recipe_of(path)
    settings = recipe.eval if recipe is not None else EvalSection()
    if output is not None:
        _check_output(output)
        _check_output(_beside(output), is_ours=_SAMPLES_START)
    names = list(tasks) or list(settings.tasks)
    jobs = read_jobs(names, settings, protocol, data_dir, limit)
    if samples is not None:
        scores, base_scores = [_score_samples(samples, jobs)], None
    else:
        assert path is not None
        sizes = (batch_size or settings.batch_size, max_new_tokens)
        opened = open_target(path, recipe, base=base, warn=reporter.warn)
        base_scores = None
        if compare_base:
            with opened.base_alone() as (model, tokenizer):
                base_scores = score_model(model, tokenizer, jobs, sizes, "base", reporter)
        scores = score_model(opened.model, opened.tokenizer, jobs, sizes, opened.kind, reporter)
    result: dict[str, Any] = {"results": [result_dict(score) for score in scores]}
    if base_scores is not None:
        result["base_results"] = [result_dict(score) for score in base_scores]
    samples_path = _samples_path(path, output, jobs)
    if samples is None:
        _write_samples(samples_path, scores, base_scores)
    result |= {
        "samples_path": str(samples_path if samples is None else samples),
        "target": None if path is None else str(path),
        **describe_environment(),
    }
    if output is not None:
        write_text_atomic(output, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def list_tasks() -> dict[str, Any]:
    """Give the tasks and protocols as the JSON object of `wegeft eval --list`."""
    return {
        "tasks": [
            {"name": task.name, "file": f"{task.folder}/test.json", "kind": task.kind}
            for task in TASKS.values()
        ],
        "protocols": [
            {"name": protocol.name, "description": protocol.description}
            for protocol in PROTOCOLS.values()
        ],
    }


def _beside(output: Path) -> Path:
    """Give the samples file that goes with a result file."""
    return output.with_name(f"{output.stem}-samples.jsonl")


def _check_output(output: Path, *, is_ours: str = _RESULT_START) -> None:
    """Find out before the work begins that --output cannot be written or would replace a file."""
    place = output.parent
    while not place.exists():
        place = place.parent
    if output.is_dir() or not place.is_dir():
        what = "this is a folder" if output.is_dir() else f"{str(place)!r} is no folder"
        raise UserError(
            what, file=str(output), key="--output", hint="give a file such as scores.json"
        )
    if not output.exists():
        return
    with disk_errors(output, "read"):
        text = output.read_text(encoding="utf-8", errors="replace")
    if text and not text.startswith(is_ours):
        raise UserError(
            "this file is no earlier result, and nothing else is overwritten",
            file=str(output),
            key="--output",
            hint="give another name",
        )


def read_jobs(
    names: Sequence[str],
    settings: EvalSection,
    protocol: str | None,
    data_dir: Path | None,
    limit: int | None,
) -> list[Job]:
    """Read every test set before any model is loaded.

    What was typed wins. The recipe's own settings hold for the tasks that it names; for others its
    data folder holds where it has the set, and its protocol where that scores the task.
    """
    if not names:
        raise UserError(
            "no task is named", key="--task", hint="such as --task gsm8k; `wegeft eval --list`"
        )
    jobs = []
    for name in dict.fromkeys(names):
        task = find_task(name)
        is_named = task in [find_task(own) for own in settings.tasks]
        chosen = find_protocol(protocol or choose_protocol(task, settings.protocol), task)
        folder = data_dir
        if folder is None and settings.data_dir is not None:
            own_folder = Path(settings.data_dir)
            folder = own_folder if is_named or _has_set(own_folder, task) else None
        rows = limit or (settings.limit if is_named else None)
        length = settings.max_new_tokens if is_named else None
        jobs.append(Job(load_task_data(task, data_dir=folder, limit=rows), chosen, length))
    return jobs


def _has_set(data_dir: Path, task: Task) -> bool:
    return any((data_dir / name).is_dir() for name in (task.folder, task.name))


def _score_samples(samples: Path, jobs: Sequence[Job]) -> TaskScore:
    if len(jobs) != 1:
        raise UserError(
            f"got {len(jobs)} tasks; a samples file answers one",
            key="--samples",
            hint="name one --task",
        )
    job = jobs[0]
    return score_outputs(job.protocol, job.data, read_samples(samples, job.data))


def score_model(
    model: Any,
    tokenizer: Any,
    jobs: Sequence[Job],
    sizes: tuple[int, int | None],
    title: str,
    reporter: Reporter,
) -> list[TaskScore]:
    """Let a loaded model answer every set.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        jobs: What to ask.
        sizes: Prompts at a time, and the longest answer (None: the job's, else the protocol's).
        title: Who is asked, for the progress.
        reporter: Where progress goes.

    Returns:
        A score of each job.

    Raises:
        MachineError: If the device runs out of memory.
    """
    import torch

    from wegeft_cli.evaluation.run import evaluate_task

    batch_size, max_new_tokens = sizes
    scores = []
    for job in jobs:
        with reporter.progress(f"{title}: {job.data.task.name}", len(job.data.rows)) as advance:
            try:
                score = evaluate_task(
                    model,
                    tokenizer,
                    job.data,
                    job.protocol,
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens or job.max_new_tokens,
                    on_progress=lambda done, total, advance=advance: advance(done),  # type: ignore[misc]
                )
            except torch.OutOfMemoryError as error:
                raise MachineError(
                    "out of memory while generating", key="--batch-size", hint="lower it"
                ) from error
        scores.append(score)
    return scores


def _samples_path(path: str | Path | None, output: Path | None, jobs: Sequence[Job]) -> Path:
    """Choose where the samples go: beside --output, in the run's folder, or under runs/."""
    if output is not None:
        return _beside(output)
    name = "-".join([*(job.data.task.name for job in jobs), jobs[0].protocol.name])
    folder = Path(path) if path is not None else Path("runs")
    for candidate in (folder, folder.parent):
        if (candidate / "run.json").is_file():
            return candidate / "eval" / f"{folder.name}-{name}-samples.jsonl"
    return Path("runs") / "eval" / f"{folder.name}-{name}-samples.jsonl"


def _write_samples(
    path: Path, scores: Sequence[TaskScore], base_scores: Sequence[TaskScore] | None
) -> None:
    """Write one line per answer: which model, task and protocol, and all that was read of it."""
    lines = [
        json.dumps(
            {"model": model, "task": score.task, "protocol": score.protocol, **sample},
            ensure_ascii=False,
        )
        for model, group in (("base", base_scores or ()), ("target", scores))
        for score in group
        for sample in score.samples
    ]
    write_text_atomic(path, "".join(line + "\n" for line in lines))
