"""A model, or outputs that someone gives, become scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.environment import describe_environment
from wegeft_cli.artifacts.run_directory import find_recipe_of
from wegeft_cli.data.text.templates import TEMPLATES
from wegeft_cli.distributed.processes import Processes, evaluation_processes
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation.benchmarks.base import Asked, EvalJob, TaskRequest
from wegeft_cli.evaluation.benchmarks.dataset_groups import CLASS_GROUPS
from wegeft_cli.evaluation.benchmarks.groups import expand_groups, group_means
from wegeft_cli.evaluation.benchmarks.model_groups import evaluate_group, find_class_group
from wegeft_cli.evaluation.benchmarks.registry import list_tasks, read_task
from wegeft_cli.evaluation.class_scores import evaluate_classifier, refuse_samples
from wegeft_cli.evaluation.compare import compare_scores
from wegeft_cli.evaluation.response_cache import AnswerLog, drop_logs
from wegeft_cli.evaluation.result_files import (
    beside,
    check_outputs,
    choose_samples_path,
    choose_scores_path,
    write_line,
    write_public_files,
)
from wegeft_cli.evaluation.score import TaskScore, names_tasks, result_dict
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.inference.loaded_classifier import is_classifier
from wegeft_cli.inference.loaded_model import (
    NO_PRINTS,
    OpenedTarget,
    find_target,
    fingerprint_target,
    open_target,
)
from wegeft_cli.models.device_memory import generation_memory_errors
from wegeft_cli.recipe.schema import EvalSection, Recipe
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.storage.atomic import write_text_atomic

__all__ = ["evaluate", "list_tasks", "read_jobs"]


def evaluate(
    target: str | Path | Sequence[str | Path] | None = None,
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
    backend: str = "transformers",
    options: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Score a model on test sets by a named protocol.

    What is left out is taken from the run's own recipe, where the target belongs to a run. Answers
    are kept as they come: the same call after a kill goes on where it was.

    Args:
        target: An adapter, run or model folder, or a hub id; None takes the newest finished run;
            several where a group of classifiers is named.
        tasks: Tasks and groups by name; of a classifier `test`, `validation` or both.
        protocol: Prompt, decoding and scoring rules by name.
        data_dir: Folder with `<set>/test.json`; None reads the hub.
        limit: Only the first so many rows of each set.
        batch_size: Prompts generated at a time.
        max_new_tokens: Longest answer; None takes the protocol's.
        output: Write the JSON object to this file too.
        compare_base: Score the base model as well.
        samples: Score the outputs in this file instead of a model's.
        base: The base's folder or hub id, where it is not as recorded.
        backend: transformers, or vllm.
        options: What only some tasks understand: allow_leaky, seed, ...
        reporter: Where words and progress go.

    Returns:
        The JSON object of `wegeft eval`: results, base_results, groups, comparison, samples_path,
        target, environment.

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
    if output is not None:
        check_outputs(output)
    targets = [target] if isinstance(target, str | Path) else list(target or ())
    if (group := find_class_group(tasks)) is not None:
        return evaluate_group(
            group,
            targets,
            splits=[name for name in tasks if name.lower() != group.name],
            limit=limit,
            batch_size=batch_size,
            output=output,
            foreign={
                **_foreign(protocol, max_new_tokens, backend, options),
                "data_dir": data_dir,
                "compare_base": compare_base,
                "samples": samples,
                "base": base,
            },
            reporter=reporter,
        )
    if len(targets) > 1:
        raise UserError(
            f"{len(targets)} targets, and one is scored at a time",
            key="TARGET",
            hint=f"several are for --task {' or '.join(CLASS_GROUPS)}",
        )
    if samples is not None:
        refuse_samples(samples, tasks)
    path = None if samples is not None else find_target(targets[0] if targets else None)
    recipe = find_recipe_of(path)
    settings = recipe.eval if recipe is not None else EvalSection()
    if output is not None and samples is not None and samples.resolve() == beside(output).resolve():
        raise UserError(
            f"the scored samples would replace {str(samples)!r}, out of which they come",
            key="--output",
            hint="give another name",
        )
    names = list(tasks) or list(settings.tasks)
    if path is not None and is_classifier(path, recipe):
        return evaluate_classifier(
            path,
            recipe,
            splits=names,
            data_dir=data_dir,
            limit=limit,
            batch_size=batch_size,
            output=output,
            compare_base=compare_base,
            base=base,
            foreign=_foreign(protocol, max_new_tokens, backend, options),
            reporter=reporter,
        )
    given = {**(options or {}), "target": None if path is None else str(path)}
    request = TaskRequest("", protocol, data_dir, limit, max_new_tokens, settings, given)
    jobs = read_jobs(names, request)
    asked = [job.name for job in jobs]
    processes = Processes.single()
    base_scores: list[TaskScore] | None = None
    base_results = None
    if samples is not None:
        scores = _score_samples(samples, jobs)
        results = [{**result_dict(score), **NO_PRINTS} for score in scores]
    else:
        assert path is not None
        processes = evaluation_processes()
        if processes.rank:
            reporter = SilentReporter()
        _tell_templates(recipe, jobs, reporter)
        folder = _logs_of(choose_samples_path(path, output, asked, jobs[0].protocol_name))
        asking = Asking(jobs, batch_size or settings.batch_size, folder, processes, reporter)
        open_it = open_target if backend == "transformers" else _find_backend(backend)
        opened = open_it(path, recipe, base=base, warn=reporter.warn)
        if compare_base:
            before = replace(
                opened.section, name_or_path=opened.base or opened.section.name_or_path
            )
            prints = fingerprint_target(before, None)
            with opened.base_alone() as (model, tokenizer):
                base_scores = asking.score(model, tokenizer, opened.write, "base", prints)
            base_results = [{**result_dict(score), **prints} for score in base_scores]
        prints = fingerprint_target(opened.section, opened.adapter_dir)
        scores = asking.score(opened.model, opened.tokenizer, opened.write, opened.kind, prints)
        results = [{**result_dict(score), **prints} for score in scores]
    result: dict[str, Any] = {"results": results}
    if base_scores is not None:
        result["base_results"] = base_results
        result["comparison"] = [
            None
            if None in (before.num_correct, after.num_correct)
            else compare_scores(before.task, before.protocol, before.samples, after.samples)
            for before, after in zip(base_scores, scores, strict=True)
        ]
    if groups := group_means(names, {score.task: score.score for score in scores}):
        result["groups"] = groups
    if base_scores is not None and groups:
        means = group_means(names, {score.task: score.score for score in base_scores})
        result["base_groups"] = means
    samples_path = choose_samples_path(path, output, asked, jobs[0].protocol_name)
    is_written = samples is None or output is not None
    result |= {
        "samples_path": str(samples_path if is_written else samples),
        **({} if samples is None else {"scored_from": str(samples)}),
        "target": None if path is None else str(path),
        **describe_environment(),
    }
    if processes.is_main:
        if is_written:
            _write_samples(samples_path, scores, base_scores)
        write_public_files(result, samples_path, scores, base_scores)
        if output is None and samples is None:
            # Where the card of a merge or an export finds it.
            output = choose_scores_path(samples_path)
        if output is not None:
            write_text_atomic(output, json.dumps(result, indent=2, allow_nan=False) + "\n")
        if samples is None:
            drop_logs(_logs_of(samples_path))
    processes.leave()
    return result


def _foreign(
    protocol: str | None,
    max_new_tokens: int | None,
    backend: str,
    options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Give what says nothing to a classifier."""
    return {
        "protocol": protocol,
        "max_new_tokens": max_new_tokens,
        "backend": None if backend == "transformers" else backend,
        **(options or {}),
    }


