"""A classifier becomes scores: one figure for each split, every class, every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.evaluation.scoring import wilson_interval
from wegeft_cli.models.heads import HeadSpec, read_labels
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.training.classes import Answers, ClassLoss
from wegeft_cli.workflows.class_batches import iterate_batches, show_input
from wegeft_cli.workflows.class_data import ClassRows
from wegeft_cli.workflows.class_splits import check_splits, read_splits
from wegeft_cli.workflows.classifier import (
    ClassScore,
    build_collator,
    check_metrics,
    choose_metric,
    score_answers,
)
from wegeft_cli.workflows.open_classifier import (
    FoundClassifier,
    OpenedClassifier,
    find_classifier,
    load_classifier,
)
from wegeft_cli.workflows.prepare import load_base_config
from wegeft_cli.workflows.reporter import Reporter
from wegeft_cli.workflows.share import Share
from wegeft_cli.workflows.target import read_provenance

PROTOCOL = "classification"


def evaluate_classes(
    path: str | Path,
    recipe: Recipe | None,
    *,
    splits: Sequence[str] = (),
    data_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    compare_base: bool = False,
    base: str | None = None,
    share: Share,
    reporter: Reporter,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, list[dict[str, Any]]]:
    """Score a classifier on its splits.

    Args:
        path: An adapter, run or model folder.
        recipe: The run's recipe, where it belongs to a run.
        splits: test or validation, or both; none takes the first that there is.
        data_dir: Folder that holds them: `<split>/<class>/...`, `<split>.json` and so on; None
            takes the recipe's.
        limit: Only the first so many rows of each.
        batch_size: Rows at a time.
        compare_base: Score the base too, whose head must know the same classes.
        base: The base's folder or hub id, where it is not as recorded.
        share: This process's part of the rows.
        reporter: Where words and progress go.

    Returns:
        Results, the base's results, and the lines of the samples file.

    Raises:
        UserError: If there is no such split, or it holds a class that the model does not know.
        ExceptionGroup: If several rows are at fault.
    """
    check_splits(splits)
    found = find_classifier(path, recipe, base=base)
    known = found.recipe
    check_metrics(known, found.head)
    alone = _find_base(found, path, base) if compare_base else None
    opened = load_classifier(found, base=base, warn=reporter.warn)
    rows = read_splits(opened, splits, data_dir=data_dir, limit=limit)
    asking = Asking(batch_size or known.train.per_device_eval_batch_size, share, reporter)
    samples: list[dict[str, Any]] = []
    base_results = None
    if alone is not None:
        base_results = _score_splits(load_classifier(alone), rows, asking, "base", samples)
    results = _score_splits(opened, rows, asking, "target", samples)
    return results, base_results, samples


@dataclass(frozen=True)
class Asking:
    """How a classifier is asked.

    Args:
        batch_size: Rows at a time.
        share: This process's part of the rows.
        reporter: Where progress goes.
    """

    batch_size: int
    share: Share
    reporter: Reporter

    def ask(self, opened: OpenedClassifier, rows: ClassRows, title: str) -> ClassScore:
        """Score the rows of a split, those of all processes together.

        Args:
            opened: The classifier.
            rows: The split.
            title: What the progress is called.

        Returns:
            The score, the same in every process.

        Raises:
            MachineError: If the memory does not suffice.
        """
        from accelerate import PartialState

        model: Any = opened.model.to(PartialState().device)
        config = getattr(model, "config", None)
        collator = build_collator(opened.recipe, opened.processor, config, model)
        loss = ClassLoss(is_regression=not opened.head.labels)
        device = next(model.parameters()).device
        place = {"rank": self.share.index, "world_size": self.share.count}
        done = 0
        try:
            with torch.no_grad(), self.reporter.progress(title, len(rows)) as advance:
                for batch in iterate_batches(rows, collator, batch_size=self.batch_size, **place):
                    loss(model, batch.to(device))
                    done += len(batch.rows)
                    advance(done)
        except torch.OutOfMemoryError as error:
            raise MachineError("out of memory", key="--batch-size", hint="lower it") from error
        answers = loss.take_answers()
        every = self.share.gather(dict(zip(answers.rows, answers.logits, strict=True)))
        labels = [rows.labels[row].item() for row in every]
        return score_answers(Answers(list(every), list(every.values()), labels), opened.head)


def _find_base(found: FoundClassifier, path: str | Path, base: str | None) -> FoundClassifier:
    """Find the base alone, before anything is loaded; its own head must know the same classes."""
    section = found.recipe.model
    if found.adapter_dir is None:
        base = base or read_provenance(Path(path))
        if base is None:
            raise UserError(
                "nothing tells which base this model came from",
                key="--base",
                hint="name it with --base",
            )
        section = replace(section, name_or_path=base, revision=None)
    config = load_base_config(section)
    if not found.head.labels or set(read_labels(config)) != set(found.head.labels):
        raise UserError(
            f"the base {section.name_or_path!r} has no head for these classes: there is nothing to "
            "compare with",
            key="--compare-base",
            hint="train a linear probe of it instead: adapter.type=linear_probe",
        )
    head = replace(found.head, labels=read_labels(config), keeps_base_head=True)
    return FoundClassifier(None, head, replace(found.recipe, model=section))


def _score_splits(
    opened: OpenedClassifier,
    splits: dict[str, tuple[ClassRows, str]],
    asking: Asking,
    title: str,
    samples: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    results = []
    for name, (rows, digest) in splits.items():
        score = asking.ask(opened, rows, f"{title}: {name}")
        results.append(tell_result(name, rows, score, opened, digest))
        samples += tell_samples(title, name, rows, score, opened.head)
    return results


def tell_result(
    name: str, rows: ClassRows, score: ClassScore, opened: OpenedClassifier, digest: str
) -> dict[str, Any]:
    """Give a split's score as an entry of `results`.

    Args:
        name: The split.
        rows: Its rows.
        score: Their score.
        opened: What was asked.
        digest: Of the rows.

    Returns:
        The entry.
    """
    metric = choose_metric(opened.recipe, opened.head)
    interval = None
    if metric == "accuracy" and score.num_correct is not None:
        interval = list(wilson_interval(score.num_correct, score.n))
    return {
        "task": name,
        "protocol": PROTOCOL,
        "metric": metric,
        "score": score.metrics[metric],
        "num_correct": score.num_correct,
        "n": score.n,
        "n_invalid": 0,
        "ci95": interval,
        "metrics": score.metrics,
        "per_class": score.per_class,
        "data_sha256": digest,
        "origin": rows.origin,
    }


def tell_samples(
    title: str, name: str, rows: ClassRows, score: ClassScore, head: HeadSpec
) -> list[dict[str, Any]]:
    """Give the lines of the samples file.

    Args:
        title: What was asked: base or target.
        name: The split.
        rows: Its rows.
        score: Their score.
        head: What the classifier tells apart.

    Returns:
        One line a row, in the rows' order.
    """
    lines = []
    for index in range(len(rows)):
        answer, label = score.predicted[index], rows.labels[index].item()
        line: dict[str, Any] = {
            "model": title,
            "task": name,
            "protocol": PROTOCOL,
            "index": index,
            "input": show_input(rows.shown[index]),
        }
        if head.labels:
            line |= {
                "prediction": head.labels[int(answer)],
                "answer": head.labels[label],
                "correct": int(answer) == label,
                "confidence": score.confidence[index],
            }
        else:
            line |= {"prediction": answer, "answer": label, "correct": None}
        lines.append(line)
    return lines
