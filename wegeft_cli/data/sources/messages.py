"""A conversation becomes a list of {role, content}, whichever way its file writes one."""

from __future__ import annotations

import json
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

_FLAGS = ("train", "weight")  # axolotl's and OpenAI's word for "learn this turn, or not"


def check_text(column: str, value: Any) -> str:
    """Refuse what is not text that can be written.

    Args:
        column: Where it stands, for the message.
        value: What stands there.

    Returns:
        The text.

    Raises:
        UserError: If it is not text, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise UserError(f"`{column}` must be text, got {value!r:.60} ({type(value).__name__})")
    check_characters(f"`{column}`", value)
    return value


def check_characters(subject: str, text: str) -> None:
    """Refuse a text that cannot be written.

    Args:
        subject: What it is, for the message.
        text: The text.

    Raises:
        UserError: If it holds half of a surrogate pair.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{subject} holds half of a surrogate pair at character {error.start}"
        ) from error


def read_conversation(column: str, value: Any) -> dict[str, Any]:
    """Read a list of messages, {role, content} or {from, value}.

    Args:
        column: The column, for messages about faults.
        value: What the row holds.

    Returns:
        `messages` in the form of chat templates, and `learned` if a message says itself whether it
        is learned (`train: false`, `weight: 0`): for each message true, false, or None where it
        does not say.

    Raises:
        UserError: If a message has no text, an unknown speaker or a wrong flag.
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
    """Read a prompt and a completion that are lists of messages.

    Args:
        prompt: Messages that are only read, but for turns that say that they are learned, and
            where all text is learned.
        completion: Messages whose turns of the assistant are learned.

    Returns:
        As `read_conversation`, and `num_prompt`, how many of the messages are the prompt's.

    Raises:
        UserError: If one of them is no such list.
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
    """Read the tools that a conversation may call: a list, or the JSON text of one.

    Args:
        column: The column, for messages about faults.
        value: What the row holds.

    Returns:
        The list.

    Raises:
        UserError: If it is neither.
    """
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"`{column}` is not JSON: {error}") from error
    if not isinstance(tools, list):
        raise UserError(f"`{column}` must be a list of tools, got {value!r:.60}")
    return tools


def _read_flag(message: dict[str, Any], place: str) -> bool | None:
    """Take the flag out of a message."""
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
                hint="use {role, content}, whose roles go to the chat template as they stand",
            )
        said = check_text(f"{place}.value", message.pop("value", None))
        return {**message, "role": ROLES[speaker.lower()], "content": said}
    role = check_text(f"{place}.role", message.get("role"))
    content: Any = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    elif isinstance(content, list):
        content = _join_parts(content, f"{place}.content")
    # Roles that are not known are the chat template's own.
    role = ROLES.get(role.lower(), role)
    return {**message, "role": role, "content": check_text(f"{place}.content", content)}


def _join_parts(parts: list[Any], place: str) -> str:
    texts = []
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise UserError(f"`{place}` part {number} is not text: {part!r:.60}")
        texts.append(check_text(f"{place}[{number}].text", part.get("text")))
    return "".join(texts)