def _find_backend(name: str) -> Callable[..., OpenedTarget]:
    """Give what opens a target in another engine than transformers."""
    if name != "vllm":
        raise UserError(
            f"no backend is called {name!r}", key="--backend", hint="give transformers or vllm"
        )
    from wegeft_cli.inference.loaded_in_vllm import open_in_vllm

    return open_in_vllm


def _logs_of(samples_path: Path) -> Path:
    """Give the folder that keeps answers until the samples file is written."""
    return samples_path.with_suffix(".partial")


def read_jobs(names: Sequence[str], request: TaskRequest) -> list[EvalJob]:
    """Read every test set before any model is loaded.

    Args:
        names: Tasks and groups, as typed.
        request: How they are asked for; its name is replaced by each of them.

    Returns:
        A job of each, once.

    Raises:
        UserError: If none is named, or one is unknown, missing or damaged.
        ExceptionGroup: If there are several such faults.
    """
    if not names:
        raise UserError(
            "no task is named", key="--task", hint="such as --task gsm8k; `wegeft eval --list`"
        )
    jobs: dict[tuple[str, str], EvalJob] = {}
    faults: list[UserError] = []
    for name in expand_groups(names):
        try:
            job = read_task(replace(request, name=name))
            jobs.setdefault((job.name, job.protocol_name), job)
        except UserError as fault:
            faults.append(fault)
        except ExceptionGroup as group:
            mine, others = group.split(UserError)
            if mine is None or others is not None:
                raise
            faults.extend(fault for fault in mine.exceptions if isinstance(fault, UserError))
    raise_all(faults)
    return list(jobs.values())


