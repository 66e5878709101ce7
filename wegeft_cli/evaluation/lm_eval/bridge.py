"""Bridge to EleutherAI's lm-evaluation-harness: its tasks, or task files of the user."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.lm_eval.task_files import (
    FOLDER,
    find_builtin,
    find_data_files,
    find_local,
    refuse_code,
    with_data,
)
from wegeft_cli.time_limit import time_limit

_SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
_RENDER_SECONDS = 10.0
_MAIN_METRICS = ("exact_match", "acc")


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, or a group of them, loaded with its data.

    Args:
        name: Its name in the harness.
        loaded: The `tasks` and `groups` of its TaskManager.
        manager: That TaskManager.
        origin: The task file or the package, then local data files.
        is_trusted: Whether its templates may run code: those of the harness's own package, and with
            the user's consent.
    """

    name: str
    loaded: Mapping[str, Any]
    manager: Any
    origin: str
    is_trusted: bool = True


@dataclass(frozen=True)
class HarnessResult:
    """The result of the harness.

    Args:
        metric: The main metric with its filter: `acc,none`.
        score: Its value.
        stderr: Its standard error, if the harness has one.
        metrics: Every metric of the task (or group) by name, errors included.
        settings: num_fewshot, version, seeds of the harness.
        samples: A record per row: task, index, prompt, output, answer, value of the metric.
        higher_is_better: Whether more of the main metric is better.
    """

    metric: str
    score: float
    stderr: float | None
    metrics: Mapping[str, float]
    settings: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    higher_is_better: bool


def load_harness_task(name: str, *, data_dir: Path | None, trust_code: bool = False) -> HarnessTask:
    """Load a task and its data before any model.

    `<data_dir>/lm-eval/*.yaml` are task files. `<data_dir>/lm-eval/<task>/` with train, validation
    or test as JSON Lines, JSON, Parquet or CSV replaces the hub's data of one of the harness's
    tasks.

    Args:
        data_dir: The data folder. Default: no local files.

    Raises:
        UserError: If the harness is not installed, has no such task, or its data cannot be read;
            and if a task would run code.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "the lm-evaluation-harness is not installed",
            key="--task",
            hint="pip install 'wegeft-cli[lm-eval]'",
        )
    folder = None if data_dir is None else data_dir / FOLDER
    if folder is not None and not folder.is_dir():
        folder = None
    if folder is not None and not trust_code:
        refuse_code(folder)
    with _quiet():
        manager = find_local(name, folder)
        origin = "lm_eval" if folder is None else str(folder)
        files = {} if folder is None else find_data_files(folder / name)
        is_trusted = trust_code or manager is None
        if manager is None:
            manager = find_builtin(name)
            origin = "lm_eval"
        if name not in manager.all_tasks:
            raise UserError(
                f"the lm-evaluation-harness knows no task `{name}`",
                key="--task",
                hint="`lm-eval ls tasks` lists its tasks; your own go into "
                f"<data-dir>/{FOLDER}/NAME.yaml",
            )
        if files:
            assert folder is not None
            manager = with_data(manager, name, files)
            origin = f"{origin}, data in {folder / name}"
        try:
            with _sandboxed_templates(name, is_trusted):
                loaded = manager.load([name])
        except UserError:
            raise
        except Exception as error:
            # The hub's client, the YAML reader and a task's code raise any type.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"the task `lm-eval:{name}` cannot be read: {lines[0]}",
                key="--task",
                hint=f"without the hub, put its data at <data-dir>/{FOLDER}/{name}/test.jsonl "
                "(and train, validation, as the task needs them)",
            ) from error
    unsafe = [key for key, task in loaded["tasks"].items() if _is_unsafe(task)]
    if unsafe:
        raise UserError(
            f"`lm-eval:{unsafe[0]}` runs generated code without a sandbox",
            key="--task",
            hint="--task humaneval runs it in one",
        )
    return HarnessTask(name, loaded, manager, origin, is_trusted)


def run_harness(
    model: Any,
    tokenizer: Any,
    task: HarnessTask,
    *,
    batch_size: int,
    limit: int | None = None,
    check: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda text: None,
) -> HarnessResult:
    """Evaluate the model in memory; training modes and random states are restored.

    Args:
        limit: Number of rows of each task. Default: all.
        check: Called before each forward pass; may raise.
        warn: Called if the batch size is 1 because a batch changes the model's answers.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from wegeft_cli.generation.padding_check import NOTES, find_batching

    class CheckedModel(HFLM):
        def _model_call(self, *words: Any, **named: Any) -> Any:
            check()
            return super()._model_call(*words, **named)

        def _model_generate(self, *words: Any, **named: Any) -> Any:
            check()
            return super()._model_generate(*words, **named)

    modes = [(module, module.training) for module in model.modules()]
    try:
        with (
            torch.no_grad(),
            _quiet(),
            _kept_random_states(),
            _sandboxed_templates(task.name, task.is_trusted),
        ):
            model.eval()
            if batch_size > 1 and find_batching(model, tokenizer) != "left":
                batch_size = 1
                warn(NOTES["single"])
            wrapped = CheckedModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = simple_evaluate(
                model=wrapped,
                tasks=[*task.loaded["groups"].values()] or [*task.loaded["tasks"].values()],
                task_manager=task.manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                **_SEEDS,
            )
    finally:
        for module, training in modes:
            module.training = training
    assert found is not None
    result = _read_result(task, found)
    return replace(result, settings={**result.settings, "batch_size": batch_size})


