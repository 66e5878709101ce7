"""`wegeft bench`: search a learning rate for each method, train its seeds, and compare.

Every run is an ordinary run folder, trained by the queue of `wegeft sweep`. This process loads
torch for the checks before the first run alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from wegeft_cli.artifacts.run_results import SEED
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.recipe.load import read_settings
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.runs.bench.checks import check_entries, choose_baseline, list_unchecked
from wegeft_cli.runs.bench.comparison_files import write_comparison
from wegeft_cli.runs.bench.contestants import (
    choose_search_seeds,
    load_entries,
    read_contestants,
    read_seeds,
)
from wegeft_cli.runs.bench.measures import figures_of
from wegeft_cli.runs.bench.plot import draw_bench
from wegeft_cli.runs.bench.result import BenchResult
from wegeft_cli.runs.bench.stages import BenchStages
from wegeft_cli.runs.bench.table import TABLE_NAME
from wegeft_cli.runs.children import check_runs, list_commands, list_places, refuse_launcher
from wegeft_cli.storage.atomic import remove_leftover_files, write_bytes_atomic, write_text_atomic
from wegeft_cli.storage.json_files import to_finite
from wegeft_cli.storage.lock import lock_folder

_PLOT_NAME = "bench.png"


@checked_arguments
def bench(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] = ("wegeft", "lora"),
    seeds: str = "3",
    search: Sequence[str] = (),
    search_seeds: int = 1,
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
        search_seeds: Number of seeds of each combination of the search, at least 1.
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
    tried = choose_search_seeds(first, numbers, search_seeds)
    entries = load_entries(recipe_path, overrides, contestants, tried)
    job = BenchStages(
        recipe_path,
        tuple(overrides),
        entries,
        numbers,
        tried,
        choose_baseline(baseline, labels),
        places,
        should_stop,
        reporter,
        _write,
    )
    check_entries(entries)
    firsts = [entry.searched.runs[0] for entry in entries]
    if not dry_run:
        firsts = list_unchecked(entries, job.output_dir)
    if firsts:
        from wegeft_cli.runs.train import train  # loads torch

        check_runs(firsts, train, reporter)
    if dry_run:
        return job.summarize("checked")
    with lock_folder(job.output_dir):
        remove_leftover_files(job.output_dir, (TABLE_NAME, _PLOT_NAME))
        if only_commands:
            job.prepare()
            return replace(job.summarize("listed"), commands=list_commands(job.outcomes))
        return _run(job)


def _read_seed(path: str | Path, overrides: Sequence[str]) -> int:
    """Return the recipe's seed; faults are raised where the recipe is built."""
    seed = read_settings(path, overrides).merged.values.get(SEED, Recipe.seed)
    return seed if isinstance(seed, int) else Recipe.seed


def _run(job: BenchStages) -> BenchResult:
    """Train and measure what is not finished, and write the table, the plot and PEFT's files."""
    status = "failed"
    try:
        status = job.train()
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        # The current runs have saved before this process sees an error.
        job.stop()
        _write(job.summarize(status))
    result = job.summarize(status)
    if any(row.seeds for row in result.methods):
        result = replace(
            result, plot=_draw(result, job.reporter), comparison_files=_write_comparison(job)
        )
    _write(result)
    return result


def _draw(result: BenchResult, reporter: Reporter) -> Path | None:
    picture = draw_bench(result.methods, result.metric, result.baseline)
    if picture is None:
        reporter.note("no bench.png without matplotlib: pip install 'wegeft-cli[plot]'")
        return None
    path = result.output_dir / _PLOT_NAME
    write_bytes_atomic(path, picture)
    return path


def _write_comparison(job: BenchStages) -> list[Path]:
    return [
        write_comparison(
            job.output_dir, outcome, run.loaded.recipe, figures_of(outcome, run.loaded.recipe)
        )
        for entry in job.entries
        for run, outcome in job.finished(entry.contestant.label)
    ]


def _write(result: BenchResult) -> None:
    text = json.dumps(to_finite(result.to_json()), indent=2, allow_nan=False) + "\n"
    write_text_atomic(result.output_dir / TABLE_NAME, text)
