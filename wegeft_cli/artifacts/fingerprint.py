"""A fingerprint of a base model's weights, by which an adapter knows its base again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wegeft_cli.storage.atomic import hash_bytes
from wegeft_cli.storage.safetensors_reader import TensorInfo, list_tensors

__all__ = ["TensorInfo", "fingerprint_base", "list_tensors"]

_NUM_THREADS = 4


def fingerprint_base(model_dir: Path) -> str | None:
    """Hash the weights of a model folder: equal weights, equal fingerprint, however sharded.

    Returns:
        "sha256:<64 hex digits>" over each tensor's name, type, shape and bytes, or None where the
        folder holds no safetensors.

    Raises:
        UserError: If a file is missing or damaged.
    """
    return fingerprint_tensors(list_tensors(model_dir))


def fingerprint_tensors(infos: Mapping[str, TensorInfo]) -> str | None:
    """Hash stored tensors whose headers are read already, see `fingerprint_base`."""
    tensors = sorted(infos.items())
    if not tensors:
        return None
    # hashlib and reads let go of the interpreter lock, so threads do help here.
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        hashes = pool.map(lambda item: _hash_tensor(item[1]), tensors)
        rows = [
            [name, info.dtype, info.shape, digest]
            for (name, info), digest in zip(tensors, hashes, strict=True)
        ]
    text = "\n".join(json.dumps(row) for row in rows)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _hash_tensor(info: TensorInfo) -> str:
    return hash_bytes(info.shard, info.start, info.num_bytes)
