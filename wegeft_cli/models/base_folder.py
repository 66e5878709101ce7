"""Where a base model is on this machine: a folder, or a snapshot in the hub cache."""

from __future__ import annotations

import json
from pathlib import Path

from wegeft_cli.storage.json_files import read_object

CHAT_TEMPLATE_NAME = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_KEY = "chat_template"


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


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of a model folder, as transformers reads it; None without one.

    Several named ones are returned as JSON. A GGUF file counts as a folder without one.
    """
    found = read_object(folder / _TOKENIZER_CONFIG).get(_KEY)
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found if isinstance(each, dict)}
    file = folder / CHAT_TEMPLATE_NAME
    files = {"default": file} if file.is_file() else {}
    files |= {each.stem: each for each in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))}
    if files:  # they replace the one in the tokenizer's config
        found = {name: each.read_text(encoding="utf-8") for name, each in files.items()}
        found = found["default"] if list(found) == ["default"] else found
    if isinstance(found, dict):
        return json.dumps(found, sort_keys=True)
    return found if isinstance(found, str) and found else None


def chat_template_files(folder: Path, text: str) -> dict[str, str | None]:
    """Return the files that make a text the only chat template of a copy of a model folder.

    None is a file that the copy must not have.
    """
    files: dict[str, str | None] = {CHAT_TEMPLATE_NAME: text}
    files |= dict.fromkeys(
        str(file.relative_to(folder)) for file in (folder / _MORE_TEMPLATES).glob("*.jinja")
    )
    values = read_object(folder / _TOKENIZER_CONFIG)
    if values.pop(_KEY, None) is not None:
        files[_TOKENIZER_CONFIG] = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return files
