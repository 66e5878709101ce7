"""Write one page about one or several runs, which opens from disk: `wegeft report`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wegeft_cli.analysis.inspect import inspect
from wegeft_cli.analysis.output_files import write_json
from wegeft_cli.artifacts.adapter_files import WEIGHTS_NAME
from wegeft_cli.artifacts.run_directory import RunDirectory, find_run, now
from wegeft_cli.artifacts.run_results import (
    RunRecord,
    add_evaluation,
    name_apart,
    read_run,
)
from wegeft_cli.artifacts.sweep_table import SweepTable, read_sweep
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.runs.bench.table import read_bench
from wegeft_cli.storage.atomic import check_output_file, write_text_atomic
from wegeft_cli.storage.json_files import read_object
from wegeft_cli.version import VERSION

INSPECTION_NAME = "inspection.json"
_RUN_OF_BENCH = re.compile(r"(?!\.)[^/]+/(?!\.)[^/]+")
_MARK = "<!doctype html>\n<!-- wegeft report -->"


@dataclass(frozen=True)
class ReportResult:
    """The page that was written.

    Args:
        output: The HTML file.
        num_bytes: Its size.
        runs: Names of the runs in it.
        num_answers: Answers that can be browsed.
        num_scores: Rows of evaluations.
        inspected: Names of the runs whose adapter was inspected.
    """

    output: Path
    num_bytes: int
    runs: list[str]
    num_answers: int
    num_scores: int
    inspected: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object with paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


@checked_arguments
def report(
    runs: Sequence[str | Path] = (),
    *,
    output: Path | None = None,
    title: str | None = None,
    evaluations: Sequence[str | Path] = (),
    look_inside: bool = True,
    max_samples: int = 500,
    reporter: Reporter | None = None,
) -> ReportResult:
    """Write one self-contained HTML page about one run, or several side by side.

    It holds recipe, counts, curves, scores with their intervals, base against tuned, the answers
    right and wrong, what `inspect` found, and the environment. It needs no network, and the text
    of samples is only displayed.

    Args:
        runs: Folders of training runs, or of sweeps and benches, which stand for their runs; none
            takes the newest finished run under runs/.
        output: The file; None is report.html in the folder of the run or the sweep, or beside the
            first of several.
        title: The page's title; None names the runs.
        evaluations: Files of `wegeft eval --output` outside of the runs' folders.
        look_inside: Include the result of `inspect`, which is stored in the run's folder as
            inspection.json and recomputed if the adapter is newer. Of a sweep only the best run
            is inspected.
        max_samples: Answers kept of each model, task and protocol, at least 0.
        reporter: Receives messages and progress.

    Returns:
        The page that was written.

    Raises:
        UserError: If a folder is no run's, the packages of `wegeft-cli[report]` are missing, or the
            existing file is not a report.
        MachineError: If the disk fails.
    """
    reporter = reporter or SilentReporter()
    if find_spec("vl_convert") is None:
        raise UserError(
            "a report needs the packages of the extra `report`",
            hint="pip install 'wegeft-cli[report]'",
        )
    if max_samples < 0:
        raise UserError(f"must be at least 0, got {max_samples}", key="--samples")
    benches = [each for path in runs if (each := read_bench(Path(path))) is not None]
    runs = [folder for path in runs for folder in _list_bench_runs(Path(path))]
    found = [(Path(path), read_sweep(Path(path))) for path in runs] or [(find_run(None), None)]
    sweeps = [sweep for _, sweep in found if sweep is not None]
    paths = [
        each
        for path, sweep in found
        for each in ([find_run(path)] if sweep is None else sweep.started)
    ]
    records = [read_run(path, max_samples=max_samples, num_runs=len(paths)) for path in paths]
    if len({record.run_dir.resolve() for record in records}) < len(records):
        raise UserError("names a run twice", key="RUN")
    for file in evaluations:
        add_evaluation(records, Path(file), max_samples=max_samples)
    for record in records:
        if any(is_of_bench(record.run_dir, each) for each in benches):
            record.name = f"{record.run_dir.parent.name}/{record.name}"
    name_apart(records)
    first = sweeps[0].folder if len(found) == len(sweeps) == 1 else records[0].run_dir
    folder = first if len(found) == 1 else first.parent
    if len(benches) == 1 and all(is_of_bench(r.run_dir, benches[0]) for r in records):
        folder = Path(benches[0]["folder"])
    output = output or folder / "report.html"
    check_output_file(output, _MARK, "report", "report.html")
    # To inspect a run reads its base's weights: of a sweep only the best run is inspected.
    omitted = {path for sweep in sweeps for path in sweep.started[1:]}
    for each in benches:
        omitted |= {r.run_dir for r in records[1:] if is_of_bench(r.run_dir, each)}
    for record in records:
        if record.run_dir not in omitted:
            _add_inspection(record, look_inside, reporter)

    from wegeft_cli.analysis.report_page.render import render_page

    text = render_page(
        [_as_values(record) for record in records],
        sweeps=sweeps,
        benches=benches,
        title=title or "Report: " + ", ".join(_name_all(found, records)),
        made=f"wegeft-cli {VERSION}, {now()[:16].replace('T', ' ')} UTC",
        mark=_MARK,
    )
    write_text_atomic(output, text)
    return ReportResult(
        output=output,
        num_bytes=len(text.encode()),
        runs=[record.name for record in records],
        num_answers=sum(len(record.answers) for record in records),
        num_scores=sum(len(record.scores) for record in records),
        inspected=[record.name for record in records if record.inspection is not None],
    )


def _list_bench_runs(folder: Path) -> list[Path]:
    """Return the finished seeds' runs of a bench's folder; the folder itself if it is not one's."""
    values = read_bench(folder)
    if values is None:
        return [folder]
    listed = [run for run in values["runs"] if isinstance(run, dict)]
    seeds = set(values.get("seeds") or ())
    names = [
        str(run.get("name"))
        for run in listed
        if run.get("status") == "finished" and (run.get("values") or {}).get("seed") in seeds
    ]
    # A name is `<method>/<run>`, and a file from elsewhere must not lead out of the folder.
    paths = [folder / name for name in names if _RUN_OF_BENCH.fullmatch(name)]
    started = [path for path in paths if RunDirectory(path).exists()]
    if not started:
        raise UserError(
            "no run of this bench has finished", file=str(folder), hint="start it: wegeft bench"
        )
    return started


