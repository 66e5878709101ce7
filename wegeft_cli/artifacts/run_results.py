"""Results of finished runs: the table of a sweep, and a run's files for the report."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.errors import UserError
from wegeft_cli.statistics import wilson_interval
from wegeft_cli.storage.json_files import (
    is_number,
    read_object,
    read_object_lines,
)

SEED = "seed"
FINAL_LOSS = "final_loss"
BEST = "best_"
LOWER_IS_BETTER = "eval_loss"


@dataclass(frozen=True)
class RunOutcome:
    """One run of a sweep.

    Args:
        name: Name of its directory.
        values: Dotted key -> value.
        run_dir: Its directory.
        status: waiting, running, finished, failed or interrupted.
        error: Why it failed.
        num_steps: Optimizer steps in its metrics; 0 before the first line.
        figures: final_loss, best_<watched metric>, eval_loss and eval_<task> of the last
            validation, peak_memory_gib, and the seconds of its steps, as far as they are known.
    """

    name: str
    values: dict[str, Any]
    run_dir: Path
    status: str = "waiting"
    error: str | None = None
    num_steps: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as a JSON object."""
        return {**asdict(self), "run_dir": str(self.run_dir)}


@dataclass(frozen=True)
class Statistic:
    """A figure over the seeds of one combination.

    Args:
        mean: Arithmetic mean.
        std: Standard deviation with n - 1; None for one run.
        n: Number of runs with the figure.
    """

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class SweepRow:
    """One combination without its seed.

    Args:
        values: Dotted key -> value.
        num_runs: Number of seeds.
        num_finished: Number of seeds whose run has finished; the figures are of these runs.
        figures: Name -> statistic.
    """

    values: dict[str, Any]
    num_runs: int
    num_finished: int
    figures: dict[str, Statistic]


def read_outcome(before: RunOutcome, metric: str, status: str, error: str | None) -> RunOutcome:
    """Return a run with the figures in its directory; `metric` is eval_loss or `eval_<task>`."""
    directory = RunDirectory(before.run_dir)
    lines = directory.metrics()
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if any(key.startswith("eval_") for key in line)]
    figures: dict[str, Any] = {}
    if steps:
        final = directory.record().get(FINAL_LOSS)
        figures[FINAL_LOSS] = final if status == "finished" else steps[-1]["loss"]
    watched = [line[metric] for line in validations if is_number(line.get(metric))]
    if watched:
        figures[BEST + metric] = min(watched) if metric == LOWER_IS_BETTER else max(watched)
    if validations:
        figures.update({k: v for k, v in validations[-1].items() if k.startswith("eval_")})
    if steps:
        figures["peak_memory_gib"] = max(line.get("peak_memory_gib", 0.0) for line in steps)
        ends = [0, *(line["step"] for line in steps)]
        figures["seconds"] = math.fsum(
            line.get("step_seconds", 0.0) * (line["step"] - start)
            for start, line in zip(ends, steps, strict=False)
        )
    return RunOutcome(
        before.name,
        before.values,
        before.run_dir,
        status,
        error,
        steps[-1]["step"] if steps else 0,
        {name: float(value) for name, value in figures.items() if is_number(value)},
    )


def average(outcomes: Sequence[RunOutcome]) -> list[SweepRow]:
    """Average the runs that differ only in their seed, in the order of their first run."""
    groups: dict[str, list[RunOutcome]] = {}
    for outcome in outcomes:
        key = json.dumps({k: v for k, v in outcome.values.items() if k != SEED}, sort_keys=True)
        groups.setdefault(key, []).append(outcome)
    rows = []
    for members in groups.values():
        finished = [member for member in members if member.status == "finished"]
        names = dict.fromkeys(name for member in finished for name in member.figures)
        rows.append(
            SweepRow(
                values={k: v for k, v in members[0].values.items() if k != SEED},
                num_runs=len(members),
                num_finished=len(finished),
                figures={
                    name: describe_values([m.figures[name] for m in finished if name in m.figures])
                    for name in names
                },
            )
        )
    return rows


def find_best(rows: Sequence[SweepRow], metric: str) -> SweepRow | None:
    """Return the row with the best mean of the watched metric, of those whose runs all finished.

    None means that nothing was validated: training losses are not compared.
    """
    figure = BEST + metric
    whole = [row for row in rows if row.num_finished == row.num_runs and figure in row.figures]
    if not whole:
        return None
    sign = 1.0 if metric == LOWER_IS_BETTER else -1.0
    return min(whole, key=lambda row: sign * row.figures[figure].mean)


