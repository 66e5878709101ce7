"""Data fingerprint: a run resumes only with the rows and the tokenizer of its start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.loading import find_files
from wegeft_cli.data.text.tokenizer import describe_tokenizer
from wegeft_cli.errors import UserError, disk_errors
from wegeft_cli.recipe.schema import DataSection
from wegeft_cli.storage.atomic import hash_bytes

_NUM_PROBES = 16
_PROBE_BYTES = 64 * 2**10


def digest_inputs(section: DataSection, tokenizer: Any, recipe_dir: Path | None) -> dict[str, Any]:
    """Return what `run.json` records of the inputs beside the data statistics.

    Returns:
        `tokenizer_sha256`, see `describe_tokenizer`, and `stream_digests`, one for each streamed
        training source, None for the hub. Data that are read whole are hashed elsewhere.

    Raises:
        UserError: If a file cannot be read.
    """
    description = json.dumps(describe_tokenizer(tokenizer), sort_keys=True)
    streamed = section.train if section.streaming else []
    files = [find_files(source, recipe_dir) for source in streamed]
    return {
        "tokenizer_sha256": hashlib.sha256(description.encode()).hexdigest(),
        "stream_digests": [None if each is None else _digest_probes(each) for each in files],
    }


def check_same_data(earlier: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume with other data, where a checkpoint's position would mean other rows.

    Validation rows are compared too, since the best checkpoint and early stopping compare their
    losses. Contents are compared, not paths; facts that the run did not record are skipped.

    Raises:
        UserError: If rows, the prompt form or the tokenizer have changed; each is listed.
    """
    found = dict(_list_facts(now))
    changed = [
        f"{what}: {value} then, {found.get(what)} now"
        for what, value in _list_facts(earlier)
        if value is not None and found.get(what) != value
    ]
    if changed:
        raise UserError(
            "the data have changed since the run began: " + "; ".join(changed),
            file=str(path),
            key="data",
            hint="give the same data, or begin a new run with another output_dir",
        )


def _list_facts(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    data = run.get("data") or {}
    for group, name in (("train", "sources"), ("validation", "validation_sources")):
        for number, source in enumerate(data.get(name, [])):
            for key in ("rows", "sha256"):
                yield f"data.{group}[{number}] {key}", source.get(key)
    for number, digest in enumerate(run.get("stream_digests", [])):
        yield f"data.train[{number}] digest", digest
    yield "template_hash", data.get("template_hash")
    yield "classes", data.get("labels_sha256")
    yield "tokenizer_sha256", run.get("tokenizer_sha256")


def _digest_probes(files: list[Path]) -> str:
    """Hash the sizes of files and evenly spaced parts of each; small files as a whole.

    A stream may be too long to read before the first step, and modification times change when a
    file is copied. Rows that are added, removed, moved or changed alter the hash.
    """
    digest = hashlib.sha256()
    for file in files:
        with disk_errors(file, "read"):
            size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        if size <= _NUM_PROBES * _PROBE_BYTES:
            digest.update(hash_bytes(file).encode())
            continue
        for number in range(_NUM_PROBES):
            start = (size - _PROBE_BYTES) * number // (_NUM_PROBES - 1)
            digest.update(hash_bytes(file, start, _PROBE_BYTES).encode())
    return digest.hexdigest()
