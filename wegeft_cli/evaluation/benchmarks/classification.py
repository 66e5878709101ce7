"""Benchmarks of classifiers: their test and validation splits, row by row and class by class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wegeft_cli.errors import MachineError, UserError, raise_all
from wegeft_cli.evaluation.benchmarks.base import (
    BenchmarkContext,
    BenchmarkFamily,
    EvaluationRequest,
)
from wegeft_cli.evaluation.score import Score
from wegeft_cli.recipe.schema import DataSource, Recipe
from wegeft_cli.statistics import wilson_interval
from wegeft_cli.tasks.registry import find_task

if TYPE_CHECKING:
    from wegeft_cli.data.labelled.dataset import ClassRows
    from wegeft_cli.inference.loaded_model import LoadedModel
    from wegeft_cli.models.heads import HeadSpec
    from wegeft_cli.tasks.classification import ClassificationTask
    from wegeft_cli.tasks.support.classifier import ClassScore

PROTOCOL = "classification"
SPLITS = ("test", "validation")
"""The benchmarks of a classifier."""


@dataclass(frozen=True)
class ClassificationBenchmark:
    """One split of a classifier's data.

    Args:
        name: test or validation.
        rows: The rows.
        data_sha256: Digest of the rows.
        head: The classes.
        metric: The metric that is the score.
    """

    name: str
    rows: ClassRows
    data_sha256: str
    head: HeadSpec
    metric: str

    @property
    def protocol_name(self) -> str:
        """The protocol's name."""
        return PROTOCOL

    @property
    def num_examples(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def cache_key(self) -> Mapping[str, Any]:
        """Return the split's name; the answers of classifiers are not cached."""
        return {"task": self.name}

    def run(self, model: LoadedModel, context: BenchmarkContext) -> Score:
        """Classify the rows, this process its shard of them."""
        score = self._classify(model, context)
        interval = None
        if self.metric == "accuracy" and score.num_correct is not None:
            interval = wilson_interval(score.num_correct, score.n)
        return Score(
            task=self.name,
            protocol=PROTOCOL,
            metric=self.metric,
            score=score.metrics[self.metric],
            num_correct=score.num_correct,
            n=score.n,
            n_invalid=0,
            ci95=interval,
            metrics={"metrics": score.metrics, "per_class": score.per_class},
            data_sha256=self.data_sha256,
            origin=self.rows.origin,
            samples=self._samples(score),
        )

    def score_file(self, path: Path) -> Score:
        """Raise UserError: a classifier's answers are scored as it gives them."""
        raise samples_error()

    def _classify(self, model: LoadedModel, context: BenchmarkContext) -> ClassScore:
        """Return the score of the rows of all processes."""
        import torch
        from accelerate import PartialState

        from wegeft_cli.data.batches.labelled import iterate_batches
        from wegeft_cli.tasks.support.classifier import check_shortest, score_answers
        from wegeft_cli.training.classification_loss import ClassifierOutputs, ClassLoss

        module: Any = model.model.to(PartialState().device)
        _, recipe = model.classifier()
        task = _task_of(recipe)
        collator = task.collator(recipe, model.processor, module)
        if not task.reads_images:
            check_shortest(module, int(self.rows.lengths.min()), f"data.{self.name}")
        layout = task.find_layout(module, model.processor, recipe, context.batch_size)
        if layout.note is not None:
            context.warn(layout.note)
        loss = ClassLoss(is_regression=not self.head.labels, layout=layout.kind)
        device = next(module.parameters()).device
        processes = context.processes
        place = {"rank": processes.rank, "world_size": processes.count}
        done = 0
        batches = iterate_batches(self.rows, collator, batch_size=context.batch_size, **place)
        try:
            with torch.no_grad():
                for batch in batches:
                    loss(module, batch.to(device))
                    done += len(batch.rows)
                    context.on_progress(done, self.num_examples)
        except torch.OutOfMemoryError as error:
            raise MachineError("out of memory", key="--batch-size", hint="lower it") from error
        answers = loss.pop_outputs()
        every = processes.merge(dict(zip(answers.rows, answers.logits, strict=True)))
        labels = [self.rows.labels[row].item() for row in every]
        return score_answers(
            ClassifierOutputs(list(every), list(every.values()), labels), self.head
        )

    def _samples(self, score: ClassScore) -> list[dict[str, Any]]:
        """Return a record per row, in the rows' order."""
        from wegeft_cli.data.labelled.dataset import show_input

        samples = []
        for index in range(len(self.rows)):
            answer, label = score.predicted[index], self.rows.labels[index].item()
            sample: dict[str, Any] = {"index": index, "input": show_input(self.rows.shown[index])}
            if self.head.labels:
                sample |= {
                    "prediction": self.head.labels[int(answer)],
                    "answer": self.head.labels[label],
                    "correct": int(answer) == label,
                    "confidence": score.confidence[index],
                }
            else:
                sample |= {"prediction": answer, "answer": label, "correct": None}
            samples.append(sample)
        return samples


def samples_error() -> UserError:
    """Return the error of a samples file for a classifier."""
    return UserError(
        "answers of a classifier are scored as it gives them, not from a file",
        key="--samples",
        hint="score the run: wegeft eval RUN --task test; its samples file has each row",
    )


def check_splits(names: Sequence[str]) -> None:
    """Raise UserError if a name is no split of a classifier."""
    for name in names:
        if name not in SPLITS:
            raise UserError(
                f"{name!r} is no split of a classifier",
                key="--task",
                hint=f"name {' or '.join(SPLITS)}; only language models generate texts",
            )


def split_names(names: Sequence[str], request: EvaluationRequest) -> list[str]:
    """Return the splits to score: the names, or else the first split that exists."""
    return list(_find_splits(request.classifier.recipe, names, _data_dir(request)))


def _data_dir(request: EvaluationRequest) -> Path | None:
    folder = request.classifier.recipe.eval.data_dir
    return request.data_dir or (Path(folder) if folder else None)


def _load(name: str, request: EvaluationRequest) -> ClassificationBenchmark:
    """Load a split.

    Raises:
        UserError: If the split does not exist, or contains a class that the model does not know.
        ExceptionGroup: If several rows are at fault.
    """
    from wegeft_cli.tasks.support.classifier import choose_metric

    opened: LoadedModel = request.classifier
    head, recipe = opened.classifier()
    sources = _find_splits(recipe, [name], _data_dir(request))[name]
    rows, digest = _read_split(opened, sources, request.limit or recipe.eval.limit)
    return ClassificationBenchmark(name, rows, digest, head, choose_metric(recipe, head))


def _task_of(recipe: Recipe) -> ClassificationTask:
    task = find_task(recipe.task)
    return cast("ClassificationTask", task)


def _find_splits(
    recipe: Recipe, splits: Sequence[str], data_dir: Path | None
) -> dict[str, list[DataSource]]:
    """Return the sources of each split to score."""
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
    from wegeft_cli.data.sources.files import KINDS

    if not data_dir.is_dir():
        raise UserError(f"no such folder: {str(data_dir)!r}", key="--data-dir")
    # The recipe's image folder does not apply to another data folder.
    source = replace(like, name=None, limit=None, split=name, image_dir=None)
    for suffix in KINDS:
        file = data_dir / f"{name}{suffix}"
        if file.is_file():
            return [replace(source, path=str(file))]
    if (data_dir / name).is_dir():
        return [replace(source, path=str(data_dir))]
    return []


def _read_split(
    opened: LoadedModel, sources: Sequence[DataSource], limit: int | None
) -> tuple[ClassRows, str]:
    """Read a split's rows and their digest."""
    import torch

    from wegeft_cli.data.labelled.dataset import encode_rows, join_rows
    from wegeft_cli.data.labelled.labels import Labels
    from wegeft_cli.models.image_processor import check_images

    head, recipe = opened.classifier()
    labels = Labels(head.labels)
    task = _task_of(recipe)
    parts = []
    digests = []
    for source in sources:
        cut = source if limit is None else replace(source, limit=limit)
        rows = task.read_source(recipe, cut, None)
        tokenizer = task.tokenizer_of(opened.processor)
        parts.append(encode_rows(recipe, rows, labels, opened.model.config, tokenizer)[0])
        digests.append(rows.sha256 or rows.origin)
    joined = join_rows(parts)
    assert joined is not None
    if limit is not None:
        joined = joined.take(torch.arange(min(limit, len(joined))).numpy())
    if task.reads_images:
        raise_all(check_images(joined.shown))
    if len(digests) == 1:
        return joined, digests[0]
    return joined, hashlib.sha256("\n".join(digests).encode()).hexdigest()


FAMILY = BenchmarkFamily(
    "classification",
    lambda name: name if name in SPLITS else None,
    _load,
    scores_classifiers=True,
)
