"""Response cache: answers stored during an evaluation, so that an interrupted one resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wegeft_cli.errors import disk_errors
from wegeft_cli.storage.atomic import remove_folder

_KEY_NAME = "key.json"


class ResponseCache:
    """The answers of one benchmark, one per line, appended and flushed as they come.

    The folder is named by the hash of everything that the answers depend on: another model, test
    file, protocol, length or version uses another folder. Each process appends to its own file and
    reads all files, so that an evaluation resumes with any number of processes.

    Args:
        folder: The folder of the evaluation's caches.
        key: Everything that the answers depend on, as JSON values.
        process_index: This process's number.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], process_index: int = 0) -> None:
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._path = self.folder / f"{process_index}.jsonl"
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if process_index == 0:
                (self.folder / _KEY_NAME).write_text(text + "\n", encoding="utf-8")

    def read(self) -> dict[int, dict[str, Any]]:
        """Return the answers of all processes by index; incomplete lines are skipped."""
        answers: dict[int, dict[str, Any]] = {}
        with disk_errors(self.folder, "read"):
            for path in sorted(self.folder.glob("*.jsonl")):
                for line in path.read_bytes().split(b"\n"):
                    try:
                        value = json.loads(line)
                        answers[value["index"]] = value["answer"]
                    except (ValueError, KeyError, TypeError):
                        continue
        return answers

    def append(self, answers: Mapping[int, Mapping[str, Any]]) -> None:
        """Append answers and flush them to the disk."""
        lines = [
            json.dumps({"index": index, "answer": answer}) + "\n"
            for index, answer in answers.items()
        ]
        with disk_errors(self._path), self._path.open("ab") as file:
            # The next line must not continue an incomplete one.
            if file.tell() and not _ends_line(self._path):
                file.write(b"\n")
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def remove_caches(folder: Path) -> None:
    """Remove the caches of an evaluation whose result is written."""
    if folder.is_dir():
        remove_folder(folder)