def describe_values(values: list[float]) -> Statistic:
    """Return mean, standard deviation and number of some values."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Statistic(statistics.fmean(values), std, len(values))


# The curves of a report, with the names of metrics.jsonl.
CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib")
_MAX_POINTS = 800  # of one curve; more lines are thinned evenly
_MAX_POINTS_OF_ALL, _MIN_POINTS = 8000, 100  # of one chart of many runs, and of each of its curves


@dataclass
class RunRecord:
    """The files of a run, for the report.

    Args:
        name: Name of its directory, see `name_apart`.
        run_dir: Its directory.
        run: Values of run.json.
        recipe: Text of recipe.yaml; empty without one.
        curves: Curve -> (step, value), thinned.
        validation: Metric -> (step, value).
        num_lines: Number of logged steps before thinning.
        scores: Rows of evaluations: task, protocol, model (base or tuned), n, num_correct, score,
            n_invalid, ci95, num_shown, source.
        answers: The answers of these, limited per row.
        samples: Answers during training: step, prompt, output.
        inspection: Result of `wegeft inspect`; None without one.
        ablations: Results of `wegeft inspect --ablate`.
        notes: Notes for the reader, such as why there is no inspection.
    """

    name: str
    run_dir: Path
    run: dict[str, Any]
    recipe: str
    curves: dict[str, list[tuple[int, float]]]
    validation: dict[str, list[tuple[int, float]]]
    num_lines: int
    scores: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    inspection: dict[str, Any] | None = None
    ablations: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(path: Path, *, max_samples: int, num_runs: int = 1) -> RunRecord:
    """Read a run's directory, or that of a folder in it, for the report of `num_runs` runs.

    `max_samples` answers are kept of each model, task and protocol. Raise UserError if `path` does
    not belong to a run.
    """
    limit = min(_MAX_POINTS, max(_MIN_POINTS, _MAX_POINTS_OF_ALL // num_runs))
    directory = RunDirectory.containing(path)
    if directory is None:
        what = "this folder holds no run.json" if path.is_dir() else "there is no such folder"
        raise UserError(what, file=str(path), hint="give the folder of a training run")
    lines = directory.metrics()
    steps = [line for line in lines if "loss" in line and is_number(line.get("step"))]
    others = [line for line in lines if "loss" not in line and is_number(line.get("step"))]
    metrics = dict.fromkeys(key for line in others for key in line if key not in ("step", "epoch"))
    record = RunRecord(
        name=directory.path.resolve().name,
        run_dir=directory.path,
        run=directory.record(),
        recipe=directory.recipe_text(),
        curves={name: _thin(_series(steps, name), limit) for name in CURVES},
        validation={name: _thin(_series(others, name), limit) for name in metrics},
        num_lines=len(steps),
        samples=directory.samples()[-max_samples:],
    )
    for file in directory.answer_paths():
        _add_answers(record, file, max_samples)
    for file in sorted(directory.path.glob("ablation*.json")):
        ablation = read_object(file)
        if isinstance(ablation.get("parts"), list) and isinstance(ablation.get("whole"), dict):
            record.ablations.append(ablation)
    return record


def add_evaluation(records: Sequence[RunRecord], file: Path, *, max_samples: int) -> None:
    """Add a result file of `wegeft eval --output` to the run that was evaluated.

    Raise UserError if the file holds no results, its samples are missing, or no run matches.
    """
    values = read_object(file)
    if not isinstance(values.get("results"), list):
        message = "holds no results of `wegeft eval --output`"
        raise UserError(message, file=str(file), key="--eval")
    target = Path(str(values.get("target"))).resolve()
    for record in records:
        run_dir = record.run_dir.resolve()
        if target != run_dir and run_dir not in target.parents:
            continue
        recorded = Path(str(values.get("samples_path")))
        candidates = (recorded, file.parent / recorded.name)
        samples = next((each for each in candidates if each.is_file()), None)
        if samples is None:
            raise UserError(
                f"its samples {str(recorded)!r} are missing", file=str(file), key="--eval"
            )
        _add_answers(record, samples, max_samples)
        return
    raise UserError(
        f"is of {str(values.get('target'))!r}, which is none of these runs",
        file=str(file),
        key="--eval",
    )


def name_apart(records: Sequence[RunRecord]) -> None:
    """Replace names that several runs share by the paths of their directories."""
    for record in records:
        same = [other for other in records if other.name == record.name and other is not record]
        if same:
            for other in (record, *same):
                other.name = str(other.run_dir)


def read_scores(answers: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Summarize answers by model, task and protocol, as `wegeft eval` does."""
    grouped: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for answer in answers:
        key = tuple(str(answer.get(name, "")) for name in ("task", "protocol", "model"))
        grouped.setdefault(key, []).append(answer)  # type: ignore[arg-type]
    rows = []
    for (task, protocol, model), members in grouped.items():
        num_correct, n = sum(bool(a["correct"]) for a in members), len(members)
        rows.append(
            {
                "task": task,
                "protocol": protocol,
                "model": model,
                "n": n,
                "num_correct": num_correct,
                "score": num_correct / n,
                "n_invalid": sum(not a.get("valid", True) for a in members),
                "ci95": list(wilson_interval(num_correct, n)),
                "source": source,
            }
        )
    return rows


def _add_answers(record: RunRecord, file: Path, max_samples: int) -> None:
    seen = {(row["task"], row["protocol"], row["model"]) for row in record.scores}
    answers = []
    for line in read_object_lines(file):
        if not isinstance(line.get("correct"), bool):
            continue
        model = "tuned" if line.get("model") == "target" else str(line.get("model", ""))
        if (line.get("task"), line.get("protocol"), model) in seen:
            model = f"{model} ({file.stem.removesuffix('-samples')})"  # evaluated a second time
        answers.append({**line, "model": model})
    counts: dict[tuple[Any, ...], int] = {}
    for row in read_scores(answers, file.name):
        row["num_shown"] = min(row["n"], max_samples)
        record.scores.append(row)
    for answer in answers:
        key = (answer.get("model"), answer.get("task"), answer.get("protocol"))
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= max_samples:
            record.answers.append({**answer, "source": file.name})


def _series(lines: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], float(line[name])) for line in lines if is_number(line.get(name))]


def _thin(points: list[tuple[int, float]], limit: int) -> list[tuple[int, float]]:
    """Keep at most `limit` points, evenly spaced, the first and the last included."""
    if len(points) <= limit:
        return points
    gap = (len(points) - 1) / (limit - 1)
    return [points[round(number * gap)] for number in range(limit)]
