"""Conversations become prompts in the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wegeft_cli.data.chat import build_template, find_turn_ends
from wegeft_cli.data.templates import CHAT
from wegeft_cli.errors import UserError

Turns = Sequence[Mapping[str, str]]
"""Messages with role and content, the user's last."""


class ChatPrompts(NamedTuple):
    """Prompts in a chat template.

    They hold the special tokens: encode them with `add_special_tokens` off.
    """

    texts: dict[int, str]
    """By the conversations' numbers."""
    template_hash: str
    turn_ends: list[int]
    """Tokens that end the model's turn."""


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def write_chat_prompts(
    tokenizer: Any, conversations: Mapping[int, Turns], *, protocol: str, other: str
) -> ChatPrompts:
    """Write conversations as the model was taught to read them, up to where it answers.

    Args:
        tokenizer: Holds the chat template.
        conversations: By whatever number.
        protocol: Who asks so, for the fault.
        other: Which protocol asks otherwise, for its hint.

    Returns:
        The prompts.

    Raises:
        UserError: If there is no chat template, or it refuses a conversation.
    """
    try:
        chat = build_template(CHAT, tokenizer, None)
    except UserError as fault:
        raise UserError(
            fault.message,
            key="protocol",
            hint=f"`{protocol}` asks in the model's own chat template: use an instruction-tuned "
            f"model, or the protocol `{other}`",
        ) from fault
    assert chat.apply is not None
    texts = {
        number: chat.apply([dict(turn) for turn in turns], True)
        for number, turns in conversations.items()
    }
    return ChatPrompts(texts, chat.digest, find_turn_ends(chat, tokenizer))
