"""Benchmark families, found by folder; benchmarks and protocols by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation import benchmarks as package
from wegeft_cli.evaluation.benchmarks.base import Benchmark, BenchmarkFamily, EvaluationRequest
from wegeft_cli.evaluation.benchmarks.dataset_groups import CLASS_GROUPS
from wegeft_cli.evaluation.benchmarks.groups import GROUPS, expand_groups
from wegeft_cli.evaluation.benchmarks.training import training_options
from wegeft_cli.recipe.keys import find_nearest
from wegeft_cli.recipe.schema import Recipe

_ORDER = ("text", "code", "mt_bench", "alpaca_eval", "lm_eval")
"""Order of the list of benchmarks, and of the search; other families follow by name."""


def families(*, of_classifiers: bool = False) -> Iterator[BenchmarkFamily]:
    """Import and yield the families one by one, so that a search imports no more than it needs."""
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    for name in sorted(names, key=lambda name: (name not in _ORDER, [*_ORDER, name].index(name))):
        family = getattr(importlib.import_module(f"{package.__name__}.{name}"), "FAMILY", None)
        if family is not None and family.scores_classifiers == of_classifiers:
            yield family


def find_family(name: str, *, of_classifiers: bool = False) -> BenchmarkFamily:
    """Return the family of a benchmark; UserError if there is none."""
    for family in families(of_classifiers=of_classifiers):
        if family.find_name(name) is not None:
            return family
    if name.lower() in CLASS_GROUPS:
        raise UserError(
            f"`{name}` is the mean over classifiers, one fine-tuned on each of its sets",
            key="task",
            hint=f"wegeft eval --task {name.lower()} RUN RUN ...",
        )
    listed = [task["name"] for family in families() for task in family.list_benchmarks()]
    known = [*listed, *GROUPS, *CLASS_GROUPS]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    raise UserError(
        f"no task is called `{name}`",
        key="task",
        hint=f"did you mean `{near[0]}`?" if near else f"known tasks: {', '.join(known)}",
    )


def benchmark_name(name: str) -> str:
    """Return a benchmark's name in the results, given the name as typed."""
    return find_family(name).find_name(name) or name


def check_benchmark(name: str, protocol: str, *, must_fit: bool) -> None:
    """Raise UserError if a benchmark does not exist or the recipe's protocol does not score it."""
    find_family(name).check_protocol(name, protocol, must_fit)


def check_training_benchmark(name: str, protocol: str) -> None:
    """Raise UserError if a benchmark of `train.eval_tasks` cannot be scored during training."""
    family = find_family(name)
    family.check_protocol(name, protocol, False)
    family.check_training(name, training_options())


def find_folder(name: str) -> str | None:
    """Return a benchmark's folder (or file) under the data folder; None if it has none."""
    for task in find_family(name).list_benchmarks():
        if task["name"] == name.lower() and task.get("file"):
            return str(task["file"]).split("/", maxsplit=1)[0]
    return None


def load_benchmarks(names: Sequence[str], request: EvaluationRequest) -> list[Benchmark]:
    """Load every test set before any model, each benchmark once; names may be groups.

    Raises:
        UserError: If none is named, or a benchmark is unknown, missing or damaged.
        ExceptionGroup: If there are several such faults.
    """
    if not names:
        raise UserError(
            "no task is named",
            key="--task",
            hint="such as --task gsm8k; `wegeft eval --list` lists them, and --data FILE scores a "
            "test set of your own",
        )
    found: dict[tuple[str, str], Benchmark] = {}
    faults: list[UserError] = []
    for name in expand_groups(names):
        with _collect(faults):
            family = find_family(name, of_classifiers=request.classifier is not None)
            if request.protocol is not None:
                _check_named_protocol(family, name, request.protocol)
            benchmark = family.load(name, request)
            known = found.setdefault((benchmark.name, benchmark.protocol_name), benchmark)
            if known.cache_key() != benchmark.cache_key():
                raise UserError(
                    f"two test sets have the name `{benchmark.name}`",
                    key="task",
                    hint="rename one of the files",
                )
    raise_all(faults)
    return list(found.values())