def _read_result(task: HarnessTask, found: Mapping[str, Any]) -> HarnessResult:
    leaves = list(task.loaded["tasks"])
    own = task.name if task.name in found["results"] else leaves[0]
    rows = found["results"][own]
    figures = {key: _number(value) for key, value in rows.items() if "," in key}
    metrics = {key: value for key, value in figures.items() if value is not None}
    values = {key: value for key, value in metrics.items() if "_stderr," not in key}
    if not values:
        raise UserError(f"`lm-eval:{task.name}` gave no figures", key="--task")
    metric = _main_metric(values)
    name, _, filter_name = metric.partition(",")
    if own != task.name:
        # A tag has no figures: use the unweighted mean of its tasks.
        shared = [_number(found["results"][leaf].get(metric)) for leaf in leaves]
        numbers = [value for value in shared if value is not None]
        if len(numbers) == len(leaves):
            values[metric] = metrics[metric] = sum(numbers) / len(numbers)
    stderr = metrics.get(f"{name}_stderr,{filter_name}") if own == task.name else None
    better = found.get("higher_is_better", {}).get(own, {})
    return HarnessResult(
        metric,
        values[metric],
        stderr,
        metrics,
        {
            "num_fewshot": {leaf: found["n-shot"].get(leaf) for leaf in leaves},
            "task_version": {leaf: found["versions"].get(leaf) for leaf in leaves},
            "lm_eval": importlib.metadata.version("lm_eval"),
            "n": {leaf: found["n-samples"][leaf]["effective"] for leaf in leaves},
            **_SEEDS,
        },
        [
            _read_sample(leaf, sample, name)
            for leaf in leaves
            for sample in found["samples"][leaf]
            if sample.get("filter", "none") == filter_name
        ],
        bool(better.get(name, True)),
    )


def _read_sample(task: str, sample: Mapping[str, Any], metric: str) -> dict[str, Any]:
    arguments = sample["arguments"]
    first = arguments[0] if isinstance(arguments, list | tuple) else next(iter(arguments.values()))
    prompt = first[0] if isinstance(first, list | tuple) else next(iter(first.values()))
    return {
        "subtask": task,
        "doc_id": sample["doc_id"],
        "prompt": str(prompt),
        "output": json.dumps(sample["filtered_resps"], default=str, ensure_ascii=False),
        "answer": str(sample["target"]),
        "value": _sample_value(sample.get(metric)),
    }


def _sample_value(value: Any) -> float | None:
    """Return a row's figure; a truth value is 0 or 1."""
    return float(value) if isinstance(value, bool) else _number(value)


def _main_metric(values: Mapping[str, float]) -> str:
    """Return the share of correct answers if there is one, else the task's first metric."""
    for wished in _MAIN_METRICS:
        for key in values:
            if key.partition(",")[0] == wished:
                return key
    return next(iter(values))


def _number(value: Any) -> float | None:
    """Return a number (also numpy's) as a float; None for `N/A` and names."""
    if value is None or isinstance(value, str | bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


@contextlib.contextmanager
def _sandboxed_templates(name: str, is_trusted: bool) -> Iterator[None]:
    """Render templates of an untrusted task file in Jinja's immutable sandbox, with a limit."""
    from jinja2 import Template
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    class LimitedTemplate(Template):
        def render(self, *args: Any, **kwargs: Any) -> str:
            fault = UserError(
                f"a template of the task `lm-eval:{name}` takes more than {_RENDER_SECONDS:.0f} "
                "seconds for one row",
                key="--data-dir",
                hint="its loops hardly end: read the task file",
            )
            with time_limit(_RENDER_SECONDS, fault):
                return super().render(*args, **kwargs)

    original = utils.env
    if not is_trusted:
        utils.env = ImmutableSandboxedEnvironment(
            undefined=original.undefined, keep_trailing_newline=original.keep_trailing_newline
        )
        utils.env.filters.update(original.filters)
        utils.env.template_class = LimitedTemplate
    try:
        yield
    except SecurityError as error:
        raise UserError(
            f"a template of the task `lm-eval:{name}` would run Python code: {error}",
            key="--trust-task-code",
            hint="read the task file, then add this option",
        ) from error
    finally:
        utils.env = original


def _is_unsafe(task: Any) -> bool:
    return bool(getattr(getattr(task, "config", None), "unsafe_code", False))


@contextlib.contextmanager
def _kept_random_states() -> Iterator[None]:
    """Restore the random states that the harness seeds: a training may continue afterwards."""
    import numpy as np
    import torch

    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the harness's log lines and progress bars, not its warnings."""
    logger = logging.getLogger("lm_eval")
    kept = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _no_bars():
            yield
    finally:
        logger.setLevel(kept)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    import tqdm.std

    real: Callable[..., None] = tqdm.std.tqdm.__init__

    def silent(self: Any, *words: Any, **named: Any) -> None:
        real(self, *words, **{**named, "disable": True})

    tqdm.std.tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.std.tqdm.__init__ = real
