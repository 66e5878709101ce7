"""A classifier becomes scores: one figure for each split, every class, every sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.artifacts.adapter import read_provenance
from wegeft_cli.data.batches.labelled import iterate_batches, show_input
from wegeft_cli.data.labelled.dataset import ClassRows, encode_rows, join_rows, read_source
from wegeft_cli.data.labelled.labels import Labels
from wegeft_cli.data.sources.files import KINDS
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import MachineError, UserError, raise_all
from wegeft_cli.inference.loaded_classifier import (
    FoundClassifier,
    OpenedClassifier,
    find_classifier,
    load_classifier,
)
from wegeft_cli.models.heads import HeadSpec, read_labels
from wegeft_cli.models.image_processor import check_images
from wegeft_cli.models.loading import load_base_config
from wegeft_cli.recipe.schema import DataSource, Recipe
from wegeft_cli.reporter import Reporter
from wegeft_cli.statistics import wilson_interval
from wegeft_cli.tasks.classification import (
    ClassScore,
    build_collator,
    check_metrics,
    choose_metric,
    score_answers,
)
from wegeft_cli.training.classification_loss import Answers, ClassLoss

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
    processes: Processes,
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
        processes: The processes that share the rows.
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
    asking = Asking(batch_size or known.train.per_device_eval_batch_size, processes, reporter)
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
        processes: The processes that share the rows.
        reporter: Where progress goes.
    """

    batch_size: int
    processes: Processes
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
        place = {"rank": self.processes.rank, "world_size": self.processes.count}
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
        every = self.processes.merge(dict(zip(answers.rows, answers.logits, strict=True)))
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


SPLITS = ("test", "validation")
"""What `--task` names of a classifier."""


def check_splits(names: Sequence[str]) -> None:
    """Refuse what is no split of a classifier.

    Args:
        names: As typed.

    Raises:
        UserError: If one is none.
    """
    for name in names:
        if name not in SPLITS:
            raise UserError(
                f"{name!r} is no split of a classifier",
                key="--task",
                hint=f"name {' or '.join(SPLITS)}; texts are generated by language models alone",
            )


def read_splits(
    opened: OpenedClassifier,
    splits: Sequence[str],
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
) -> dict[str, tuple[ClassRows, str]]:
    """Read the splits that are to be scored.

    Args:
        opened: The classifier.
        splits: test or validation, or both; none takes the first that there is.
        data_dir: Folder that holds them: `<split>/<class>/...`, `<split>.json` and so on; None
            takes the recipe's.
        limit: Only the first so many rows of each.

    Returns:
        The rows of each split, and their digest.

    Raises:
        UserError: If there is no such split, or it holds a class that the model does not know.
        ExceptionGroup: If several rows are at fault.
    """
    known = opened.recipe
    folder = data_dir or (Path(known.eval.data_dir) if known.eval.data_dir else None)
    return {
        name: _read_split(opened, sources, limit or known.eval.limit)
        for name, sources in _find_splits(known, splits, folder).items()
    }


def _find_splits(
    recipe: Recipe, splits: Sequence[str], data_dir: Path | None
) -> dict[str, list[DataSource]]:
    """The sources of each split that is to be scored."""
    found: dict[str, list[DataSource]] = {}
    for name in splits or SPLITS:
        sources = getattr(recipe.data, name)
        if data_dir is not None:
            like = (sources or recipe.data.test or recipe.data.train or [DataSource()])[0]
            sources = _find_in(data_dir, name, like)
        if sources:
            found[name] = list(sources)
            if not splits:
                break
        elif splits:
            raise UserError(
                f"there is no split {name!r}" + (f" in {data_dir}" if data_dir else ""),
                key="--task",
                hint=f"name its sources in the recipe's `data.{name}`, or its folder by --data-dir",
            )
    if not found:
        where = f"{data_dir} holds" if data_dir else "the recipe has"
        raise UserError(
            f"{where} neither test nor validation rows",
            key="--data-dir",
            hint="give a folder with test/<class>/..., test.json or another table called test",
        )
    return found


def _find_in(data_dir: Path, name: str, like: DataSource) -> list[DataSource]:
    if not data_dir.is_dir():
        raise UserError(f"no such folder: {str(data_dir)!r}", key="--data-dir")
    # Another folder has its own pictures: where the recipe's lie says nothing of them.
    source = replace(like, name=None, limit=None, split=name, image_dir=None)
    for suffix in KINDS:
        file = data_dir / f"{name}{suffix}"
        if file.is_file():
            return [replace(source, path=str(file))]
    if (data_dir / name).is_dir():
        return [replace(source, path=str(data_dir))]
    return []


def _read_split(
    opened: OpenedClassifier, sources: Sequence[DataSource], limit: int | None
) -> tuple[ClassRows, str]:
    """Read a split's rows, and digest what was read."""
    recipe, labels = opened.recipe, Labels(opened.head.labels)
    is_image = recipe.task == "image_classification"
    parts = []
    digests = []
    for source in sources:
        cut = source if limit is None else replace(source, limit=limit)
        rows = read_source(recipe, cut, None)
        tokenizer = None if is_image else opened.processor
        parts.append(encode_rows(recipe, rows, labels, opened.model.config, tokenizer)[0])
        digests.append(rows.sha256 or rows.origin)
    joined = join_rows(parts)
    assert joined is not None
    if limit is not None:
        joined = joined.take(torch.arange(min(limit, len(joined))).numpy())
    if is_image:
        raise_all(check_images(joined.shown))
    if len(digests) == 1:
        return joined, digests[0]
    return joined, hashlib.sha256("\n".join(digests).encode()).hexdigest()