def is_of_bench(run_dir: Path, bench: Mapping[str, Any]) -> bool:
    """Return whether a run's folder is one of a bench."""
    return run_dir.parent.parent == Path(bench["folder"])


def _name_all(
    found: Sequence[tuple[Path, SweepTable | None]], records: Sequence[RunRecord]
) -> list[str]:
    """Return the names of what the page is about: a sweep has one name for all of its runs."""
    names = [sweep.folder.resolve().name for _, sweep in found if sweep is not None]
    swept = {path for _, sweep in found if sweep is not None for path in sweep.started}
    return names + [record.name for record in records if record.run_dir not in swept]


def _as_values(record: RunRecord) -> dict[str, Any]:
    return {**record.__dict__, "run_dir": str(record.run_dir)}


def _add_inspection(record: RunRecord, look_inside: bool, reporter: Reporter) -> None:
    """Add the result of `inspect` to a run, or a note with the reason for its absence."""
    weights = RunDirectory(record.run_dir).adapter_dir / WEIGHTS_NAME
    if not look_inside:
        record.notes.append("The adapter was not looked into (--no-inspect).")
        return
    if not weights.is_file():
        record.notes.append("There is no adapter to look into.")
        return
    kept = record.run_dir / INSPECTION_NAME
    if kept.is_file() and kept.stat().st_mtime >= weights.stat().st_mtime:
        found = read_object(kept)
        if isinstance(found.get("modules"), list) and "cosines" in found:
            record.inspection = found
            return
    try:
        record.inspection = inspect(record.run_dir, reporter=reporter)
    except MachineError:
        raise
    except (UserError, ExceptionGroup) as fault:
        record.notes.append(f"The adapter could not be looked into: {fault}")
        reporter.warn(f"{record.name} is not inspected: {fault}")
        return
    write_json(kept, record.inspection)
