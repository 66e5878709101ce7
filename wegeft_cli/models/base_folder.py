"""Where a base model is on this machine: a folder, or a snapshot in the hub cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wegeft_cli.storage.json_files import read_object

CHAT_TEMPLATE_NAME = "chat_template.jinja"
GENERATION_CONFIG_NAME = "generation_config.json"
_MORE_TEMPLATES = "additional_chat_templates"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (_TOKENIZER_CONFIG, "special_tokens_map.json")
_CONFIG = "config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
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


def special_token_files(
    folder: Path,
    tokenizer: Any,
    tokens: Mapping[str, str],
    texts: Mapping[str, str | None] | None = None,
) -> dict[str, str]:
    """Return the files of a model folder that name special tokens, changed to these.

    The end tokens of the base's generation config still end an answer, after the chosen one.

    Args:
        folder: A model folder.
        tokenizer: Its tokenizer.
        tokens: `bos_token`, `eos_token` or `pad_token` -> a token of the vocabulary.
        texts: Files that replace some of the folder's.
    """

    def read(file: str) -> dict[str, Any]:
        text = (texts or {}).get(file)
        return read_object(folder / file) if text is None else dict(json.loads(text))

    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(text) for name, text in tokens.items()}
    changed: dict[str, dict[str, Any]] = {}
    for file in _TOKENIZER_FILES:
        if file == _TOKENIZER_CONFIG or (folder / file).is_file():
            changed[file] = read(file) | dict(tokens)
    config = read(_CONFIG)
    # Without a generation config, transformers takes these ids from the model's.
    generation = read(GENERATION_CONFIG_NAME) or {
        name: number
        for name, number in (config.get("text_config") or config).items()
        if name in _TOKEN_IDS
    }
    former = generation.get("eos_token_id")
    generation |= ids
    if "eos_token_id" in ids and former is not None:
        others = former if isinstance(former, list) else [former]
        generation["eos_token_id"] = list(dict.fromkeys([ids["eos_token_id"], *others]))
    changed[GENERATION_CONFIG_NAME] = generation
    if config:
        changed[_CONFIG] = config | ids
        if isinstance(config.get("text_config"), dict):
            changed[_CONFIG]["text_config"] = config["text_config"] | ids
    return {
        file: json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        for file, values in changed.items()
    }