def _check_named_protocol(family: BenchmarkFamily, name: str, protocol: str) -> None:
    """Raise UserError if a benchmark is not scored by the protocol that the user named."""
    family.check_protocol(name, protocol, True)
    listed = [each for task in family.list_benchmarks() for each in task.get("protocols", ())]
    if listed and protocol not in listed:
        raise UserError(
            f"`{protocol}` does not score the task `{name}`",
            key="protocol",
            hint=f"use {' or '.join(f'`{each}`' for each in dict.fromkeys(listed))}",
        )


def load_training_benchmarks(recipe: Recipe) -> dict[str, Benchmark]:
    """Load the test sets of `train.eval_tasks`, by the settings of `eval`: {name: benchmark}.

    A benchmark that is named twice, or alone and in a group, comes once.

    Raises:
        UserError: If a benchmark or protocol is unknown, a test set is missing or damaged, or the
            watched metric is not measured.
        ExceptionGroup: If there are several such faults.
    """
    keys = {"--data-dir": "eval.data_dir", "protocol": "eval.protocol"}
    columns = [source.columns for source in recipe.data.train if source.columns]
    options = {**training_options(), "columns": columns}
    found: dict[str, Benchmark] = {}
    faults: list[UserError] = []
    for position, typed in enumerate(recipe.train.eval_tasks):
        for name in expand_groups([typed]):
            with _collect(faults, keys, f"train.eval_tasks[{position}]"):
                family = find_family(name)
                known = family.find_name(name) or name
                if known in found:
                    continue
                family.check_training(known, options)
                settings = replace(recipe.eval, tasks=[name, known])
                request = EvaluationRequest(options=options, settings=settings)
                found[known] = family.load(name, request)
    raise_all(faults)
    check_watched(recipe)
    return found


@contextmanager
def _collect(
    faults: list[UserError], keys: Mapping[str, str] | None = None, other_key: str | None = None
) -> Iterator[None]:
    """Append the faults of the block, and rename the key of each if `keys` are given."""
    try:
        yield
    except UserError as fault:
        found = [fault]
    except ExceptionGroup as group:
        mine, others = group.split(UserError)
        if mine is None or others is not None:
            raise
        found = [fault for fault in mine.exceptions if isinstance(fault, UserError)]
    else:
        return
    for each in found:
        if keys is not None:
            each.key = keys.get(each.key or "", other_key)
    faults.extend(found)


def check_watched(recipe: Recipe) -> None:
    """Raise UserError if nothing measures `train.metric_for_best_model`, or a task is unknown.

    A recipe without `train.eval_tasks` is checked by its own rules.
    """
    train = recipe.train
    members = [benchmark_name(name) for name in expand_groups(train.eval_tasks)]
    groups = [name.lower() for name in train.eval_tasks if name.lower() in GROUPS]
    scores = [f"eval_{name}" for name in dict.fromkeys([*groups, *members])]
    if not scores or train.metric_for_best_model in ("eval_loss", *scores):
        return
    near = find_nearest(train.metric_for_best_model, scores)
    raise UserError(
        f"{train.metric_for_best_model!r} is not measured: there is {' and '.join(scores)}",
        key="train.metric_for_best_model",
        hint=f"did you mean `{near}`?" if near else "name its task in `train.eval_tasks`",
    )


def list_tasks() -> dict[str, Any]:
    """Return the benchmarks, groups and protocols: the JSON object of `wegeft eval --list`."""
    known = list(families())
    return {
        "tasks": [
            {**task, "type": family.name} for family in known for task in family.list_benchmarks()
        ],
        "groups": [
            *(
                {"name": group.name, "tasks": list(group.members), "description": group.description}
                for group in GROUPS.values()
            ),
            *(
                {
                    "name": group.name,
                    "tasks": [member.name for member in group.members],
                    "description": group.description,
                    "of_runs": True,
                }
                for group in CLASS_GROUPS.values()
            ),
        ],
        "protocols": [protocol for family in known for protocol in family.list_protocols()],
    }
