"""The entries of axolotl's `datasets`."""

from __future__ import annotations

from typing import Any

from wegeft_cli.recipe.importing.conversion import Conversion

_HANDLED = (
    "path", "name", "split", "type", "data_files", "ds_type", "field", "field_messages",
    "field_instruction", "field_input", "field_output", "message_property_mappings",
    "message_field_role", "message_field_content", "roles", "roles_to_train", "train_on_eos",
    "conversation", "chat_template", "trust_remote_code",
)  # fmt: skip
_BUILDERS = ("json", "jsonl", "csv", "parquet", "text", "arrow")
_CONVERSATION_NAMES = ("from", "value")


def convert_sources(at: Conversion, key: str, entries: Any) -> list[dict[str, Any]]:
    """Return the entries as sources of `data.train` or `data.validation`."""
    sources = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if isinstance(entry, dict):
            sources.extend(_convert_source(at, f"{key}[{number}]", entry))
    return sources


def _convert_source(at: Conversion, key: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    rest: dict[str, Any] = {}
    if entry.get("name"):
        rest["name"] = entry["name"]
    if entry.get("split") and entry["split"] != "train":
        rest["split"] = entry["split"]
    rest |= _convert_type(at, key, entry)
    for name, value in entry.items():
        if name not in _HANDLED and value is not None:
            at.drop(f"{key}.{name}")
    return [{"path": path, **rest} for path in _find_paths(at, key, entry)]


def _find_paths(at: Conversion, key: str, entry: dict[str, Any]) -> list[str]:
    path, files = str(entry.get("path") or ""), entry.get("data_files")
    if not files:
        return [path]
    files = [files] if isinstance(files, str) else [str(file) for file in files]
    if path in _BUILDERS:
        return files
    at.drop(f"{key}.data_files", f"the files {', '.join(files)} of a hub dataset cannot be named")
    at.require("data.train", f"download {', '.join(files)} of {path} and set the local path")
    return [path]


def _convert_type(at: Conversion, key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return format and columns of a source."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        return _convert_own_prompt(at, key, kind)
    name = str(kind or "").partition(":")[0].partition(".")[0]
    if name == "alpaca":
        return {"format": "instruction"}
    if name == "completion":
        field = entry.get("field")
        return {"format": "text"} | ({"columns": {"text": field}} if field else {})
    if name in ("chat_template", "sharegpt"):
        return _convert_messages(at, key, entry, is_sharegpt=name == "sharegpt")
    if kind == "alpaca_chat.load_qa":
        at.differ(
            f"{key}.type",
            "`load_qa` writes question and answer as a chat; check the prompt "
            "with `wegeft preview`",
        )
        return {"format": "instruction",
                "columns": {"instruction": "question", "output": "answer"}}  # fmt: skip
    if kind is None:
        at.differ(f"{key}.type", "is not set: the format is detected from the columns")
    else:
        at.drop(
            f"{key}.type",
            f"`{kind}` has no counterpart: the format is detected from the "
            "columns; check the prompt with `wegeft preview`",
        )
    return {}


def _convert_messages(
    at: Conversion, key: str, entry: dict[str, Any], *, is_sharegpt: bool
) -> dict[str, Any]:
    at.fill({"data.loss_on": "assistant"})
    mapping = entry.get("message_property_mappings") or {}
    role = entry.get("message_field_role") or mapping.get("role", "role")
    content = entry.get("message_field_content") or mapping.get("content", "content")
    if is_sharegpt or (role, content) == _CONVERSATION_NAMES:
        form, default = "conversations", "conversations"
    else:
        form, default = "messages", "messages"
        if (role, content) != ("role", "content"):
            at.drop(
                f"{key}.message_property_mappings",
                f"`{role}` and `{content}`: messages are "
                "read from `role` and `content`, or `from` and `value`",
            )
    column = entry.get("field_messages") or ("conversations" if is_sharegpt else "messages")
    if (roles := entry.get("roles_to_train")) and list(roles) not in (["assistant"], ["gpt"]):
        at.drop(f"{key}.roles_to_train", f"{roles}: only the assistant's turns are learned")
    if entry.get("train_on_eos") not in (None, "turn"):
        at.drop(f"{key}.train_on_eos", "the end of every learned turn is learned")
    if (name := entry.get("chat_template")) not in (None, "tokenizer_default"):
        at.differ(f"{key}.chat_template", f"`{name}`: the tokenizer's chat template is used")
    return {"format": form} | ({"columns": {default: column}} if column != default else {})


def _convert_own_prompt(at: Conversion, key: str, kind: dict[str, Any]) -> dict[str, Any]:
    """Convert a prompt that the recipe defines: its columns, and its text as a remark."""
    fields = {"instruction": "field_instruction", "input": "field_input", "output": "field_output"}
    columns = {
        name: kind[field]
        for name, field in fields.items()
        if kind.get(field) and kind[field] != name
    }
    own = [name for name in ("format", "no_input_format", "system_prompt") if kind.get(name)]
    if own:
        at.drop(
            f"{key}.type",
            f"its own {' and '.join(own)} have no counterpart: data.template "
            "takes a template's name or a .jinja file",
        )
    return {"format": "instruction"} | ({"columns": columns} if columns else {})
