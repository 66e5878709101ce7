"""`wegeft eval --task glue RUN RUN ...`: classifiers, one of each set, become a group's score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from wegeft_cli.artifacts.environment import describe_environment
from wegeft_cli.artifacts.run_directory import find_recipe_of
from wegeft_cli.distributed.processes import evaluation_processes
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation.benchmarks.classification import PROTOCOL, SPLITS, evaluate_classes
from wegeft_cli.evaluation.benchmarks.dataset_groups import CLASS_GROUPS, ClassGroup, Member
from wegeft_cli.evaluation.class_scores import refuse_foreign
from wegeft_cli.evaluation.result_files import choose_samples_path, choose_scores_path, write_line
from wegeft_cli.inference.loaded_classifier import is_classifier
from wegeft_cli.inference.loaded_model import find_target
from wegeft_cli.recipe.schema import DataSource, Recipe
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.statistics import wilson_interval
from wegeft_cli.storage.atomic import write_text_atomic


def find_class_group(tasks: Sequence[str]) -> ClassGroup | None:
    """Give the group of classifiers that is asked for.

    Args:
        tasks: As typed.

    Returns:
        The group; None if there is none among them.

    Raises:
        UserError: If something else is asked for at the same time.
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
    *,
    splits: Sequence[str],
    limit: int | None,
    batch_size: int | None,
    output: Path | None,
    foreign: Mapping[str, Any],
    reporter: Reporter,
) -> dict[str, Any]:
    """Score a classifier of each set, and take their mean.

    Which set a run is of is read off the sources that are scored: their `name`, or else the deepest
    part of their path that names one.

    Args:
        group: The sets.
        targets: Adapter, run or model folders, or recipes: one of each set, in any order.
        splits: test or validation; none takes the first that a run has.
        limit: Only the first so many rows of each.
        batch_size: Rows at a time.
        output: The result file; None lets it lie under runs/eval.
        foreign: Options that say nothing here, by name; none may be given.
        reporter: Where words and progress go.

    Returns:
        The command's JSON object: results (one a set, by the set's own metric), groups, targets.

    Raises:
        UserError: If a run is missing, is of no set or of the same as another, or as
            `evaluate_classes`.
        ExceptionGroup: If there are several faults.
    """
    refuse_foreign(foreign)
    runs = _assign(group, targets, splits)
    processes = evaluation_processes()
    if processes.rank:
        reporter = SilentReporter()
    results: list[dict[str, Any]] = []
    lines: list[str] = []
    for member in group.members:
        path, recipe = runs[member.name]
        (row, *_), _, samples = evaluate_classes(
            path,
            recipe,
            splits=splits,
            limit=limit,
            batch_size=batch_size,
            processes=processes,
            reporter=reporter,
        )
        results.append(_count_by(member, row, path))
        lines += [write_line({**line, "task": member.name}) for line in samples]
    mean = group.mean({row["task"]: row["score"] for row in results})
    samples_path = choose_samples_path(None, output, [group.name], PROTOCOL)
    result: dict[str, Any] = {
        "results": results,
        "groups": [mean],
        "samples_path": str(samples_path),
        "target": None,
        "targets": [row["target"] for row in results],
        **describe_environment(),
    }
    if processes.is_main:
        write_text_atomic(samples_path, "".join(lines))
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        write_text_atomic(output or choose_scores_path(samples_path), text)
    processes.leave()
    return result


def _assign(
    group: ClassGroup, targets: Sequence[str | Path], splits: Sequence[str]
) -> dict[str, tuple[str | Path, Recipe | None]]:
    """Find out which set each run is of, before any is loaded."""
    runs: dict[str, tuple[str | Path, Recipe | None]] = {}
    faults: list[UserError] = []
    for target in targets:
        path = find_target(target)
        recipe = find_recipe_of(path)
        if not is_classifier(path, recipe):
            faults.append(UserError("this is no classifier", file=str(target), key="--task"))
            continue
        found = [] if recipe is None else find_members(group, recipe, splits)
        if len(found) != 1 or found[0] is None:
            names = ["something else" if member is None else member.name for member in found]
            told = " and ".join(names) if any(found) else "none"
            faults.append(
                UserError(
                    f"its data names {told} of the sets of `{group.name}`",
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
    """Find the sets of a group that a run's scored sources are of.

    Args:
        group: The sets.
        recipe: The run's.
        splits: As asked for; none takes the first of test and validation that the recipe has.

    Returns:
        Each set once, by the sources' order, and None for a source that is of none. Of a source
        its `name` is asked first, then the split, the file's name and the folders of its path, the
        deepest first: a folder above them all may have any name.
    """
    scored = (getattr(recipe.data, split) for split in splits or SPLITS)
    found = [group.find_member(_name_source(source)) for source in next(filter(None, scored), ())]
    return list(dict.fromkeys(found))


def _name_source(source: DataSource) -> list[str]:
    path = PurePosixPath(str(source.path or "").replace("\\", "/"))
    folders = reversed(path.parts[:-1])
    return [source.name or "", source.split or "", path.name.partition(".")[0], *folders]


def _count_by(member: Member, row: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """A run's result as the group counts it."""
    if member.metric not in row["metrics"]:
        raise UserError(
            f"{member.name} counts by {member.metric}, this run has {', '.join(row['metrics'])}",
            file=str(path),
            key="data.problem_type",
            hint="STS-B is learned as regression, the other sets as classes",
        )
    is_share = member.metric == "accuracy"
    return {
        **row,
        "task": member.name,
        "split": row["task"],
        "metric": member.metric,
        "score": row["metrics"][member.metric],
        "ci95": list(wilson_interval(row["num_correct"], row["n"])) if is_share else None,
        "target": str(path),
    }
