"""A run's folder: `recipe.yaml`, `run.json`, `metrics.jsonl`, and who may write there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.storage.atomic import (
    disk_errors,
    remove_leftover_files,
    write_bytes_atomic,
    write_text_atomic,
)
from wegeft_cli.storage.json_files import read_json, read_object, to_finite

_RESOLVED = "# Resolved by wegeft-cli"  # how a run's own recipe.yaml begins
METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples.jsonl"
SCORES_END = "-scores.json"
"""How the results of `wegeft eval` are called that lie in a run's folder, under eval/."""
_FILES = ("recipe.yaml", "run.json", METRICS_NAME, SAMPLES_NAME)
# What a damaged line of JSON, or one of another kind, raises where it is read.
_DAMAGES = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


class RunFolder:
    """The files of one run besides its checkpoints and its adapter.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter_dir = path / "adapter"
        self.checkpoints_dir = path / "checkpoints"
        self._values: dict[str, Any] = {}

    def remove_leftovers(self) -> None:
        """Remove what a process left that was killed while writing; for who holds the folder."""
        remove_leftover_files(self.path, _FILES)

    def check_unused(self) -> None:
        """Refuse a folder that already holds a run, or a recipe that the run's own would replace.

        What a run left that failed before its first checkpoint holds nothing to lose.

        Raises:
            UserError: If it does; the message says how the run can go on.
        """
        self._check_place()
        if not self._holds_work():
            return
        status = self.read_status()
        finished = status == "finished"
        raise UserError(
            f"this folder already holds a run (status: {status or 'unknown'})",
            file=str(self.path),
            key="output_dir",
            hint="choose another one, such as output_dir=runs/second"
            + ("" if finished else ", or go on with --resume auto"),
        )

    def _check_place(self) -> None:
        """Refuse a path that leads through a file, and a folder with somebody's own recipe.yaml."""
        place = self.path
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise UserError(
                f"{str(place)!r} is a file, where the run's folder should go",
                key="output_dir",
                hint="choose another one",
            )
        path = self.path / "recipe.yaml"
        if path.exists():
            with disk_errors(path, "read"):
                text = path.read_text(encoding="utf-8", errors="replace")
            if not text.startswith(_RESOLVED):
                raise UserError(
                    "this recipe.yaml is not a run's own, and the run would replace it",
                    file=str(path),
                    key="output_dir",
                    hint="choose another one, such as output_dir=runs/first",
                )

    def _holds_work(self) -> bool:
        with disk_errors(self.path, "read"):
            if self.adapter_dir.exists():
                return True
            metrics, run = self.path / METRICS_NAME, self.path / "run.json"
            if metrics.exists() and metrics.stat().st_size:
                return True
            if self.checkpoints_dir.is_dir() and any(self.checkpoints_dir.iterdir()):
                return True
            return run.exists() and self.read_status() not in ("failed", "interrupted", "running")

    def read_status(self) -> str | None:
        """Return the status in run.json, or None if no status can be read."""
        return read_object(self.path / "run.json").get("status")

    def adopt(self) -> dict[str, Any]:
        """Go on from the run.json that is there; what `update` writes is merged into it."""
        self._values = read_object(self.path / "run.json")
        return self._values

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe, which repeats the run."""
        write_text_atomic(self.path / "recipe.yaml", text)

    def update(self, values: Mapping[str, Any]) -> None:
        """Merge values into run.json and write it whole."""
        self._values.update(values)
        text = json.dumps(to_finite(self._values), indent=2, allow_nan=False) + "\n"
        write_text_atomic(self.path / "run.json", text)

    def start_lines(self, step: int, *, redo_validation: bool) -> None:
        """Keep the lines of metrics and samples up to a checkpoint, drop later ones.

        Args:
            step: The checkpoint's step; 0 drops all.
            redo_validation: The validation of that step is still to be done: its lines are dropped.
        """
        for name in (METRICS_NAME, SAMPLES_NAME):
            path = self.path / name
            kept: list[bytes] = []
            if step and path.is_file():
                with disk_errors(path, "read"):
                    lines = path.read_bytes().split(b"\n")
                kept = [line for line in lines if _is_kept(line, step, redo_validation)]
            if name == METRICS_NAME or path.is_file():
                write_bytes_atomic(path, b"".join(line + b"\n" for line in kept))

    def read_validation(self) -> dict[int, dict[str, float]]:
        """Give the validations in metrics.jsonl: step -> metrics."""
        path = self.path / METRICS_NAME
        found: dict[int, dict[str, float]] = {}
        with disk_errors(path, "read"):
            lines = path.read_bytes().split(b"\n")
        for line in lines:
            try:
                values = json.loads(line)
                if "loss" not in values:
                    found[int(values.pop("step"))] = values
            except _DAMAGES:
                continue  # what cannot be read must not cost the run its end
        return found

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self._append(METRICS_NAME, [line])

    def append_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Append what the model answered at a step, (prompt, output) each, to samples.jsonl."""
        self._append(
            SAMPLES_NAME,
            [{"step": step, "prompt": prompt, "output": output} for prompt, output in samples],
        )

    def _append(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        path = self.path / name
        text = "".join(json.dumps(to_finite(dict(line)), allow_nan=False) + "\n" for line in lines)
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(text)


def find_run(path: str | Path | None) -> Path:
    """Give the folder that a command means; left out, the newest finished run under runs/.

    Args:
        path: What was typed, or None.

    Returns:
        The folder.

    Raises:
        UserError: If nothing was typed and no run has finished.
    """
    if path is not None:
        return Path(path)
    newest = find_newest_run(Path("runs"))
    if newest is None:
        raise UserError(
            "there is no finished run under runs/",
            hint="name an adapter or run folder, or train first: wegeft train quickstart",
        )
    return newest


def find_recipe_of(path: str | Path | None) -> Recipe | None:
    """Read the recipe of the run that a folder belongs to, if it belongs to one.

    Args:
        path: A run's folder, or a folder in it; None belongs to none.

    Returns:
        The run's resolved recipe, or None.

    Raises:
        UserError: If the run's recipe is damaged.
    """
    if path is None:
        return None
    for folder in (Path(path), Path(path).parent):
        if (folder / "recipe.yaml").is_file() and (folder / "run.json").is_file():
            return load_recipe(folder / "recipe.yaml", need_data=False).recipe
    return None


def now() -> str:
    """Give the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _is_kept(line: bytes, step: int, redo_validation: bool) -> bool:
    try:
        values = json.loads(line)
        its_step = float(values["step"])
    except _DAMAGES:
        return False  # a line cut off by a kill
    is_of_validation = "loss" not in values
    return its_step < step or (its_step == step and not (redo_validation and is_of_validation))


def find_newest_run(runs_dir: Path) -> Path | None:
    """Find the run that finished last.

    Args:
        runs_dir: The folder of the runs' folders.

    Returns:
        The run's folder, or None if no run in there has finished.
    """
    if not runs_dir.is_dir():
        return None
    finished: list[tuple[float, Path]] = []
    for run_dir in sorted(path for path in runs_dir.iterdir() if path.is_dir()):
        run = _read_run(run_dir)
        if run is not None and run.get("status") == "finished":
            finished.append((_finished_at(run, run_dir), run_dir))
    return max(finished)[1] if finished else None


def _read_run(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "run.json"
    try:
        run = read_json(path, allow_nan=True)
    except UserError:
        return None
    return run if isinstance(run, dict) else None


def _finished_at(run: Mapping[str, Any], run_dir: Path) -> float:
    """Seconds since the epoch: as the run says, else as its file does."""
    try:
        told = datetime.fromisoformat(run["finished_at"])
        return (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return (run_dir / "run.json").stat().st_mtime
