"""`wegeft eval`: scores of a model, or of the outputs in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.environment import describe_environment
from wegeft_cli.artifacts.run_directory import find_recipe_of
from wegeft_cli.data.text.template_settings import CHAT, TemplateSettings
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import Benchmark, EvaluationRequest
from wegeft_cli.evaluation.benchmarks.classification import PROTOCOL as CLASSIFICATION
from wegeft_cli.evaluation.benchmarks.dataset_groups import CLASS_GROUPS
from wegeft_cli.evaluation.benchmarks.groups import OWN_DATA
from wegeft_cli.evaluation.benchmarks.registry import list_tasks, load_benchmarks
from wegeft_cli.evaluation.classifiers import (
    evaluate_classifier,
    refuse_foreign,
    refuse_samples,
)
from wegeft_cli.evaluation.model_groups import evaluate_group, find_class_group
from wegeft_cli.evaluation.result_files import (
    ResultFiles,
    beside,
    check_outputs,
    choose_samples_path,
    response_cache_dir,
)
from wegeft_cli.evaluation.runner import Evaluation, EvaluationCall, EvaluationRunner
from wegeft_cli.evaluation.text.scoring import names_tasks
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.inference.loaded_model import (
    NO_PRINTS,
    LoadedModel,
    find_target,
    fingerprint_target,
    task_of_path,
)
from wegeft_cli.inference.trained_form import find_trained_form
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter, SilentReporter

__all__ = ["evaluate", "list_tasks"]

_CACHE_VERSIONS = ("wegeft-cli", "torch", "transformers")


@checked_arguments
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
    data: Sequence[str | Path] = (),
    metric: str | None = None,
    options: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Score a model on test sets by a named protocol.

    The default of a setting is that of the run's recipe, if the target belongs to a run. Answers
    are cached: after an interruption the same call resumes.

    Args:
        target: An adapter, run or model folder, or a hub id. Default: the newest finished run.
            Several for a group of classifiers.
        tasks: Tasks and groups by name; for a classifier `test`, `validation` or both.
        protocol: Prompt, decoding and scoring rules by name.
        data_dir: Folder with `<set>/test.json`. Default: the hub.
        limit: Number of rows of each set. Default: all.
        batch_size: Prompts generated at a time.
        max_new_tokens: Longest answer in tokens. Default: the protocol's.
        output: Write the JSON object to this file too.
        compare_base: Score the base model as well.
        samples: Score the outputs in this file instead of a model's.
        base: The base's folder or hub id, if it is not where the adapter records it.
        backend: transformers or vllm.
        data: Files with rows of questions and answers, scored beside `tasks` by `metric`.
        metric: exact_match, contains, number, rouge_l or judge. Default: the recipe's
            `eval.answer_metric`.
        options: Options of single tasks: allow_leaky, seed, ...
        reporter: Progress and messages. Default: none.

    Returns:
        The JSON object of `wegeft eval`: results, base_results, groups, comparison, samples_path,
        target, environment.

    Raises:
        UserError: If a task, a protocol, a test set, the target or the samples are at fault.
        ExceptionGroup: If there are several such faults.
    """
    options = {**(options or {}), "metric": metric}
    request = EvaluationRequest(protocol, data_dir, limit, batch_size, max_new_tokens, options)
    tasks = [*tasks, *(f"{OWN_DATA}{file}" for file in data)]
    reporter = reporter or SilentReporter()
    call = EvaluationCall(tasks, output, compare_base, base, backend, reporter)
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
        refuse_foreign(
            {
                **call.foreign_to_classifiers(request),
                "data_dir": data_dir,
                "compare_base": compare_base,
                "samples": samples,
                "base": base,
            }
        )
        return evaluate_group(group, targets, request, call)
    if len(targets) > 1:
        raise UserError(
            f"got {len(targets)} targets; one is scored at a time",
            key="TARGET",
            hint=f"several are for --task {' or '.join(CLASS_GROUPS)}",
        )
    if samples is not None:
        return _evaluate_file(samples, request, call)
    return _evaluate_target(find_target(targets[0] if targets else None), request, call)


def _evaluate_file(
    samples: Path, request: EvaluationRequest, call: EvaluationCall
) -> dict[str, Any]:
    """Score the outputs in a file."""
    refuse_samples(samples, call.names)
    output = call.output
    if output is not None and samples.resolve() == beside(output).resolve():
        raise UserError(
            f"the scored samples would replace {str(samples)!r}, which they come from",
            key="--output",
            hint="give another name",
        )
    benchmarks = load_benchmarks(call.names, request)
    if len(benchmarks) != 1 and not names_tasks(samples):
        raise UserError(
            f"got {len(benchmarks)} tasks; a samples file answers one, unless every line has its "
            "`task`",
            key="--samples",
            hint="name one --task",
        )
    scores = [benchmark.score_file(samples) for benchmark in benchmarks]
    for note in (note for score in scores for note in score.notes):
        call.reporter.warn(note)
    evaluation = Evaluation(call.names, scores, NO_PRINTS)
    samples_path = _samples_path(None, benchmarks, output)
    result = {
        **evaluation.to_dict(),
        "samples_path": str(samples if output is None else samples_path),
        "scored_from": str(samples),
        "target": None,
        **describe_environment(),
    }
    files = ResultFiles(samples_path, output, writes_samples=output is not None)
    files.write(evaluation, result)
    return result


