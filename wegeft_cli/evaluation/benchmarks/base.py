"""`Benchmark`: what `wegeft eval` and `train.eval_tasks` score.

A module of this package that defines `FAMILY`, a `BenchmarkFamily`, adds its benchmarks: they are
listed, found by name, and scored by every road. Module level of these files loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.distributed.separate_work import run_apart
from wegeft_cli.evaluation.response_cache import ResponseCache
from wegeft_cli.evaluation.score import Score
from wegeft_cli.recipe.schema import EvalSection

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationRequest:
    """What an evaluation asks for; None takes the recipe's setting, else the benchmark's own.

    Args:
        protocol: Prompt, decoding and scoring rules by name.
        data_dir: Folder with test sets.
        limit: Number of rows of each test set.
        batch_size: Prompts at a time.
        max_new_tokens: Longest answer in tokens.
        options: What only some families read, by the name of its option (`allow_leaky`, ...).
        settings: The `eval` section of the run's recipe, or its defaults. Its `limit` and
            `max_new_tokens` apply to the benchmarks that its `tasks` name.
        classifier: The loaded classifier, whose splits are scored.
    """

    protocol: str | None = None
    data_dir: Path | None = None
    limit: int | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: EvalSection = field(default_factory=EvalSection)
    classifier: Any = None

    @property
    def settings_dir(self) -> Path | None:
        """The recipe's `eval.data_dir`."""
        folder = self.settings.data_dir
        return None if folder is None else Path(folder).expanduser()

    def limits(self, *, is_named: bool) -> tuple[int | None, int | None]:
        """Return the number of rows and the longest answer of a benchmark.

        Args:
            is_named: Whether the recipe's `eval.tasks` names it.

        Returns:
            The number of rows and of new tokens; None for no limit of the request's.
        """
        limit = self.settings.limit if is_named else None
        length = self.settings.max_new_tokens if is_named else None
        return self.limit or limit, self.max_new_tokens or length


@dataclass(frozen=True)
class BenchmarkContext:
    """How a benchmark runs.

    Args:
        batch_size: Prompts at a time.
        processes: The processes that share the rows.
        title: Name of the model in messages: `base`, `target`, `adapter`, ...
        cache: Stores the answers, so that an interrupted evaluation resumes.
        on_progress: Called with (rows done, rows in all).
        warn: Called with what the user must know to read the score.
        check_stop: Called between two batches, on all processes at the same place; may raise.
            Default: answers are generated in one call of the engine.
        in_lockstep: Whether every forward pass needs all processes (a sharded base).
    """

    batch_size: int
    processes: Processes = field(default_factory=Processes.single)
    title: str = "model"
    cache: ResponseCache | None = None
    on_progress: Callable[[int, int], None] = lambda done, total: None
    warn: Callable[[str], None] = lambda text: None
    check_stop: Callable[[], None] | None = None
    in_lockstep: bool = False

    def run_apart(self, work: Callable[[Callable[[], None]], T]) -> T:
        """Run work of any duration on this process apart from the others; see `run_apart`."""
        return run_apart(self.processes, work, self.check_stop)


class Benchmark(Protocol):
    """A test set and the protocol that scores it, loaded."""

    @property
    def name(self) -> str:
        """The benchmark's name in the results."""
        ...

    @property
    def protocol_name(self) -> str:
        """The protocol's name in the results; scores of different ones are never comparable."""
        ...

    @property
    def num_examples(self) -> int:
        """Number of answers, for the progress bar."""
        ...

    def cache_key(self) -> Mapping[str, Any]:
        """Return everything that the answers depend on besides the model, as JSON values.

        Cached answers are reused if and only if this is equal.
        """
        ...

    def run(self, model: Any, context: BenchmarkContext) -> Score:
        """Score a model. All processes call this; each returns the whole score.

        Args:
            model: The loaded model.
            context: How to run.

        Returns:
            The score over all rows.
        """
        ...

    def score_file(self, path: Path) -> Score:
        """Score outputs from a file (`--samples`).

        Args:
            path: JSON Lines.

        Returns:
            The score.

        Raises:
            UserError: If the file does not answer every row once, or files cannot be scored.
        """
        ...


@dataclass(frozen=True)
class BenchmarkFamily:
    """Benchmarks that are loaded and scored alike.

    Args:
        name: Such as `text`.
        find_name: Returns the name of a benchmark as the results have it, given the name as typed;
            None if the family has no such benchmark.
        load: Reads the test set before any model is loaded. Raises UserError if it is missing.
        list_benchmarks: Returns dicts of name, file (under --data-dir), kind, ..., for
            `wegeft eval --list`.
        check_protocol: Raises UserError if a protocol does not score a benchmark. Called with the
            benchmark, the protocol, and whether the benchmark may not fall back on another one.
        check_training: Raises UserError if a benchmark cannot be scored during training. Called
            with the benchmark and the options.
        list_protocols: Returns dicts of name, description, ..., for `wegeft eval --list`.
        scores_classifiers: Whether the benchmarks are those of classifiers.
    """

    name: str
    find_name: Callable[[str], str | None]
    load: Callable[[str, EvaluationRequest], Benchmark]
    list_benchmarks: Callable[[], Sequence[dict[str, Any]]] = list
    check_protocol: Callable[[str, str, bool], None] = lambda name, protocol, must_fit: None
    check_training: Callable[[str, Mapping[str, Any]], None] = lambda name, options: None
    list_protocols: Callable[[], Sequence[dict[str, Any]]] = list
    scores_classifiers: bool = False
