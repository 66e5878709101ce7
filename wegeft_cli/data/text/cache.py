"""Cache of tokenized rows on disk, under a key of everything that they depend on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from wegeft_cli.data.text.chat_template import Template
from wegeft_cli.data.text.encode import EncodedDataset
from wegeft_cli.data.text.tokenizer import describe_tokenizer
from wegeft_cli.errors import UserError, disk_errors
from wegeft_cli.recipe.schema import DataSection, DataSource
from wegeft_cli.storage.atomic import (
    atomic_folder,
    hash_bytes,
    hold_folder,
    remove_folder,
    remove_leftovers,
)

_ARRAYS = ("ids", "label_mask", "offsets", "continues")
_PACKAGES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow")


@dataclass(frozen=True)
class CacheEntry:
    """The tokenized rows of one source.

    Args:
        dataset: The rows, memory-mapped from the entry's files.
        facts: The source's statistics, as JSON.
    """

    dataset: EncodedDataset
    facts: dict[str, Any]


class DamagedEntryError(Exception):
    """The entry's files are not what was written."""


def build_key(
    source: DataSource,
    section: DataSection,
    *,
    digest: str,
    kinds: Sequence[str],
    group: str,
    tokenizer: Any,
    chat: Template | None,
) -> str:
    """Return the cache key of a source's tokenized rows: a digest of all their inputs.

    `digest` identifies the source's content, `kinds` are the endings of its files, and `group` is
    train or validation, which take different rows of a corpus.
    """
    ingredients = {
        "data": digest,
        "kinds": list(kinds),
        "format": source.format,
        "columns": source.columns,
        "limit": source.limit,
        "field": source.field,
        "group": group,
        "template": section.template,
        "template_options": [section.chat_template_kwargs, section.system_turn, section.system],
        "chat": chat and chat.text,
        "day": date.today().isoformat() if chat and chat.writes_date else None,
        "loss_on": section.loss_on,
        "max_length": section.max_length,
        "tokenizer": describe_tokenizer(tokenizer),
        "code": digest_code(Path(__file__).parents[1]),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }
    return _digest(json.dumps(ingredients, sort_keys=True))


def read_entry(folder: Path, key: str) -> CacheEntry | None:
    """Read an entry and verify its digests; None if there is none."""
    entry = folder / key
    if not entry.is_dir():
        return None
    try:
        sealed = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
        content = sealed["content"]
        if sealed["sha256"] != _digest(json.dumps(content, sort_keys=True)):
            raise DamagedEntryError("entry.json is not what was written")
        files = content["files"]
        arrays = {name: _read_array(entry, name, files[name]) for name in _ARRAYS if name in files}
    except (OSError, ValueError, LookupError, TypeError, UserError) as error:
        raise DamagedEntryError(str(error)) from error
    return CacheEntry(EncodedDataset(**arrays), content["facts"])


def write_entry(folder: Path, key: str, dataset: EncodedDataset, facts: Mapping[str, Any]) -> None:
    """Write an entry, whole or not at all, and remove what killed processes left.

    Processes write one after another; an entry that exists by then is kept. Raise UserError if the
    disk refuses.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with hold_folder(folder, wait=True):
        for prefix in (".tmp-", ".trash-"):
            remove_leftovers(folder, prefix)
        if (folder / key).is_dir():
            return
        with atomic_folder(folder / key) as entry:
            files = {}
            for name in _ARRAYS:
                array = getattr(dataset, name)
                if array is None:
                    continue
                np.save(entry / f"{name}.npy", array, allow_pickle=False)
                files[name] = hash_bytes(entry / f"{name}.npy")
            content = {"files": files, "facts": dict(facts)}
            sealed = {"sha256": _digest(json.dumps(content, sort_keys=True)), "content": content}
            (entry / "entry.json").write_text(json.dumps(sealed), encoding="utf-8")


def discard_entry(folder: Path, key: str) -> None:
    """Remove a damaged entry; processes that read its files keep them until they close them."""
    with suppress(UserError):  # another process removed it, or `write_entry` reports why it cannot
        remove_folder(folder / key)


def digest_code(folder: Path) -> str:
    """Return the digest of every module below a folder."""
    return _digest_modules(folder)


@functools.cache
def _digest_modules(folder: Path) -> str:
    modules = sorted(folder.rglob("*.py"))
    return _digest(
        "\n".join(
            f"{module.relative_to(folder).as_posix()} {hash_bytes(module)}" for module in modules
        )
    )


def _read_array(entry: Path, name: str, sha256: str) -> np.ndarray:
    file = entry / f"{name}.npy"
    if hash_bytes(file) != sha256:
        raise DamagedEntryError(f"{file.name} is not what was written")
    array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
