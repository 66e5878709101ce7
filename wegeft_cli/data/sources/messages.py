"""Parse conversations in several notations into lists of {role, content}."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from wegeft_cli.errors import UserError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Who speaks, by the names that files use -> by the name that chat templates know."""

RESERVED_ARGUMENTS = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
        "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
        "return_tensors", "sanitize_control_tokens", "self", "tokenize", "tokenizer_kwargs",
        "tools", "truncation",
    }
)  # fmt: skip
"""Names that variables of a chat template cannot have."""

_FLAGS = ("train", "weight")  # axolotl's and OpenAI's word for "learn this turn, or not"


def check_text(column: str, value: Any) -> str:
    """Return a column's value if it is valid text, else raise UserError."""
    if not isinstance(value, str):
        raise UserError(f"`{column}` must be text, got {value!r:.60} ({type(value).__name__})")
    check_characters(f"`{column}`", value)
    return value


def is_number(value: Any) -> bool:
    """Return whether a value is a number that JSON can hold; truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def read_text(column: str, value: Any) -> str:
    """Return a column's text, or a number's JSON text; else raise UserError."""
    if is_number(value):
        return json.dumps(value)
    return check_text(column, value)


def check_characters(subject: str, text: str) -> None:
    """Raise UserError if a text holds half of a surrogate pair; `subject` names the text."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{subject} holds half of a surrogate pair at character {error.start}"
        ) from error


def read_conversation(column: str, value: Any) -> dict[str, Any]:
    """Parse a list of messages, {role, content} or {from, value}.

    Return `messages` in the form of chat templates. If a message states whether it is learned
    (`train: false`, `weight: 0`), also return `learned`: true, false, or None for each message.
    """
    if not isinstance(value, list) or not value:
        raise UserError(
            f"`{column}` must be a list of {{role, content}} or {{from, value}}, got "
            f"{value!r:.60} ({type(value).__name__})"
        )
    messages: list[dict[str, Any]] = []
    learned: list[bool | None] = []
    for number, message in enumerate(value, start=1):
        place = f"{column}[{number}]"
        if not isinstance(message, Mapping):
            raise UserError(
                f"message {number} must be {{role, content}} or {{from, value}}, got "
                f"{message!r:.60}"
            )
        # Tables fill absent keys with null, which templates take for present.
        given = {key: part for key, part in message.items() if part is not None}
        learned.append(_read_flag(given, place))
        messages.append(_read_message(given, place))
        if learned[-1] and messages[-1]["role"] != "assistant":
            raise UserError(
                f"`{place}` of the role {messages[-1]['role']!r} is marked as learned; only turns "
                "of the assistant can be"
            )
    said = {"learned": learned} if any(flag is not None for flag in learned) else {}
    return {"messages": messages, **said}


def join_conversations(prompt: Any, completion: Any) -> dict[str, Any]:
    """Parse a prompt and a completion that are lists of messages.

    Return the fields of `read_conversation` and `num_prompt`, the number of messages of the prompt.
    The prompt's messages are learned only if they say so, or if all text is learned.
    """
    before = read_conversation("prompt", prompt)
    after = read_conversation("completion", completion)
    flags = after.get("learned", [None] * len(after["messages"]))
    learned = [
        message["role"] == "assistant" if flag is None else flag
        for message, flag in zip(after["messages"], flags, strict=True)
    ]
    not_said = [None] * len(before["messages"])
    return {
        "messages": before["messages"] + after["messages"],
        "learned": before.get("learned", not_said) + learned,
        "num_prompt": len(before["messages"]),
    }


def read_tools(column: str, value: Any) -> list[Any]:
    """Parse the tools that a conversation may call: a list, or the JSON text of one."""
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"`{column}` is not JSON: {error}") from error
    if not isinstance(tools, list):
        raise UserError(f"`{column}` must be a list of tools, got {value!r:.60}")
    return tools


def read_arguments(column: str, value: Any) -> dict[str, Any]:
    """Parse the variables of a chat template: an object, or the JSON text of one."""
    arguments = value
    if isinstance(value, str):
        try:
            arguments = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"`{column}` is not JSON: {error}") from error
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise UserError(f"`{column}` must be an object of template variables, got {value!r:.60}")
    # Tables fill absent keys with null, which templates take for present.
    given = {name: part for name, part in arguments.items() if part is not None}
    check_arguments(column, given)
    return given


def check_arguments(subject: str, arguments: Mapping[str, Any]) -> None:
    """Raise UserError if a template variable has the name of one that every rendering sets."""
    taken = sorted(RESERVED_ARGUMENTS.intersection(arguments))
    if taken:
        raise UserError(f"`{subject}` cannot set {taken[0]!r}, which every rendering sets itself")


def _read_flag(message: dict[str, Any], place: str) -> bool | None:
    """Remove the flag from a message and return it."""
    flags = [message.pop(name) for name in _FLAGS if name in message]
    # Compared by value, so 0 and 1 (OpenAI's weights) are as good as false and true.
    if any(flag not in (False, True) for flag in flags) or len(set(flags)) > 1:
        raise UserError(f"`{place}`: train or weight must be true or false, got {flags!r:.60}")
    return bool(flags[0]) if flags else None


def _read_message(message: dict[str, Any], place: str) -> dict[str, Any]:
    if "role" not in message and "from" in message:
        speaker = check_text(f"{place}.from", message.pop("from"))
        if speaker.lower() not in ROLES:
            raise UserError(
                f"`{place}.from` is {speaker!r:.40}; known are {', '.join(ROLES)}",
                hint="use {role, content}, whose roles the chat template gets unchanged",
            )
        said = read_text(f"{place}.value", message.pop("value", None))
        return {**message, "role": ROLES[speaker.lower()], "content": said}
    role = check_text(f"{place}.role", message.get("role"))
    content: Any = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    elif isinstance(content, list):
        content = _join_parts(content, f"{place}.content")
    # Unknown roles are left to the chat template.
    role = ROLES.get(role.lower(), role)
    return {**message, "role": role, "content": read_text(f"{place}.content", content)}


def _join_parts(parts: list[Any], place: str) -> str:
    texts = []
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise UserError(f"`{place}` part {number} is not text: {part!r:.60}")
        texts.append(check_text(f"{place}[{number}].text", part.get("text")))
    return "".join(texts)
