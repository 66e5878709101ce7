"""Ablation: a benchmark's score with one part of an adapter disabled at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.analysis.adapter_parts import KINDS, Element, list_elements
from wegeft_cli.analysis.edit import edit_files
from wegeft_cli.analysis.output_files import check_output, check_plots, save_ablation, write_json
from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.run_directory import find_recipe_of
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import EvaluationRequest
from wegeft_cli.evaluation.benchmarks.classification import check_splits
from wegeft_cli.evaluation.benchmarks.registry import load_benchmarks
from wegeft_cli.evaluation.classifiers import batch_size_of, load_splits, refuse_foreign
from wegeft_cli.evaluation.runner import EvaluationRunner
from wegeft_cli.evaluation.score import Score
from wegeft_cli.inference.loaded_model import LoadedModel, ModelTarget, task_of_path
from wegeft_cli.methods.layers.owner import disable_generators, remove_generators
from wegeft_cli.methods.registry import require_generators
from wegeft_cli.methods.wegeft.save_load import attach_files
from wegeft_cli.models.heads import find_head_modules
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.statistics import mcnemar_exact
from wegeft_cli.tasks.support.classifier import check_metrics

DEFAULT_DIRECTIONS = 16


@checked_arguments
def ablate(
    adapter: str | Path | None = None,
    *,
    by: str = "group",
    task: str | None = None,
    protocol: str | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    top: int | None = None,
    base: str | None = None,
    plots: Path | None = None,
    output: Path | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Score a task with each part of an adapter disabled, one at a time, and rank the parts.

    An adapter without a part is the one that `edit(drop=[part])` writes. All rows are the same, so
    answers are compared one by one: `lost` became wrong without the part, `gained` became right,
    and `p_value` is that of the exact sign test of the two (McNemar). With many parts some p-values
    are small by chance. `base` is the base alone; for a classifier, whose base has no head for
    these classes, it is the base with the trained head.

    Args:
        adapter: An adapter or run folder. Default: the newest finished run under runs/.
        by: group, layer, module, direction, or saved (modules that were trained whole).
        task: Task by name; for a classifier test or validation. Default: the recipe's first.
        protocol: Prompt, decoding and scoring rules by name.
        data_dir: Folder with `<set>/test.json`.
        limit: Number of rows. Default: all.
        batch_size: Prompts generated at a time.
        max_new_tokens: Longest answer in tokens. Default: the protocol's.
        top: Number of directions, the largest first. Default: 16.
        base: The base's folder or hub id, if it is not where the adapter records it.
        plots: Folder for the picture; needs matplotlib (`wegeft-cli[plot]`).
        output: A file for the JSON object, rewritten after every part.
        reporter: Progress and messages. Default: none.

    Returns:
        The JSON object of `wegeft inspect --ablate`: adapter, by, num_parts, whole and base (as
        rows of `wegeft eval`), parts (part, score, change, num_correct, n, n_invalid, ci95, lost,
        gained, p_value), the most costly first.

    Raises:
        UserError: If the adapter is not WeGeFT's, has no such parts, or task or data are at fault.
    """
    reporter = reporter or SilentReporter()
    if by not in KINDS:
        raise UserError(f"got {by!r}", key="--ablate", hint=f"one of {', '.join(KINDS)}")
    if plots is not None:
        check_plots()
    if output is not None:
        check_output(output)
    adapter_dir, files = _load_files(adapter)
    elements = list_elements(files, by, DEFAULT_DIRECTIONS if top is None else top)
    if not elements:
        raise UserError(f"the adapter has no {by} to switch off", key="--ablate")
    request = EvaluationRequest(protocol, data_dir, limit, batch_size, max_new_tokens)
    recipe = find_recipe_of(adapter_dir)
    has_head = task_of_path(adapter_dir, recipe).has_head
    open_subject = _open_classifier if has_head else _open_language_model
    subject = open_subject(adapter_dir, recipe, request, task, base, reporter)
    if subject.has_head:
        elements = _without_head(elements, subject.module)
    whole = subject.score("whole")
    if whole.score is None:
        raise UserError(f"{whole.task} gives no score of its own to compare", key="--task")
    without = subject.score_base(files)
    result: dict[str, Any] = {
        "adapter": str(adapter_dir),
        "by": by,
        "num_parts": len(elements),
        "whole": _row(whole),
        "base": _row(without),
        "parts": [],
    }
    for element in elements:
        found = subject.score_without(element, files, without)
        result["parts"].append(_compare(element, found, whole))
        result["parts"].sort(key=lambda row: row["change"])
        if output is not None:
            write_json(output, result)
    if plots is not None:
        result["plots"] = [str(path) for path in save_ablation(result, plots)]
    return result


