"""Runs families in forked children, one JSON file each, and draws the table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from families.names import FAMILIES
from families.outcomes import FAILED, OK, REFUSED

SIGNS = {OK: "ok", REFUSED: "refused", FAILED: "FAILED"}
Row = dict[str, Any]


def list_families(names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return (task, family) of every family, or of those named `family` or `task/family`."""
    every = [(task, name) for task, found in FAMILIES.items() for name in found]
    if not names:
        return every
    chosen = [(task, name) for task, name in every if name in names or f"{task}/{name}" in names]
    unknown = {*names} - {name for _, name in chosen} - {f"{t}/{n}" for t, n in chosen}
    if unknown:
        raise SystemExit(f"no such family: {', '.join(sorted(unknown))}")
    return chosen


def run_matrix(
    families: Sequence[tuple[str, str]], folder: Path, *, jobs: int, limit: float
) -> None:
    """Run the families that have no file in `folder` yet."""
    from families.stages import run_stages

    folder.mkdir(parents=True, exist_ok=True)
    waiting = [
        (task, name) for task, name in families if not _row_file(folder, task, name).is_file()
    ]
    running: dict[int, tuple[str, str, float]] = {}
    if waiting:
        _warm_up(run_stages)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task, name = waiting.pop(0)
                child = os.fork()
                if child == 0:
                    _run_child(task, name, folder, run_stages)
                running[child] = (task, name, time.monotonic())
            _collect(running, folder, limit)
            time.sleep(0.05)
    finally:
        for child in running:  # only after an exception
            os.kill(child, signal.SIGKILL)


def _warm_up(run_stages: Any) -> None:
    """Import, before the first fork, what the stages import: each child would take seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run_stages("causal_lm", "llama", Path(folder) / "family")


def _row_file(folder: Path, task: str, name: str) -> Path:
    return folder / f"{task}.{name}.json"


def _run_child(task: str, name: str, folder: Path, run_stages: Any) -> None:
    """Run the stages of a family in this process, write its row, and end the process."""
    os.setsid()
    place = Path(tempfile.mkdtemp(prefix="family-"))
    log = (folder / f"{task}.{name}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    code = 1
    try:
        start = time.monotonic()
        stages = run_stages(task, name, place)
        _write_row(folder, task, name, stages, time.monotonic() - start)
        code = 0
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os._exit(code)


def _write_row(folder: Path, task: str, name: str, stages: Row, seconds: float) -> None:
    row = {"task": task, "name": name, "stages": stages, "seconds": round(seconds, 1)}
    file = _row_file(folder, task, name)
    file.with_suffix(".tmp").write_text(json.dumps(row, indent=1), encoding="utf-8")
    file.with_suffix(".tmp").replace(file)


def _collect(running: dict[int, tuple[str, str, float]], folder: Path, limit: float) -> None:
    """Reap children; a crash or a time limit becomes the family's row."""
    for child, (task, name, start) in list(running.items()):
        ended, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if ended == 0 and seconds > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            _write_crash(folder, task, name, f"stopped after {limit:.0f} s", seconds)
        elif ended == 0:
            continue
        elif not _row_file(folder, task, name).is_file():
            code = os.waitstatus_to_exitcode(status)
            _write_crash(folder, task, name, f"the process ended with {code}", seconds)
        del running[child]
        file = _row_file(folder, task, name)
        print(f"{task}/{name}: {summarize(json.loads(file.read_text()))}", file=sys.stderr)


def _write_crash(folder: Path, task: str, name: str, message: str, seconds: float) -> None:
    stages = {"process": {"outcome": FAILED, "message": message, "figures": {}, "notes": []}}
    _write_row(folder, task, name, stages, seconds)


def summarize(row: Row) -> str:
    """Return a row's outcome: FAILED before refused before ok, with the stages concerned."""
    parts = []
    for outcome in (FAILED, REFUSED):
        stages = [name for name, found in row["stages"].items() if found["outcome"] == outcome]
        if stages:
            parts.append(f"{SIGNS[outcome]} {', '.join(stages)}")
    return "; ".join(parts) or "ok"


def read_rows(folder: Path, families: Iterable[tuple[str, str]]) -> list[Row]:
    """Return the rows that are there, in the order of the families."""
    files = (_row_file(folder, task, name) for task, name in families)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def count_outcomes(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Return stage -> outcome -> number of families."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        for stage, found in row["stages"].items():
            counts.setdefault(stage, Counter())[found["outcome"]] += 1
    return {stage: dict(found) for stage, found in counts.items()}


def list_faults(rows: Sequence[Row], outcomes: Sequence[str] = (FAILED,)) -> Iterator[str]:
    """Yield one line per stage of a family with one of the outcomes."""
    for row in rows:
        for stage, found in row["stages"].items():
            if found["outcome"] in outcomes and not found["message"].startswith("nothing was"):
                sign = SIGNS[found["outcome"]]
                yield f"{row['task']}/{row['name']} | {stage} | {sign} | {found['message']}"
