"""The two stages of a bench, the search and the seeds, and the measures of their runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_results import SEED, RunOutcome
from wegeft_cli.recipe.sweep import SweepRun
from wegeft_cli.reporter import Reporter
from wegeft_cli.runs.bench.contestants import Entry, load_seeds
from wegeft_cli.runs.bench.measures import (
    describe_data,
    evaluate_run,
    figures_of,
    merge_run,
    validation_loss,
)
from wegeft_cli.runs.bench.result import BenchResult
from wegeft_cli.runs.bench.table import (
    BenchRow,
    Candidate,
    choose_metric,
    complete,
    find_best,
    join_seeds,
    note_edges,
)
from wegeft_cli.runs.children import RunQueue, check_recipes, list_outcomes


@dataclass
class BenchStages:
    """The runs of a bench, and how far each is.

    Args:
        path: The recipe's file, or the name of a shipped one.
        overrides: Overrides for all methods.
        entries: The methods.
        seeds: Seeds of the table.
        search_seeds: Seeds of the search.
        baseline: Label of the method of ratios and tests.
        places: Environment variables of the runs that train at the same time.
        should_stop: Polled several times a second; true lets the current runs save.
        reporter: Receives messages and progress.
        on_change: Called with the result when a run has started.
    """

    path: str | Path
    overrides: tuple[str, ...]
    entries: Sequence[Entry]
    seeds: list[int]
    search_seeds: list[int]
    baseline: str
    places: Sequence[Mapping[str, str]]
    should_stop: Callable[[], bool]
    reporter: Reporter
    on_change: Callable[[BenchResult], None]

    def __post_init__(self) -> None:
        self.output_dir = Path(self.entries[0].searched.base.recipe.output_dir).expanduser()
        self._searching = [
            run for entry in self.entries if entry.has_search for run in entry.searched.runs
        ]
        self._search_outcomes = list_outcomes(self._searching)
        self._seeded: dict[str, list[SweepRun]] = {}
        self._seed_outcomes: list[RunOutcome] = []
        self._notes: dict[str, list[str]] = {
            entry.contestant.label: list(entry.searched.runs[0].loaded.notes)
            for entry in self.entries
        }
        self._has_faults = False
        for label, notes in self._notes.items():
            for note in notes:
                self.reporter.note(f"{label}: {note}")

    @property
    def outcomes(self) -> list[RunOutcome]:
        """Every run that is known so far."""
        return [*self._search_outcomes, *self._seed_outcomes]

    def prepare(self) -> None:
        """Write the recipes of the runs that can start now."""
        self._queue("search", self._searching, self._search_outcomes).prepare()
        if all(outcome.status == "finished" for outcome in self._search_outcomes):
            self._load_seeds()
            self._queue("seeds", self._seed_runs(), self._seed_outcomes).prepare()

    def train(self) -> str:
        """Train and measure what is not finished; return finished, failed or interrupted."""
        search = self._queue("search", self._searching, self._search_outcomes)
        search.prepare()
        if search.train(self.should_stop) == "interrupted":
            return "interrupted"
        self._load_seeds()
        table = self._queue("seeds", self._seed_runs(), self._seed_outcomes)
        table.prepare()
        if table.train(self.should_stop) == "interrupted" or self._measure() == "interrupted":
            return "interrupted"
        self._compare_data()
        is_whole = all(self._seeded.values()) and not self._has_faults
        all_ended = all(outcome.status == "finished" for outcome in self.outcomes)
        return "finished" if all_ended and is_whole else "failed"

    def stop(self) -> None:
        """Record the current runs, which have saved, as interrupted."""
        for outcomes in (self._search_outcomes, self._seed_outcomes):
            outcomes[:] = [
                replace(o, status="interrupted") if o.status == "running" else o for o in outcomes
            ]

    def finished(self, label: str) -> Iterator[tuple[SweepRun, RunOutcome]]:
        """Yield the finished runs of a method's seeds."""
        outcomes = {outcome.name: outcome for outcome in self._seed_outcomes}
        for run in self._seeded.get(label, ()):
            if outcomes[run.name].status == "finished":
                yield run, outcomes[run.name]

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
            search_seeds=self.search_seeds if self._searching else [],
            jobs=len(self.places),
            methods=[complete(row, baseline, metric) for row in rows],
            runs=self.outcomes,
        )

    def _queue(self, title: str, runs: Sequence[SweepRun], outcomes: list[RunOutcome]) -> RunQueue:
        def on_change() -> None:
            self.on_change(self.summarize("running"))

        return RunQueue(runs, outcomes, on_change, self.reporter, self.places, title)

    def _load_seeds(self) -> None:
        """Choose each method's values by the search, and load the runs of its seeds."""
        for entry in self.entries:
            label = entry.contestant.label
            best = self._find_best(entry)
            if best is None:
                self._notes[label].append(
                    "no run of the search has finished with a validation loss"
                )
                self._seeded[label] = []
                continue
            if entry.has_search:
                values = ", ".join(f"{key}={value}" for key, value in best.values.items())
                loss = f"validation loss {best.validation_loss:.4f}"
                self.reporter.note(f"{label}: the search chooses {values} ({loss})")
                self._notes[label] += note_edges(self._candidates(entry), best)
            self._seeded[label] = load_seeds(
                self.path, self.overrides, entry, best.values, self.seeds
            )
        check_recipes(self._seed_runs())
        self._seed_outcomes = list_outcomes(self._seed_runs())

    def _seed_runs(self) -> list[SweepRun]:
        return [run for runs in self._seeded.values() for run in runs]

    def _find_best(self, entry: Entry) -> Candidate | None:
        candidates = self._candidates(entry)
        return find_best(candidates) if entry.has_search else candidates[0]

    def _candidates(self, entry: Entry) -> list[Candidate]:
        outcomes = {outcome.name: outcome for outcome in self._search_outcomes}
        found = []
        for values, runs in entry.combinations:
            ended = [outcomes[run.name] for run in runs if run.name in outcomes]
            losses = [
                validation_loss(outcome, run.loaded.recipe)
                for run, outcome in zip(runs, ended, strict=False)
            ]
            found.append(join_seeds(values, ended, losses))
        return found

    def _measure(self) -> str:
        """Score every finished run, and merge the first one of each method."""
        for entry in self.entries:
            label = entry.contestant.label
            for number, (run, outcome) in enumerate(self.finished(label)):
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
                        self._notes[label].append(f"not merged: {end.error}")
                if end.status == "interrupted":
                    return "interrupted"
        return "finished"

    def _compare_data(self) -> None:
        """Record the runs whose rows, steps or learned tokens differ from the first run's."""
        first: tuple[str, Mapping[str, Any]] | None = None
        for entry in self.entries:
            label = entry.contestant.label
            for _, outcome in self.finished(label):
                data = describe_data(outcome.run_dir)
                if first is None:
                    first = outcome.name, data
                elif data != first[1]:
                    what = ", ".join(key for key in data if data[key] != first[1].get(key))
                    self._add_fault(label, f"{outcome.name} had other rows than {first[0]}: {what}")

    def _add_fault(self, label: str, text: str) -> None:
        self._has_faults = True
        self._notes[label].append(text)
        self.reporter.warn(text)

    def _row(self, entry: Entry) -> BenchRow:
        label = entry.contestant.label
        failed = [o for o in self.outcomes if o.status == "failed"]
        best = self._find_best(entry)
        return BenchRow(
            method=label,
            type=entry.contestant.type,
            settings=list(entry.contestant.settings),
            values={} if best is None or not entry.has_search else best.values,
            searched=self._candidates(entry) if entry.has_search else [],
            seeds={
                run.values[SEED]: figures_of(outcome, run.loaded.recipe)
                for run, outcome in self.finished(label)
            },
            num_seeds=len(self.seeds),
            notes=[
                *self._notes[label],
                *(
                    f"{outcome.name} failed: {outcome.error}"
                    for outcome in failed
                    if outcome.name.startswith(f"{label}/")
                ),
            ],
        )
