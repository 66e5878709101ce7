"""The directory of a training run: its files, their formats, and who may write there.

recipe.yaml     the resolved recipe, which repeats the run
run.json        the record: status, environment, data and results
metrics.jsonl   one line per logged step, and one per validation
samples.jsonl   answers to `logging.sample_prompts`
checkpoints/    training states to resume from, see `artifacts.checkpoint`
adapter/        the result, see `artifacts.adapter`
eval/           answers and scores of `wegeft eval`
skipped/        rows of the steps that were skipped
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError, disk_errors
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.storage.atomic import (
    remove_folder,
    remove_leftover_files,
    write_bytes_atomic,
    write_text_atomic,
)
from wegeft_cli.storage.json_files import (
    parse_object,
    read_json,
    read_object,
    read_object_lines,
    to_finite,
)
from wegeft_cli.storage.lock import lock_folder

SCORES_END = "-scores.json"
"""End of the name of a result file of `wegeft eval`."""
SAMPLES_END = "-samples.jsonl"
"""End of the name of a file of answers of `wegeft eval`."""

_RESOLVED = "# Resolved by wegeft-cli"  # how the recipe.yaml of a run begins
_TAIL_BYTES = 4096  # more than a line of metrics has
# What a damaged line of JSON, or one of another kind, raises where it is read.
_DAMAGES = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


class RunDirectory:
    """The directory of one run.

    Readers are lenient: a file that is missing or damaged reads as an empty one.

    Args:
        path: The directory; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_path = path / "recipe.yaml"
        self.record_path = path / "run.json"
        self.metrics_path = path / "metrics.jsonl"
        self.samples_path = path / "samples.jsonl"
        self.checkpoints_dir = path / "checkpoints"
        self.adapter_dir = path / "adapter"
        self.eval_dir = path / "eval"
        self.skipped_dir = path / "skipped"
        self._values: dict[str, Any] = {}

    @classmethod
    def containing(cls, path: str | Path) -> RunDirectory | None:
        """Return the run whose directory is `path` or the parent of `path`, if there is one."""
        candidates = (cls(Path(path)), cls(Path(path).parent))
        return next((each for each in candidates if each.exists()), None)

    @classmethod
    def of_checkpoint(cls, path: Path) -> RunDirectory:
        """Return the run of a checkpoint, `<run>/checkpoints/step-<8 digits>`."""
        return cls(path.resolve().parent.parent)

    def exists(self) -> bool:
        """Return whether the directory holds a run."""
        return self.record_path.is_file()

    def checkpoint_dir(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.checkpoints_dir / f"step-{step:08d}"

    def checkpoint_dirs(self) -> list[Path]:
        """Return the folders of all checkpoints, complete or not."""
        return sorted(self.checkpoints_dir.glob("step-*"))

    def skipped_path(self, step: int) -> Path:
        """Return the file of a skipped step's rows."""
        return self.skipped_dir / f"step-{step:08d}.json"

    # Reading.

    def record(self, *, strict: bool = False) -> dict[str, Any]:
        """Return the values of run.json; `strict` raises UserError if the file is damaged."""
        if not strict or not self.exists():
            return read_object(self.record_path)
        values = read_json(self.record_path)
        return values if isinstance(values, dict) else {}

    def status(self) -> str | None:
        """Return the status in run.json: running, finished, interrupted or failed."""
        return self.record().get("status")

    def is_finished(self) -> bool:
        """Return whether the run has finished and written its adapter."""
        return self.status() == "finished" and self.adapter_dir.is_dir()

    def recipe(self) -> Recipe:
        """Load the resolved recipe; raise UserError if it is damaged."""
        return load_recipe(self.recipe_path, need_data=False).recipe

    def recipe_text(self) -> str:
        """Return the text of recipe.yaml, empty if there is none."""
        try:
            return self.recipe_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return list(read_object_lines(self.metrics_path))

    def last_metrics(self) -> dict[str, Any]:
        """Return the last complete line of a logged step, without reading the whole file."""
        try:
            with self.metrics_path.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
                lines = file.read().splitlines()
        except OSError:
            return {}
        return next((line for line in map(parse_object, reversed(lines)) if "loss" in line), {})

    def validation(self) -> dict[int, dict[str, float]]:
        """Return the validations in metrics.jsonl: step -> metrics; raise if the disk fails."""
        found: dict[int, dict[str, float]] = {}
        with disk_errors(self.metrics_path, "read"):
            lines = self.metrics_path.read_bytes().split(b"\n")
        for line in lines:
            try:
                values = json.loads(line)
                if "loss" not in values:
                    found[int(values.pop("step"))] = values
            except _DAMAGES:
                continue  # a damaged line must not cost the run its end
        return found

    def samples(self) -> list[dict[str, Any]]:
        """Return the lines of samples.jsonl: step, prompt, output."""
        return list(read_object_lines(self.samples_path))

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the results that `wegeft eval` has written about the run's adapter."""
        paths = sorted(self.eval_dir.glob(f"{self.adapter_dir.name}*{SCORES_END}"))
        return [read_object(path) for path in paths]

    def answer_paths(self) -> list[Path]:
        """Return the files of answers that `wegeft eval` has written."""
        return sorted(self.eval_dir.glob(f"*{SAMPLES_END}"))

    # Writing, by the process that holds the lock.

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory, and remove what a process left that was killed while it wrote."""
        with lock_folder(self.path):
            written = (self.recipe_path, self.record_path, self.metrics_path, self.samples_path)
            remove_leftover_files(self.path, tuple(path.name for path in written))
            yield

    def load_record(self) -> dict[str, Any]:
        """Read run.json and keep its values: `update` merges into them."""
        self._values = self.record()
        return self._values

    def update(self, values: Mapping[str, Any]) -> None:
        """Merge values into run.json and write it whole."""
        self._values.update(values)
        text = json.dumps(to_finite(self._values), indent=2, allow_nan=False) + "\n"
        write_text_atomic(self.record_path, text)

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe."""
        write_text_atomic(self.recipe_path, text)

    def truncate_lines(self, step: int, *, redo_validation: bool) -> None:
        """Keep the lines of metrics and samples up to a checkpoint, and drop later ones.

        Args:
            step: The checkpoint's step; 0 drops all lines.
        """
        for path in (self.metrics_path, self.samples_path):
            kept: list[bytes] = []
            if step and path.is_file():
                with disk_errors(path, "read"):
                    lines = path.read_bytes().split(b"\n")
                kept = [line for line in lines if _is_kept(line, step, redo_validation)]
            if path == self.metrics_path or path.is_file():
                write_bytes_atomic(path, b"".join(line + b"\n" for line in kept))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        _append(self.metrics_path, [line])

    def append_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Append the answers at a step, (prompt, output) each, to samples.jsonl."""
        lines = [{"step": step, "prompt": prompt, "output": output} for prompt, output in samples]
        _append(self.samples_path, lines)

    # Refusals before a new run.

    def check_unused(self) -> None:
        """Raise UserError if the directory holds a run, or a recipe.yaml that is not a run's.

        A run that failed before its first checkpoint is replaced.
        """
        self.check_place()
        if not self._holds_work():
            return
        status = self.status()
        resume = "" if status == "finished" else ", or resume the run with --resume auto"
        resume += ", or replace the run with --overwrite"
        raise UserError(
            f"this folder already holds a run (status: {status or 'unknown'})",
            file=str(self.path),
            key="output_dir",
            hint=f"choose another folder, such as output_dir=runs/second{resume}",
        )

    def check_place(self) -> None:
        """Raise UserError if the directory cannot be written, or recipe.yaml is a user's own."""
        place = _find_existing(self.path)
        if not place.is_dir():
            raise UserError(
                f"{str(place)!r} is a file, where the run's folder should go",
                key="output_dir",
                hint="choose another one",
            )
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"{str(place)!r} is not writable, where the run's folder should go",
                key="output_dir",
                hint="choose another one, or change its permissions",
            )
        if self.recipe_path.exists() and not self.has_own_recipe():
            raise UserError(
                "this recipe.yaml is not a run's own, and the run would replace it",
                file=str(self.recipe_path),
                key="output_dir",
                hint="choose another one, such as output_dir=runs/first",
            )

    def clear(self) -> None:
        """Remove the files of an earlier run, and keep all others; the caller holds the lock."""
        if not self.exists():
            return
        folders = (self.adapter_dir, self.checkpoints_dir, self.eval_dir, self.skipped_dir)
        files = (self.metrics_path, self.samples_path, self.recipe_path, self.record_path)
        for folder in filter(Path.is_dir, folders):
            remove_folder(folder)
        with disk_errors(self.path):
            for file in files:
                file.unlink(missing_ok=True)

    def has_own_recipe(self) -> bool:
        """Return whether recipe.yaml was written by a run, not by a user."""
        with disk_errors(self.recipe_path, "read"):
            text = self.recipe_path.read_text(encoding="utf-8", errors="replace")
        return text.startswith(_RESOLVED)

    def _holds_work(self) -> bool:
        with disk_errors(self.path, "read"):
            if self.adapter_dir.exists():
                return True
            if self.metrics_path.exists() and self.metrics_path.stat().st_size:
                return True
            if self.checkpoints_dir.is_dir() and any(self.checkpoints_dir.iterdir()):
                return True
            unfinished = ("failed", "interrupted", "running")
            return self.record_path.exists() and self.status() not in unfinished