def _load_files(adapter: str | Path | None) -> tuple[Path, AdapterFiles]:
    """Return the folder and the files of a WeGeFT adapter; UserError for another method's."""
    opened = Adapter.open(adapter)
    hint = "train it by adapter.type: wegeft to switch parts off"
    require_generators(opened, "only WeGeFT's parts can be switched off", hint=hint)
    return opened.folder, opened.files


@dataclass(frozen=True)
class _Subject:
    """A loaded model, whose adapter is replaced again and again, and the benchmark."""

    adapter_dir: Path
    model: Any
    module: Any
    runner: EvaluationRunner
    has_head: bool

    def score(self, title: str) -> Score:
        """Score the model with its present adapter."""
        (score,) = self.runner.score(self.model, title)
        return score

    def score_base(self, files: AdapterFiles) -> Score:
        """Score the base; a classifier keeps its trained head."""
        if self.has_head:
            self._attach(_without_factors(files))
            return self.score("base")
        with disable_generators(self.module):
            return self.score("base")

    def score_without(self, element: Element, files: AdapterFiles, base: Score) -> Score:
        """Score the adapter without one part; without its last part it is the base."""
        remaining = edit_files(files, [(element, 0.0)])
        if remaining.manifest.modules:
            self._attach(remaining)
        elif remaining.saved_modules:
            self._attach(_without_factors(files))  # modules that were trained whole stay
        else:
            return base
        return self.score(element.text)

    def _attach(self, files: AdapterFiles) -> None:
        remove_generators(self.module)
        attach_files(self.module, files, self.adapter_dir)
        self.module.eval()


def _open_language_model(
    adapter_dir: Path,
    recipe: Recipe | None,
    request: EvaluationRequest,
    task: str | None,
    base: str | None,
    reporter: Reporter,
) -> _Subject:
    if recipe is not None:
        request = replace(request, settings=recipe.eval)
    names = [task] if task is not None else list(request.settings.tasks)[:1]
    benchmarks = load_benchmarks(names, request)[:1]
    opened = LoadedModel.open(adapter_dir, recipe, base=base, warn=reporter.warn)
    size = request.batch_size or request.settings.batch_size
    runner = EvaluationRunner(benchmarks, size, Processes.single(), reporter)
    return _Subject(adapter_dir, opened, opened.model, runner, has_head=False)


def _open_classifier(
    adapter_dir: Path,
    recipe: Recipe | None,
    request: EvaluationRequest,
    task: str | None,
    base: str | None,
    reporter: Reporter,
) -> _Subject:
    refuse_foreign({"protocol": request.protocol, "max_new_tokens": request.max_new_tokens})
    splits = [] if task is None else [task]
    check_splits(splits)
    target = ModelTarget.resolve(adapter_dir, recipe, base=base)
    head, known = target.classifier()
    if not head.labels:
        raise UserError(
            "an ablation counts right answers, and this model predicts numbers",
            key="--ablate",
            hint="switch a part off by `wegeft edit --drop` and score that adapter",
        )
    check_metrics(known, head)
    opened = target.load(reporter.warn)
    size = batch_size_of(opened, request)
    runner = EvaluationRunner(
        load_splits(opened, splits, request), size, Processes.single(), reporter
    )
    return _Subject(adapter_dir, opened, opened.model, runner, has_head=True)


def _without_head(elements: Sequence[Element], model: Any) -> list[Element]:
    """Remove a classifier's head from the parts; UserError if no other part is left."""
    heads = set(find_head_modules(model))
    kept = [each for each in elements if each.kind != "saved" or each.name not in heads]
    if not kept:
        raise UserError(
            "only the head was trained whole, and a classifier without it answers nothing",
            key="--ablate",
            hint="switch off a group, layer, module or direction",
        )
    return kept


def _row(score: Score) -> dict[str, Any]:
    """Return a score's row; a classifier's has the keys of a prompt too, empty."""
    return {"template": None, "template_hash": "", "generation": None, **score.to_dict()}


def _without_factors(files: AdapterFiles) -> AdapterFiles:
    """Return the adapter with every psi at zero: only modules trained whole change the model."""
    factors = {group: (phi, torch.zeros_like(psi)) for group, (phi, psi) in files.factors.items()}
    return AdapterFiles(files.manifest, factors, files.saved_modules)


def _compare(element: Element, found: Score, whole: Score) -> dict[str, Any]:
    before = [sample["correct"] for sample in whole.samples]
    after = [sample["correct"] for sample in found.samples]
    lost, gained = _count(before, after), _count(after, before)
    row = found.to_dict()
    kept = {key: row[key] for key in ("score", "num_correct", "n", "n_invalid", "ci95")}
    return {
        "part": element.text,
        **kept,
        "change": (found.score or 0.0) - (whole.score or 0.0),
        "lost": lost,
        "gained": gained,
        "p_value": mcnemar_exact(lost, gained),
    }


def _count(one: Sequence[bool], two: Sequence[bool]) -> int:
    return sum(a and not b for a, b in zip(one, two, strict=True))
