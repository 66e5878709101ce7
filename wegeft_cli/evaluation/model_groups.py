"""Benchmark groups with one fine-tuned model per dataset (GLUE, FGVC, VTAB)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from wegeft_cli.artifacts.environment import describe_environment
from wegeft_cli.artifacts.run_directory import find_recipe_of
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation.benchmarks.base import EvaluationRequest
from wegeft_cli.evaluation.benchmarks.classification import PROTOCOL, SPLITS
from wegeft_cli.evaluation.benchmarks.dataset_groups import CLASS_GROUPS, ClassGroup, Member
from wegeft_cli.evaluation.classifiers import evaluate_classifier
from wegeft_cli.evaluation.result_files import ResultFiles, choose_samples_path
from wegeft_cli.evaluation.runner import Evaluation, EvaluationCall
from wegeft_cli.evaluation.score import Score
from wegeft_cli.inference.loaded_model import find_target, task_of_path
from wegeft_cli.recipe.schema import DataSource, Recipe
from wegeft_cli.statistics import wilson_interval


def find_class_group(tasks: Sequence[str]) -> ClassGroup | None:
    """Return the group of classifiers among the names as typed; None if there is none.

    Raises:
        UserError: If another benchmark is named beside it.
    """
    group = next(
        (CLASS_GROUPS[name.lower()] for name in tasks if name.lower() in CLASS_GROUPS), None
    )
    others = [name for name in tasks if group is not None and name.lower() != group.name]
    if group is None or set(others) < set(SPLITS):
        return group
    raise UserError(
        f"`{group.name}` is scored over several runs, and not beside {', '.join(others)}",
        key="--task",
        hint=f"one --task {group.name}, and --task {' or '.join(SPLITS)} for the split",
    )


def evaluate_group(
    group: ClassGroup,
    targets: Sequence[str | Path],
    request: EvaluationRequest,
    call: EvaluationCall,
) -> dict[str, Any]:
    """Score a classifier of each set, and return the command's JSON object with their mean.

    The set of a run is taken from the evaluated sources: their `name`, else the last part of their
    path that is a set of the group.

    Args:
        call: Its names may contain test or validation. Default: the first split that a run has.

    Raises:
        UserError: If a run is missing, is of no set or of the same as another, or as
            `evaluate_classifier`.
        ExceptionGroup: If there are several faults.
    """
    splits = [name for name in call.names if name.lower() != group.name]
    runs = _assign(group, targets, splits)
    call = replace(call, names=splits).joined()
    scores: list[Score] = []
    for member in group.members:
        path, recipe = runs[member.name]
        first, *_ = evaluate_classifier(path, recipe, request, call).scores
        scores.append(_count_by(member, first, path))
    evaluation = Evaluation((), scores)
    results = evaluation.to_dict()["results"]
    samples_path = choose_samples_path(None, call.output, [group.name], PROTOCOL)
    result: dict[str, Any] = {
        "results": results,
        "groups": [group.mean({score.task: score.score or 0.0 for score in scores})],
        "samples_path": str(samples_path),
        "target": None,
        "targets": [row["target"] for row in results],
        **describe_environment(),
    }
    if call.processes.is_main:
        ResultFiles(samples_path, call.output).write(evaluation, result)
    call.processes.leave()
    return result


def _assign(
    group: ClassGroup, targets: Sequence[str | Path], splits: Sequence[str]
) -> dict[str, tuple[str | Path, Recipe | None]]:
    """Return the run of each set, before any model is loaded."""
    runs: dict[str, tuple[str | Path, Recipe | None]] = {}
    faults: list[UserError] = []
    for target in targets:
        path = find_target(target)
        recipe = find_recipe_of(path)
        if not task_of_path(path, recipe).has_head:
            faults.append(UserError("this is no classifier", file=str(target), key="--task"))
            continue
        found = [] if recipe is None else find_members(group, recipe, splits)
        if len(found) != 1 or found[0] is None:
            names = ["something else" if member is None else member.name for member in found]
            listed = " and ".join(names) if any(found) else "none"
            faults.append(
                UserError(
                    f"its data names {listed} of the sets of `{group.name}`",
                    file=str(target),
                    key="--task",
                    hint="what its recipe scores, `data.test` or else `data.validation`, is to "
                    "have one of them as `name`, or as a folder of `path`",
                )
            )
        elif found[0].name in runs:
            message = f"a second run of {found[0].name}: {runs[found[0].name][0]} is one, too"
            faults.append(UserError(message, file=str(target), hint="give one run of each set"))
        else:
            runs[found[0].name] = path, recipe
    missing = [member.name for member in group.members if member.name not in runs]
    if missing and not faults:
        faults.append(
            UserError(
                f"`{group.name}` is the mean over {len(group.members)} sets, and no run was given "
                f"of {', '.join(missing)}",
                key="TARGET",
                hint=f"wegeft eval --task {group.name} RUN RUN ...: a run of each set, in any "
                "order; one run by itself: wegeft eval RUN",
            )
        )
    raise_all(faults)
    return runs


def find_members(group: ClassGroup, recipe: Recipe, splits: Sequence[str]) -> list[Member | None]:
    """Return the sets of a group that a run's scored sources belong to, None for another source.

    Each set comes once, in the order of the sources. A source is matched by its `name`, then its
    split, its file name, and the folders of its path, the deepest first.

    Args:
        splits: The splits to score. Default: the first of test and validation that exists.
    """
    scored = (getattr(recipe.data, split) for split in splits or SPLITS)
    found = [group.find_member(_name_source(source)) for source in next(filter(None, scored), ())]
    return list(dict.fromkeys(found))


def _name_source(source: DataSource) -> list[str]:
    path = PurePosixPath(str(source.path or "").replace("\\", "/"))
    folders = reversed(path.parts[:-1])
    return [source.name or "", source.split or "", path.name.partition(".")[0], *folders]


def _count_by(member: Member, score: Score, path: str | Path) -> Score:
    """Return a run's score by the metric of its set."""
    metrics = score.metrics["metrics"]
    if member.metric not in metrics:
        raise UserError(
            f"{member.name} counts by {member.metric}, this run has {', '.join(metrics)}",
            file=str(path),
            key="data.problem_type",
            hint="train STS-B as a regression, the other sets as classifications",
        )
    interval = None
    if member.metric == "accuracy" and score.num_correct is not None:
        interval = wilson_interval(score.num_correct, score.n)
    return replace(
        score,
        task=member.name,
        metric=member.metric,
        score=metrics[member.metric],
        ci95=interval,
        extra={"split": score.task, "target": str(path)},
    )