def _find_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    try:
        while not path.exists() and path != path.parent:
            if path.is_symlink():
                raise UserError(
                    f"{str(path)!r} is a link to {str(path.readlink())!r}, which does not exist",
                    key="output_dir",
                    hint="create its target, remove the link, or choose another folder",
                )
            path = path.parent
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UserError(
            f"{str(path)!r} cannot be resolved: {error}", key="output_dir", hint="check its links"
        ) from error
    return path


def find_run(path: str | Path | None) -> Path:
    """Return `path`; for None, the newest finished run under runs/, or raise UserError."""
    if path is not None:
        return Path(path)
    newest = find_newest_run(Path("runs"))
    if newest is None:
        raise UserError(
            "there is no finished run under runs/",
            hint="name an adapter or run folder, or train first: wegeft train quickstart",
        )
    return newest


def find_newest_run(runs_dir: Path) -> Path | None:
    """Return the directory under `runs_dir` of the run that finished last, if any has."""
    if not runs_dir.is_dir():
        return None
    finished: list[tuple[float, Path]] = []
    for path in sorted(path for path in runs_dir.iterdir() if path.is_dir()):
        directory = RunDirectory(path)
        record = directory.record()
        if record.get("status") == "finished":
            finished.append((_finished_at(record, directory), path))
    return max(finished)[1] if finished else None


def find_recipe_of(path: str | Path | None) -> Recipe | None:
    """Load the recipe of the run whose directory is `path` or the parent of `path`, if any."""
    directory = None if path is None else RunDirectory.containing(path)
    if directory is None or not directory.recipe_path.is_file():
        return None
    return directory.recipe()


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(to_finite(dict(line)), allow_nan=False) + "\n" for line in lines)
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def _is_kept(line: bytes, step: int, redo_validation: bool) -> bool:
    try:
        values = json.loads(line)
        line_step = float(values["step"])
    except _DAMAGES:
        return False  # a line that a kill cut off
    is_validation = "loss" not in values
    return line_step < step or (line_step == step and not (redo_validation and is_validation))


def _finished_at(record: Mapping[str, Any], directory: RunDirectory) -> float:
    """Return the seconds since the epoch by the record, or by the file's time."""
    try:
        finished = datetime.fromisoformat(record["finished_at"])
        return (finished if finished.tzinfo else finished.replace(tzinfo=UTC)).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return directory.record_path.stat().st_mtime
