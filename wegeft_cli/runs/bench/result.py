"""How a bench ended: the content of bench.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wegeft_cli.artifacts.run_results import RunOutcome
    from wegeft_cli.runs.bench.table import BenchRow


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
        search_seeds: Seeds of the search's runs; none without a search.
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
    search_seeds: list[int]
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
            "search_seed": self.search_seeds[0] if self.search_seeds else None,
            "search_seeds": self.search_seeds,
            "jobs": self.jobs,
            "methods": [asdict(row) for row in self.methods],
            "runs": [run.to_json() for run in self.runs],
            "commands": self.commands,
            "plot": None if self.plot is None else str(self.plot),
            "comparison_files": [str(path) for path in self.comparison_files],
        }