def _evaluate_target(
    path: str | Path, request: EvaluationRequest, call: EvaluationCall
) -> dict[str, Any]:
    """Score a model, and its base if the call asks for it."""
    recipe = find_recipe_of(path)
    if recipe is not None:
        request = replace(request, settings=recipe.eval)
    call = replace(call, names=list(call.names) or list(request.settings.tasks))
    if task_of_path(path, recipe).has_head:
        refuse_foreign(call.foreign_to_classifiers(request))
        call = call.joined()
        evaluation = evaluate_classifier(path, recipe, request, call)
        names = [score.task for score in evaluation.scores]
        samples_path = choose_samples_path(path, call.output, names, CLASSIFICATION)
    else:
        sources = [] if recipe is None else recipe.data.train
        columns = [source.columns for source in sources if source.columns]
        options = {**request.options, "target": str(path), "columns": columns}
        benchmarks = load_benchmarks(call.names, replace(request, options=options))
        call = call.joined()
        samples_path = _samples_path(path, benchmarks, call.output)
        _warn_of_other_template(find_trained_form(path, recipe), benchmarks, call.reporter)
        runner = EvaluationRunner(
            benchmarks,
            request.batch_size or request.settings.batch_size,
            call.processes,
            call.reporter,
            response_cache_dir(samples_path),
        )
        evaluation = _evaluate_language_model(path, recipe, runner, call)
    result = {
        **evaluation.to_dict(),
        "samples_path": str(samples_path),
        "target": str(path),
        **describe_environment(),
    }
    if call.processes.is_main:
        ResultFiles(samples_path, call.output).write(evaluation, result)
    call.processes.leave()
    return result


def _samples_path(
    path: str | Path | None, benchmarks: Sequence[Benchmark], output: Path | None
) -> Path:
    names = [benchmark.name for benchmark in benchmarks]
    return choose_samples_path(path, output, names, benchmarks[0].protocol_name)


def _evaluate_language_model(
    path: str | Path, recipe: Recipe | None, runner: EvaluationRunner, call: EvaluationCall
) -> Evaluation:
    open_it: Callable[..., LoadedModel] = LoadedModel.open
    if call.backend != "transformers":
        open_it = _find_backend(call.backend, runner.benchmarks)
    opened = open_it(path, recipe, base=call.base, warn=call.reporter.warn)
    base_scores = None
    base_prints: Mapping[str, Any] = {}
    if call.compare_base:
        section = replace(opened.section, name_or_path=opened.base or opened.section.name_or_path)
        base_prints = fingerprint_target(section, None)
        with opened.base_model() as (model, tokenizer):
            alone = replace(opened, model=model, processor=tokenizer)
            base_scores = runner.score(alone, "base", _cache_key(alone, base_prints))
    prints = fingerprint_target(opened.section, opened.adapter_dir)
    scores = runner.score(opened, opened.kind, _cache_key(opened, prints))
    return Evaluation(call.names, scores, prints, base_scores, base_prints)


def _cache_key(opened: LoadedModel, prints: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything of a model that its answers depend on."""
    from wegeft_cli.generation.stopping import stop_token_ids

    versions = describe_environment()["versions"]
    return {
        **prints,
        "versions": {name: versions.get(name) for name in _CACHE_VERSIONS},
        "dtype": str(getattr(opened.model, "dtype", None)),
        "engine": None if opened.write is None else opened.write.__module__,
        # Files beside the weights define these two.
        "ends": stop_token_ids(opened.model, opened.tokenizer, Decoding(1)),
        "chat_template": getattr(opened.tokenizer, "chat_template", None),
        "prompt_form": asdict(opened.chat_settings),
    }


def _find_backend(name: str, benchmarks: Sequence[Benchmark]) -> Callable[..., LoadedModel]:
    """Return the function that opens a target in another engine; check that it can decode."""
    if name != "vllm":
        raise UserError(
            f"no backend is called {name!r}", key="--backend", hint="give transformers or vllm"
        )
    from wegeft_cli.generation.vllm_engine import check_decoding
    from wegeft_cli.inference.loaded_in_vllm import open_in_vllm

    for benchmark in benchmarks:
        if getattr(benchmark, "needs_model", False):
            raise UserError(
                f"`{benchmark.name}` needs the model in memory, and not in vLLM",
                key="--backend",
                hint="leave out --backend",
            )
        decoding = getattr(benchmark, "decoding", None)
        if isinstance(decoding, Decoding):
            check_decoding(decoding, f"protocol {benchmark.protocol_name!r}")
    return open_in_vllm


def _warn_of_other_template(
    trained: TemplateSettings | None, benchmarks: Sequence[Benchmark], reporter: Reporter
) -> None:
    """Warn if a model was trained with another prompt template than a benchmark uses."""
    if trained is None:
        return
    for benchmark in benchmarks:
        template = getattr(benchmark, "template", None)
        # What asks by the chat template asks by the trained form.
        if template not in (None, CHAT, trained.name):
            reporter.warn(
                f"{benchmark.name}: `{benchmark.protocol_name}` uses the template `{template}`, "
                f"but the run was trained with `{trained.name}`"
            )
