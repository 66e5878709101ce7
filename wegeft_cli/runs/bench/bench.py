"""`wegeft bench`: search a learning rate for each method, train its seeds, and compare.

Every run is an ordinary run folder, trained by the queue of `wegeft sweep`. This process loads
torch for the checks before the first run alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.artifacts.run_results import SEED, RunOutcome
from wegeft_cli.errors import UserError
from wegeft_cli.planning.validate import check_all_names
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.recipe.load import read_settings
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.sweep import SweepRun
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.runs.bench.comparison_files import write_comparison
from wegeft_cli.runs.bench.contestants import (
    Entry,
    choose_search_seed,
    load_entries,
    load_seeds,
    read_contestants,
    read_seeds,
)
from wegeft_cli.runs.bench.measures import (
    describe_data,
    evaluate_run,
    figures_of,
    list_eval_words,
    merge_run,
    validation_loss,
)
from wegeft_cli.runs.bench.plot import draw_bench
from wegeft_cli.runs.bench.table import (
    TABLE_NAME,
    BenchRow,
    Candidate,
    choose_metric,
    complete,
    find_best,
    note_edges,
)
from wegeft_cli.runs.children import (
    RunQueue,
    check_recipes,
    check_runs,
    list_commands,
    list_outcomes,
    list_places,
    refuse_launcher,
)
from wegeft_cli.storage.atomic import remove_leftover_files, write_bytes_atomic, write_text_atomic
from wegeft_cli.storage.json_files import to_finite
from wegeft_cli.storage.lock import lock_folder

_PLOT_NAME = "bench.png"
_DEFAULT_BASELINE = "lora"


@dataclass(frozen=True)
class BenchResult:
    """How a bench ended.

    Args:
        recipe: The recipe's file.
        output_dir: The folder of bench.json, of bench.png and of each method's runs.
        status: finished, failed (some runs did), interrupted, checked (a dry run), or listed.
        metric: The compared figure: score, or validation_loss.
        baseline: The method that ratios and tests refer to.
        seeds: Seeds of the table.
        search_seed: Seed of the search's runs; None without a search.
        jobs: Runs that trained at the same time.
        methods: One row per method.
        runs: Every run.
        commands: Commands that train what is left, if they were asked for.
        plot: The plot; None without one.
        comparison_files: Results in the form of PEFT's method comparison.
    """

    recipe: Path
    output_dir: Path
    status: str
    metric: str
    baseline: str
    seeds: list[int]
    search_seed: int | None
    jobs: int
    methods: list[BenchRow]
    runs: list[RunOutcome]
    commands: list[str] = field(default_factory=list)
    plot: Path | None = None
    comparison_files: list[Path] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object, the content of bench.json."""
        return {
            **{name: getattr(self, name) for name in ("status", "metric", "baseline", "seeds")},
            "recipe": str(self.recipe),
            "output_dir": str(self.output_dir),
            "search_seed": self.search_seed,
            "jobs": self.jobs,
            "methods": [asdict(row) for row in self.methods],
            "runs": [run.to_json() for run in self.runs],
            "commands": self.commands,
            "plot": None if self.plot is None else str(self.plot),
            "comparison_files": [str(path) for path in self.comparison_files],
        }


