"""Tokenised rows are kept on disk under a key of everything that they depend on."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from wegeft_cli.data.text.chat_template import Template
from wegeft_cli.data.text.encode import EncodedDataset
from wegeft_cli.data.text.tokenizer import describe_tokenizer
from wegeft_cli.recipe.schema import DataSection, DataSource

_ARRAYS = ("ids", "label_mask", "offsets")
_UNFINISHED, _OLD = ".unfinished-", ".old-"
_PACKAGES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow")
_HASH_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class CacheEntry:
    """One source's tokenised rows.

    Args:
        dataset: The rows; read from the entry's files, not into memory.
        facts: What else is known of them, as JSON.
    """

    dataset: EncodedDataset
    facts: dict[str, Any]


class DamagedEntryError(Exception):
    """An entry whose files are not what was written."""


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
    """Name the tokenised rows of a source by all that they depend on.

    Args:
        source: The recipe's entry.
        section: The recipe's `data`.
        digest: What the source holds: its files' digest, or a hub data set's fingerprint.
        kinds: The endings of its files.
        group: train or validation, which take different rows of a corpus.
        tokenizer: A fast tokenizer.
        chat: The template that conversations are written by, if there is one.

    Returns:
        A name of 64 hex digits.
    """
    ingredients = {
        "data": digest,
        "kinds": list(kinds),
        "format": source.format,
        "columns": source.columns,
        "limit": source.limit,
        "group": group,
        "template": section.template,
        "chat": chat and chat.text,
        "day": date.today().isoformat() if chat and chat.tells_the_day else None,
        "loss_on": section.loss_on,
        "max_length": section.max_length,
        "tokenizer": describe_tokenizer(tokenizer),
        "code": digest_code(Path(__file__).parents[1]),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }
    return _digest(json.dumps(ingredients, sort_keys=True))


def read_entry(folder: Path, key: str) -> CacheEntry | None:
    """Read an entry, checking every byte of it.

    Args:
        folder: The cache.
        key: The entry's name.

    Returns:
        The entry; None if there is none.

    Raises:
        DamagedEntryError: If its files are not what was written.
    """
    entry = folder / key
    if not entry.is_dir():
        return None
    try:
        told = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
        content = told["content"]
        if told["sha256"] != _digest(json.dumps(content, sort_keys=True)):
            raise DamagedEntryError("entry.json is not what was written")
        arrays = {name: _read_array(entry, name, content["files"][name]) for name in _ARRAYS}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedEntryError(str(error)) from error
    return CacheEntry(EncodedDataset(**arrays), content["facts"])


def write_entry(folder: Path, key: str, dataset: EncodedDataset, facts: Mapping[str, Any]) -> None:
    """Keep an entry, whole or not at all.

    Processes that write the same entry do no harm to each other: the first one wins, and all of
    them have written the same. What killed processes left is cleared away.

    Args:
        folder: The cache; made if it is not there.
        key: The entry's name.
        dataset: The rows.
        facts: What else is known of them, as JSON.

    Raises:
        OSError: If the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _make_unfinished(folder) as unfinished:
        files = {}
        for name in _ARRAYS:
            np.save(unfinished / f"{name}.npy", getattr(dataset, name), allow_pickle=False)
            files[name] = _digest_file(unfinished / f"{name}.npy")
        content = {"files": files, "facts": dict(facts)}
        told = {"sha256": _digest(json.dumps(content, sort_keys=True)), "content": content}
        (unfinished / "entry.json").write_text(json.dumps(told), encoding="utf-8")
        _move(unfinished, folder / key)


def discard_entry(folder: Path, key: str) -> None:
    """Take a damaged entry away; who reads its files still has them until they are closed.

    Args:
        folder: The cache.
        key: The entry's name.
    """
    old = folder / f"{_OLD}{secrets.token_hex(8)}"
    with suppress(OSError):  # another process took it away, or it cannot be: `write_entry` tells
        (folder / key).rename(old)
    shutil.rmtree(old, ignore_errors=True)


def digest_code(folder: Path) -> str:
    """Digest of the program's own part in the rows: every module below a folder."""
    return _digest_modules(folder)


@functools.cache
def _digest_modules(folder: Path) -> str:
    modules = sorted(folder.rglob("*.py"))
    return _digest(
        "\n".join(
            f"{module.relative_to(folder).as_posix()} {_digest_file(module)}" for module in modules
        )
    )


@contextmanager
def _make_unfinished(folder: Path) -> Iterator[Path]:
    """Make a folder to write an entry in, locked until the entry is there or this process ends."""
    unfinished = folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
    with ExitStack() as held:
        # Nobody clears away what is made and not yet locked.
        with _locked(folder) as is_locked:
            if is_locked:
                _remove_leftovers(folder)
            unfinished.mkdir()
            held.callback(shutil.rmtree, unfinished, ignore_errors=True)
            held.enter_context(_locked(unfinished))
        yield unfinished


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes left that were killed; where there are no locks, nothing."""
    for leftover in (*folder.glob(f"{_UNFINISHED}*"), *folder.glob(f"{_OLD}*")):
        # One that is gone by now is as good as removed.
        with suppress(OSError), _locked(leftover, wait=False) as is_locked:
            if is_locked:
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a folder, and tell whether that could be done."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        is_locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process holds it, or the file system has no locks
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


def _move(unfinished: Path, entry: Path) -> None:
    try:
        unfinished.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise
        # Another process was quicker.


def _read_array(entry: Path, name: str, sha256: str) -> np.ndarray:
    file = entry / f"{name}.npy"
    if _digest_file(file) != sha256:
        raise DamagedEntryError(f"{file.name} is not what was written")
    array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
