"""Tasks of the lm-evaluation-harness: task files of the user, and those of its package."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError, disk_errors
from wegeft_cli.recipe.yaml_source import Scalar, list_scalars

FOLDER = "lm-eval"
"""Under the data folder: task files, and a folder of data files for each task."""

_SPLITS = ("train", "validation", "test")
_ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def find_local(name: str, folder: Path | None) -> Any | None:
    """Return a TaskManager of a folder's task files; None if they do not define the task."""
    if folder is None or not any(folder.glob("**/*.yaml")):
        return None
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return manager if name in manager.all_tasks else None


def find_builtin(name: str) -> Any:
    """Return a TaskManager of the harness's own tasks, of one folder if a file has this name.

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
    """Return a TaskManager with the task on local files: a file that includes the task's own.

    Raise UserError for a group, whose tasks have their own data.
    """
    from lm_eval.tasks import TaskManager

    entry = manager.task_index[name]
    if entry.yaml_path is None or name not in manager.all_subtasks:
        raise UserError(
            f"`{name}` is no single task: local data files replace the data of one task",
            key="--data-dir",
            hint="name its tasks one by one",
        )
    config = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": _ENDINGS[next(iter(files.values())).suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        # A split without a file is not read.
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
        # JSON is YAML. The manager reads the file again when it loads the task: keep it until then.
        path = Path(folder) / f"{name}.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")
        fresh = TaskManager(include_path=folder, include_defaults=False)
        loaded = fresh.load([name])
    fresh.load = lambda names: loaded
    return fresh


def find_data_files(folder: Path) -> dict[str, Path]:
    """Return the data files that replace a task's own; UserError if they are of several kinds."""
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
    """Raise UserError if a task file, or a file that it includes, would run Python code.

    Code can be named by a tag (`!function`), or by a metric that the harness does not define, which
    the evaluate library loads as a script.
    """
    import lm_eval
    from lm_eval.api import metrics, registry

    assert metrics  # its import fills the registry
    package = Path(lm_eval.__file__).parent.resolve()
    pending = sorted(folder.glob("**/*.yaml"))
    visited: set[Path] = set()
    while pending:
        path = pending.pop(0).resolve()
        if path in visited or package in path.parents:
            continue
        visited.add(path)
        with disk_errors(path, "read"):
            content = path.read_bytes()
        for scalar in list_scalars(content, str(path)):
            if scalar.key == "include":
                pending.append(path.parent / scalar.value)
            reason = _find_code(scalar, registry.metric_registry)
            if reason is not None:
                raise UserError(
                    f"this task file {reason}, which would be run",
                    file=f"{path}:{scalar.line}",
                    key="--trust-task-code",
                    hint="read that code, then add this option",
                )


def _find_code(scalar: Scalar, known_metrics: Container[str]) -> str | None:
    """Return how a value names code, or None."""
    if scalar.tag is not None:
        return f"names Python code by {scalar.tag}"
    if scalar.key == "class" and scalar.value:
        return f"names Python code: {scalar.key} {scalar.value!r:.60}"
    if scalar.key == "hf_evaluate" and scalar.value.lower() in ("true", "yes", "on"):
        return "loads a metric as Python code (hf_evaluate)"
    if scalar.key == "metric" and scalar.value not in known_metrics:
        return f"loads a metric as Python code: {scalar.value!r:.60}"
    if scalar.key == "dataset_path" and scalar.value == "pandas":
        return "reads pickle files, which contain Python code"
    return None