@checked_arguments
def bench(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] = ("wegeft", "lora"),
    seeds: str = "3",
    search: Sequence[str] = (),
    settings: Sequence[str] = (),
    baseline: str | None = None,
    jobs: int = 1,
    dry_run: bool = False,
    only_commands: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    reporter: Reporter | None = None,
) -> BenchResult:
    """Compare methods on the same data, batches, steps and evaluation.

    Each combination of the search is trained once with one seed, and the lowest validation loss
    decides. Finished runs are not repeated, and an interrupted one is resumed. A run that fails is
    recorded, and the others continue.

    Args:
        recipe_path: A recipe file, or the name of a shipped one.
        overrides: `key=value` texts that win over the file, for all methods.
        methods: Values of `adapter.type`, or `LABEL=TYPE`.
        seeds: A number of seeds from the recipe's on, or seeds such as `42,43,44`.
        search: `KEY=VALUE,VALUE,...` for all methods, or `LABEL:KEY=...`. Default: the recipe's
            `sweep`.
        settings: `LABEL:KEY=VALUE` for one method.
        baseline: The method of ratios and tests. Default: lora, else the first one.
        jobs: Number of runs at the same time, one device each.
        dry_run: Check each method as far as is cheap, and train nothing.
        only_commands: Write the recipes of the runs that can start now, and list their commands.
        should_stop: Polled several times a second; true lets the current runs save, and returns.
        reporter: Receives messages and progress.

    Returns:
        The result, which `<output_dir>/bench.json` holds and bench.png plots.

    Raises:
        UserError: If an argument or a recipe is invalid, or a method does not fit the task or base.
        ExceptionGroup: If there are several such faults.
        MachineError: If this process cannot write; errors of runs are recorded instead.
    """
    reporter = reporter or SilentReporter()
    refuse_launcher("a bench")
    contestants = read_contestants(methods, settings, search)
    labels = [contestant.label for contestant in contestants]
    places = list_places(jobs)
    first = _read_seed(recipe_path, overrides)
    numbers = read_seeds(seeds, first)
    search_seed = choose_search_seed(first, numbers)
    entries = load_entries(recipe_path, overrides, contestants, search_seed)
    job = _Bench(
        recipe_path,
        tuple(overrides),
        entries,
        numbers,
        search_seed,
        _choose_baseline(baseline, labels),
        places,
        should_stop,
        reporter,
    )
    job.check(dry_run=dry_run)
    if dry_run:
        return job.summarize("checked")
    with lock_folder(job.output_dir):
        remove_leftover_files(job.output_dir, (TABLE_NAME, _PLOT_NAME))
        if only_commands:
            return job.list_commands()
        return job.run()


def _read_seed(path: str | Path, overrides: Sequence[str]) -> int:
    """Return the recipe's seed; faults are raised where the recipe is built."""
    seed = read_settings(path, overrides).merged.values.get(SEED, Recipe.seed)
    return seed if isinstance(seed, int) else Recipe.seed


def check_unseen(recipe: Recipe) -> None:
    """Refuse test sets that a training run would score: a checkpoint or a value could fit them."""
    watched = recipe.train.metric_for_best_model.removeprefix("eval_")
    seen = {*recipe.train.eval_tasks, watched} & set(recipe.eval.tasks)
    if seen:
        raise UserError(
            f"scores {', '.join(sorted(seen))} in training, which the bench scores at the end",
            key="train.eval_tasks",
            hint="remove it there, or from `eval.tasks`",
        )


def _choose_baseline(asked: str | None, labels: Sequence[str]) -> str:
    if asked is None:
        return _DEFAULT_BASELINE if _DEFAULT_BASELINE in labels else labels[0]
    if asked not in labels:
        hint = f"one of {', '.join(labels)}"
        raise UserError(f"{asked!r} is none of --methods", key="--baseline", hint=hint)
    return asked


