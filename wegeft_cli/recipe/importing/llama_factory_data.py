"""Datasets and prompt templates of LLaMA-Factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wegeft_cli.recipe.importing.conversion import Conversion

Info = tuple[Path, dict[str, Any]]

_ALPACA_COLUMNS = {"instruction": "prompt", "input": "query", "output": "response"}
_SHAREGPT_TAGS = {"role_tag": "from", "content_tag": "value"}
_OWN_TEXTS = {"empty": "plain", "alpaca": "alpaca"}


def find_datasets(
    at: Conversion, key: str, target: str, names: list[str], info: Info | None, *, is_text: bool
) -> list[dict[str, Any]]:
    """Return a source for each dataset, which `dataset_info.json` describes."""
    sources = []
    for number, name in enumerate(names):
        entry = None if info is None else info[1].get(name)
        if info is None or not isinstance(entry, dict):
            sources.append({"path": ""})
            reason = "no dataset_info.json was found" if info is None else "it is not in it"
            at.require(
                f"{target}[{number}].path",
                f"set the file or hub id of the dataset `{name}` ({reason})",
            )
            continue
        sources.append(_convert_entry(at, f"{key} `{name}`", entry, info[0], is_text=is_text))
    return sources


def _convert_entry(
    at: Conversion, key: str, entry: dict[str, Any], folder: Path, *, is_text: bool
) -> dict[str, Any]:
    source: dict[str, Any] = {}
    if entry.get("file_name"):
        source["path"] = str(folder / entry["file_name"])
    elif entry.get("hf_hub_url"):
        source["path"] = entry["hf_hub_url"]
    else:
        source["path"] = ""
        at.require("data.train", f"set the path of {key}: it is neither a file nor on the hub")
    for name, own in (("subset", "name"), ("split", "split"), ("num_samples", "limit")):
        if entry.get(name) is not None and entry[name] != "train":
            source[own] = entry[name]
    columns = dict(entry.get("columns") or {})
    if is_text:
        column = columns.get("prompt", "text")
        source |= {"format": "text"} | ({"columns": {"text": column}} if column != "text" else {})
    elif entry.get("formatting", "alpaca") == "alpaca":
        source["format"] = "instruction"
        defaults = {"prompt": "instruction", "query": "input", "response": "output"}
        renames = {
            field: columns[name]
            for field, name in _ALPACA_COLUMNS.items()
            if columns.get(name) and columns[name] != defaults[name]
        }
        if renames:
            source["columns"] = renames
        _drop_columns(at, key, columns, ("history", "system"))
    else:
        source |= _convert_conversations(at, key, entry, columns)
    _drop_columns(at, key, columns, ("images", "videos", "audios", "chosen", "rejected", "kto_tag"))
    return source


def _convert_conversations(
    at: Conversion, key: str, entry: dict[str, Any], columns: dict[str, Any]
) -> dict[str, Any]:
    tags = _SHAREGPT_TAGS | dict(entry.get("tags") or {})
    names = (tags["role_tag"], tags["content_tag"])
    form = "messages" if names == ("role", "content") else "conversations"
    if names not in (("role", "content"), ("from", "value")):
        at.drop(key, f"messages with the keys {names[0]} and {names[1]} are not read")
    column = columns.get("messages", "conversations")
    return {"format": form} | ({"columns": {form: column}} if column != form else {})


def _drop_columns(
    at: Conversion, key: str, columns: dict[str, Any], names: tuple[str, ...]
) -> None:
    for name in names:
        if columns.get(name):
            at.drop(key, f"the column `{columns[name]}` ({name}) is not read")


def set_template(at: Conversion, name: Any, *, is_text: bool) -> None:
    """Set the prompt template: most names of LLaMA-Factory are forms of a chat template."""
    if is_text or name is None:
        if name is None and not is_text:
            at.differ(
                "template",
                "is not set: instruction rows take the Alpaca form, and "
                "conversations the chat template",
            )
        return
    own = _OWN_TEXTS.get(str(name))
    at.set("data.template", own or "chat", "template")
    if own is None:
        at.differ(
            "template",
            f"`{name}` is LLaMA-Factory's own text; `chat` is the tokenizer's "
            "chat template: compare them with `wegeft preview`",
        )
