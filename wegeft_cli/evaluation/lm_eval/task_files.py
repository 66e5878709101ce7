"""Where the lm-evaluation-harness finds a task: in one's own files, or in its package."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError

FOLDER = "lm-eval"
"""Under the data folder: task files, and a folder of data files for each task."""

_SPLITS = ("train", "validation", "test")
_ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_CODE_MARKS = ("!function", "class:")


def find_local(name: str, folder: Path | None) -> Any | None:
    """A TaskManager of a folder's task files; None where they have not the task.

    Args:
        folder: Where the task files lie; None has none.
    """
    if folder is None or not any(folder.glob("**/*.yaml")):
        return None
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return manager if name in manager.all_tasks else None


def find_builtin(name: str) -> Any:
    """A TaskManager of the harness's own tasks; of one folder where a file there is named so.

    The index of all of them takes many seconds.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    for path in sorted(root.glob(f"**/{name}.yaml")):
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
        if name in manager.all_subtasks:
            return manager
    return _whole_manager()


@functools.cache
def _whole_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def with_data(manager: Any, name: str, files: Mapping[str, Path]) -> Any:
    """A TaskManager with the task over local files: its file is included, other data named.

    Raises:
        UserError: If it is a group, whose tasks have data of their own.
    """
    from lm_eval.tasks import TaskManager

    entry = manager.task_index[name]
    if entry.yaml_path is None or name not in manager.all_subtasks:
        raise UserError(
            f"`{name}` is no single task: local data files stand in for one task's data",
            key="--data-dir",
            hint="name its tasks one by one",
        )
    config = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": _ENDINGS[next(iter(files.values())).suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        # A split that has no file is not asked for.
        **{
            f"{kind}_split": None
            for kind, split in (
                ("training", "train"),
                ("validation", "validation"),
                ("test", "test"),
            )
            if split not in files
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        # JSON is YAML. The manager reads the file anew when it loads the task: keep it until then.
        path = Path(folder) / f"{name}.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")
        fresh = TaskManager(include_path=folder, include_defaults=False)
        loaded = fresh.load([name])
    fresh.load = lambda names: loaded
    return fresh


def find_data_files(folder: Path) -> dict[str, Path]:
    """The data files that stand in for a task's own.

    Raises:
        UserError: If they are of several kinds.
    """
    files = {
        split: path
        for split in _SPLITS
        for ending in _ENDINGS
        if (path := folder / f"{split}{ending}").is_file()
    }
    kinds = {_ENDINGS[path.suffix] for path in files.values()}
    if len(kinds) > 1:
        raise UserError("the data files are of several kinds", file=str(folder), hint="use one")
    return files


def refuse_code(folder: Path) -> None:
    """Refuse task files that name Python beside them, which loading the task would run.

    Raises:
        UserError: If one names code; file and line are told.
    """
    for path in sorted(folder.glob("**/*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            if any(mark in line for mark in _CODE_MARKS):
                raise UserError(
                    "this task file names Python code, which would be run",
                    file=f"{path}:{number}",
                    hint="read that code, then add --trust-task-code",
                )
