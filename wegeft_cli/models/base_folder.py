"""Where a base model is on this machine: a folder, or a snapshot in the hub cache."""

from __future__ import annotations

from pathlib import Path


def find_base_folder(name_or_path: str, revision: str | None = None) -> Path | None:
    """Return the local folder of a model: itself or the hub cache's snapshot.

    None for a GGUF file, or for a hub id that is not in the cache.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists() or is_path(name_or_path):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError):
        return None


def is_path(name_or_path: str) -> bool:
    """Return whether a base is named by its path rather than by its hub id."""
    return name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