def _score_samples(samples: Path, jobs: Sequence[EvalJob]) -> list[TaskScore]:
    if len(jobs) != 1 and not names_tasks(samples):
        raise UserError(
            f"got {len(jobs)} tasks; a samples file answers one, unless every line has its `task`",
            key="--samples",
            hint="name one --task",
        )
    return [job.score_samples(samples) for job in jobs]


def _tell_templates(recipe: Recipe | None, jobs: Sequence[EvalJob], reporter: Reporter) -> None:
    """Warn where a run was trained in another prompt than it is going to be asked in."""
    if recipe is None or recipe.data.template not in TEMPLATES:
        return
    for job in jobs:
        asked_in = getattr(job, "template", None)
        if asked_in not in (None, recipe.data.template):
            reporter.warn(
                f"{job.name}: `{job.protocol_name}` asks in the template `{asked_in}`, but the run "
                f"was trained in `{recipe.data.template}`"
            )


def _write_samples(
    path: Path, scores: Sequence[TaskScore], base_scores: Sequence[TaskScore] | None
) -> None:
    """Write one line per answer: which model, task and protocol, and all that was read of it."""
    lines = [
        write_line({"model": model, "task": score.task, "protocol": score.protocol, **sample})
        for model, group in (("base", base_scores or ()), ("target", scores))
        for score in group
        for sample in score.samples
    ]
    write_text_atomic(path, "".join(lines))


_LOGGED_VERSIONS = ("wegeft-cli", "torch", "transformers")


@dataclass(frozen=True)
class Asking:
    """Everything that base and target are asked alike with."""

    jobs: Sequence[EvalJob]
    batch_size: int
    logs: Path
    processes: Processes
    reporter: Reporter
    _warned: set[str] = field(default_factory=set)

    def score(
        self,
        model: Any,
        tokenizer: Any,
        write: Callable[..., Any] | None,
        title: str,
        prints: Mapping[str, str | None],
    ) -> list[TaskScore]:
        """Score one model in every job."""
        from wegeft_cli.generation.stopping import find_end_ids

        versions = describe_environment()["versions"]
        depends = {
            **prints,
            "versions": {name: versions.get(name) for name in _LOGGED_VERSIONS},
            "dtype": str(getattr(model, "dtype", None)),
            "engine": None if write is None else write.__module__,
            # Where answers end, and how conversations are written: files beside the weights say it.
            "ends": find_end_ids(model, tokenizer, Decoding(1)),
            "chat_template": getattr(tokenizer, "chat_template", None),
        }
        return [
            self._score(job, model, tokenizer, write, title, {**depends, **job.key()})
            for job in self.jobs
        ]

    def _score(
        self,
        job: EvalJob,
        model: Any,
        tokenizer: Any,
        write: Callable[..., Any] | None,
        title: str,
        key: Mapping[str, Any],
    ) -> TaskScore:
        log = AnswerLog(self.logs, key, self.processes.rank)
        num_known = self.processes.broadcast(len(log.read()))
        if num_known:
            self.reporter.note(
                f"{job.name}: going on after {num_known} of {job.num_rows} answers ({log.folder})"
            )
        with self.reporter.progress(f"{title}: {job.name}", job.num_rows) as advance:
            asked = Asked(
                self.batch_size,
                on_progress=lambda done, total: advance(done),
                warn=self._warn,
                log=log,
                processes=self.processes,
                write=write,
                title=title,
            )
            try:
                with generation_memory_errors():
                    return job.run(model, tokenizer, asked)
            except KeyboardInterrupt:
                self.reporter.note(
                    f"{job.name}: the answers so far are kept ({log.folder}): the same command "
                    "goes on with them"
                )
                raise

    def _warn(self, text: str) -> None:
        """Tell the user once what holds for both models, or for several tasks."""
        if text not in self._warned:
            self._warned.add(text)
            self.reporter.warn(text)