@dataclass
class _Bench:
    """The runs of a bench in the order of its two stages, the search and the seeds."""

    path: str | Path
    overrides: tuple[str, ...]
    entries: Sequence[Entry]
    seeds: list[int]
    search_seed: int
    baseline: str
    places: Sequence[Mapping[str, str]]
    should_stop: Callable[[], bool]
    reporter: Reporter

    def __post_init__(self) -> None:
        self.output_dir = Path(self.entries[0].searched.base.recipe.output_dir).expanduser()
        self.has_search = any(entry.has_search for entry in self.entries)
        self.searching = [
            run for entry in self.entries if entry.has_search for run in entry.searched.runs
        ]
        self.search_outcomes = list_outcomes(self.searching)
        self.seeded: dict[str, list[SweepRun]] = {}
        self.seed_outcomes: list[RunOutcome] = []
        self.notes: dict[str, list[str]] = {entry.contestant.label: [] for entry in self.entries}
        self.has_faults = False

    def check(self, *, dry_run: bool) -> None:
        """Check recipes, names, validation rows, and on this machine every method that is left."""
        for entry in self.entries:
            label = entry.contestant.label
            self.notes[label] += list(entry.searched.runs[0].loaded.notes)
            for note in self.notes[label]:
                self.reporter.note(f"{label}: {note}")
        check_all_names(run.loaded for entry in self.entries for run in entry.searched.runs)
        recipe = self.entries[0].recipe
        has_rows = bool(recipe.data.validation) or recipe.data.validation_fraction > 0
        hint = "set `data.validation` or `data.validation_fraction`"
        if not has_rows and self.has_search:
            raise UserError(
                "chooses by validation loss, and the recipe has no validation rows",
                key="--search",
                hint=hint,
            )
        if not has_rows and not list_eval_words(recipe):
            raise UserError(
                "the recipe has neither validation rows nor test sets to compare methods on",
                key="data.validation",
                hint=f"{hint}, or `eval.tasks`",
            )
        check_unseen(recipe)
        self._check_recipes(self.searching)
        firsts = [
            entry.searched.runs[0]
            for entry in self.entries
            if dry_run or not self._is_started(entry)
        ]
        if firsts:
            from wegeft_cli.runs.train import train  # loads torch

            check_runs(firsts, train, self.reporter)

    def _is_started(self, entry: Entry) -> bool:
        """Return whether a run of a method has passed its checks before."""
        folder = self.output_dir / entry.contestant.label
        return any(RunDirectory(path.parent).exists() for path in folder.glob("*/run.json"))

    def _check_recipes(self, runs: Sequence[SweepRun]) -> None:
        outcomes = list_outcomes(runs)
        check_recipes([(run.loaded, o.run_dir) for run, o in zip(runs, outcomes, strict=True)])

    def list_commands(self) -> BenchResult:
        """Write the recipes of the runs that can start now and return their commands."""
        search = self._queue(self.searching, self.search_outcomes)
        search.prepare()
        if all(outcome.status == "finished" for outcome in self.search_outcomes):
            self._load_seeds()
            self._queue(self._seed_runs(), self.seed_outcomes).prepare()
        return replace(self.summarize("listed"), commands=list_commands(self._outcomes()))

    def run(self) -> BenchResult:
        """Train and measure what is not finished, and write the table."""
        status = "failed"
        try:
            status = self._train_stages()
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            # The current runs have saved before this process sees an error.
            for outcomes in (self.search_outcomes, self.seed_outcomes):
                outcomes[:] = [
                    replace(o, status="interrupted") if o.status == "running" else o
                    for o in outcomes
                ]
            self._write(self.summarize(status))
        result = self.summarize(status)
        if any(row.seeds for row in result.methods):
            result = replace(
                result, plot=self._draw(result), comparison_files=self._write_comparison()
            )
        self._write(result)
        return result

    def _train_stages(self) -> str:
        search = self._queue(self.searching, self.search_outcomes)
        search.prepare()
        if search.train(self.should_stop) == "interrupted":
            return "interrupted"
        self._load_seeds()
        table = self._queue(self._seed_runs(), self.seed_outcomes)
        table.prepare()
        if table.train(self.should_stop) == "interrupted" or self._measure() == "interrupted":
            return "interrupted"
        self._compare_data()
        is_whole = all(self.seeded.values()) and not self.has_faults
        all_ended = all(o.status == "finished" for o in self._outcomes())
        return "finished" if all_ended and is_whole else "failed"

    def _load_seeds(self) -> None:
        """Choose each method's values by the search, and load the runs of its seeds."""
        for entry in self.entries:
            label = entry.contestant.label
            best = self._find_best(entry)
            if best is None:
                self.notes[label].append("no run of the search has finished with a validation loss")
                self.seeded[label] = []
                continue
            if entry.has_search:
                self.notes[label] += note_edges(self._candidates(entry), best)
            self.seeded[label] = load_seeds(
                self.path, self.overrides, entry, best.values, self.seeds
            )
        self._check_recipes(self._seed_runs())
        self.seed_outcomes = list_outcomes(self._seed_runs())

    def _find_best(self, entry: Entry) -> Candidate | None:
        candidates = self._candidates(entry)
        return find_best(candidates) if entry.has_search else candidates[0]

    def _candidates(self, entry: Entry) -> list[Candidate]:
        outcomes = {outcome.name: outcome for outcome in self.search_outcomes}
        found = []
        for run in entry.searched.runs:
            values = {key: value for key, value in run.values.items() if key != SEED}
            outcome = outcomes.get(run.name)
            if outcome is None:
                found.append(Candidate(values, "waiting"))
                continue
            loss = validation_loss(outcome, run.loaded.recipe)
            found.append(Candidate(values, outcome.status, loss, outcome.error))
        return found

    def _seed_runs(self) -> list[SweepRun]:
        return [run for runs in self.seeded.values() for run in runs]

    def _outcomes(self) -> list[RunOutcome]:
        return [*self.search_outcomes, *self.seed_outcomes]

    def _queue(self, runs: Sequence[SweepRun], outcomes: list[RunOutcome]) -> RunQueue:
        def on_change() -> None:
            self._write(self.summarize("running"))

        return RunQueue(runs, outcomes, on_change, self.reporter, self.places)

    def _finished(self, label: str) -> Iterator[tuple[SweepRun, RunOutcome]]:
        """Yield the finished runs of a method's seeds."""
        outcomes = {outcome.name: outcome for outcome in self.seed_outcomes}
        for run in self.seeded.get(label, ()):
            if outcomes[run.name].status == "finished":
                yield run, outcomes[run.name]

    def _measure(self) -> str:
        """Score every finished run, and merge the first one of each method."""
        for entry in self.entries:
            label = entry.contestant.label
            for number, (run, outcome) in enumerate(self._finished(label)):
                if self.should_stop():
                    return "interrupted"
                run_dir, recipe = outcome.run_dir, run.loaded.recipe
                self.reporter.note(f"measuring {run.name}")
                end = evaluate_run(run_dir, recipe, self.should_stop)
                if end.status == "failed":
                    self._add_fault(label, f"{run.name} is not evaluated: {end.error}")
                if end.status != "interrupted" and number == 0:
                    end = merge_run(run_dir, self.should_stop)
                    if end.status == "failed":
                        self.notes[label].append(f"not merged: {end.error}")
                if end.status == "interrupted":
                    return "interrupted"
        return "finished"

    def _compare_data(self) -> None:
        """Record the runs whose rows, steps or learned tokens differ from the first run's."""
        first: tuple[str, Mapping[str, Any]] | None = None
        for entry in self.entries:
            label = entry.contestant.label
            for _, outcome in self._finished(label):
                data = describe_data(outcome.run_dir)
                if first is None:
                    first = outcome.name, data
                elif data != first[1]:
                    what = ", ".join(key for key in data if data[key] != first[1].get(key))
                    self._add_fault(label, f"{outcome.name} had other rows than {first[0]}: {what}")

    def _add_fault(self, label: str, text: str) -> None:
        self.has_faults = True
        self.notes[label].append(text)
        self.reporter.warn(text)

    def summarize(self, status: str) -> BenchResult:
        """Return the result as far as the runs are."""
        rows = [self._row(entry) for entry in self.entries]
        metric = choose_metric(rows)
        baseline = next((row for row in rows if row.method == self.baseline), None)
        return BenchResult(
            recipe=self.entries[0].searched.base.path,
            output_dir=self.output_dir,
            status=status,
            metric=metric,
            baseline=self.baseline,
            seeds=self.seeds,
            search_seed=self.search_seed if self.has_search else None,
            jobs=len(self.places),
            methods=[complete(row, baseline, metric) for row in rows],
            runs=self._outcomes(),
        )

    def _row(self, entry: Entry) -> BenchRow:
        label = entry.contestant.label
        failed = [o for o in self._outcomes() if o.status == "failed"]
        best = self._find_best(entry)
        return BenchRow(
            method=label,
            type=entry.contestant.type,
            settings=list(entry.contestant.settings),
            values={} if best is None or not entry.has_search else best.values,
            searched=self._candidates(entry) if entry.has_search else [],
            seeds={
                run.values[SEED]: figures_of(outcome, run.loaded.recipe)
                for run, outcome in self._finished(label)
            },
            num_seeds=len(self.seeds),
            notes=[
                *self.notes[label],
                *(
                    f"{outcome.name} failed: {outcome.error}"
                    for outcome in failed
                    if outcome.name.startswith(f"{label}/")
                ),
            ],
        )

    def _draw(self, result: BenchResult) -> Path | None:
        picture = draw_bench(result.methods, result.metric, result.baseline)
        if picture is None:
            self.reporter.note("no bench.png without matplotlib: pip install 'wegeft-cli[plot]'")
            return None
        path = self.output_dir / _PLOT_NAME
        write_bytes_atomic(path, picture)
        return path

    def _write_comparison(self) -> list[Path]:
        return [
            write_comparison(
                self.output_dir,
                outcome,
                run.loaded.recipe,
                figures_of(outcome, run.loaded.recipe),
            )
            for entry in self.entries
            for run, outcome in self._finished(entry.contestant.label)
        ]

    def _write(self, result: BenchResult) -> None:
        text = json.dumps(to_finite(result.to_json()), indent=2, allow_nan=False) + "\n"
        write_text_atomic(self.output_dir / TABLE_NAME, text)
