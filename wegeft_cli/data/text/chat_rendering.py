"""Render a conversation as one text and find the assistant's turns in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wegeft_cli.data.sources.messages import check_characters
from wegeft_cli.errors import UserError

Message = Mapping[str, Any]
ApplyChatTemplate = Callable[..., str]
"""(messages, add_generation_prompt) -> the text of a conversation; rows with tools give them as
`tools` too."""


@dataclass(frozen=True)
class Segment:
    """A piece of a row's text, learned or only read."""

    text: str
    trained: bool


@dataclass(frozen=True)
class RenderedText:
    """A row as text.

    Args:
        segments: Pieces that make up the whole text in order.
        append_eos: Whether the end-of-text token follows the text and is learned.
        add_special_tokens: Whether the tokenizer adds its own (BOS). Off for conversations: a chat
            template writes them itself, and inference servers add none either.
        render_whole: Renders the row with all turns, not only those before `max_characters`.
        is_unmarked: Whether the row marks all of its answers as not learned.
    """

    segments: tuple[Segment, ...]
    append_eos: bool = True
    add_special_tokens: bool = True
    render_whole: Callable[[], RenderedText] | None = None
    is_unmarked: bool = False

    @property
    def text(self) -> str:
        """Return the whole text."""
        return "".join(segment.text for segment in self.segments)

    @property
    def is_blank(self) -> bool:
        """Whether all learned pieces are blank."""
        return not any(segment.trained and segment.text.strip() for segment in self.segments)


def render_chat(
    messages: Sequence[Message],
    flags: Sequence[bool | None],
    loss_on: str,
    apply_chat_template: ApplyChatTemplate,
    max_characters: int | None,
) -> RenderedText:
    """Render a conversation and find its learned turns as character spans of the one text.

    A turn is the text from the end of the generation prompt to the end of the conversation up to
    this turn. Both are found by rendering prefixes, so it works for every template whose prefixes
    are prefixes of the whole, with or without `{% generation %}` marks.

    Args:
        flags: Whether each message is learned; None leaves the choice to `loss_on`.

    Raises:
        UserError: If there is nothing to learn from, or the template does not show the answers.
    """
    turns = _choose_turns(messages, flags, loss_on)
    # Text after the last answer is not learned.
    messages = messages[: max(turns) + 1]
    whole = apply_chat_template(messages, False)
    # It can come from any key of a message or a tool.
    check_characters("the conversation as the chat template writes it", whole)
    render_whole = None
    segments: list[Segment] = []
    position = 0
    last_tail = ""
    for turn, is_learned in turns.items():
        if max_characters is not None and position > max_characters:
            render_whole = functools.partial(
                render_chat, messages, flags, loss_on, apply_chat_template, None
            )
            break
        message = messages[turn]
        begin, end = _turn_span(messages, turn, whole, apply_chat_template)
        answer, last_tail = _split_tail(whole[begin:end], message)
        if is_learned and message.get("tool_calls"):
            _check_calls_shown(messages, turn, whole[:end], apply_chat_template)
        segments.append(Segment(whole[position:begin], loss_on == "all"))
        is_said = bool(message["content"].strip() or message.get("tool_calls"))
        segments.append(Segment(answer, is_learned and (is_said or loss_on == "all")))
        position = begin + len(answer)
    segments.append(Segment(whole[position:], loss_on == "all"))
    return RenderedText(
        tuple(segment for segment in segments if segment.text),
        # A template that writes nothing after the answer never says when to stop.
        append_eos=not last_tail.strip(),
        add_special_tokens=False,
        render_whole=render_whole,
        is_unmarked=loss_on != "all" and not any(turns.values()),
    )


def _choose_turns(
    messages: Sequence[Message], flags: Sequence[bool | None], loss_on: str
) -> dict[int, bool]:
    """Return the assistant's turns to find in the text -> whether they are learned."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("the conversation has no turn of the role `assistant`")
    if turns[0] == 0:
        if len(turns) == 1:
            raise UserError(
                "the conversation begins with the turn of the assistant: nothing asks it"
            )
        del turns[0]  # a greeting: read, not learned
    learned = {turn: flags[turn] for turn in turns}
    for turn, flag in learned.items():
        if flag is None:
            learned[turn] = loss_on != "completion" or turn == turns[-1]
    if loss_on != "all" and any(learned.values()):
        return {turn: True for turn, flag in learned.items() if flag}
    # The whole is learned but for what says that it is not; or nothing is.
    return {turn: bool(learned[turn]) for turn in turns if not learned[turn] or turn == turns[-1]}


def _turn_span(
    messages: Sequence[Message], turn: int, whole: str, apply_chat_template: ApplyChatTemplate
) -> tuple[int, int]:
    before = apply_chat_template(messages[:turn], True)
    upto = whole
    if turn + 1 < len(messages):
        upto = apply_chat_template(messages[: turn + 1], False)
    if not (whole.startswith(upto) and upto.startswith(before)):
        raise UserError(
            f"the chat template writes turn {turn + 1} otherwise once later turns follow or its "
            "answer is there, so the answer cannot be separated from the prompt",
            hint="use data.loss_on: completion, or a Jinja file of your own as data.template",
        )
    return len(before), len(upto)


def _check_calls_shown(
    messages: Sequence[Message], turn: int, upto: str, apply_chat_template: ApplyChatTemplate
) -> None:
    """Raise UserError for a template that does not show the answer's tool calls."""
    bare = {name: value for name, value in messages[turn].items() if name != "tool_calls"}
    try:
        without = apply_chat_template([*messages[:turn], bare], False)
    except UserError:
        return  # it looks at the calls
    if without == upto:
        raise UserError(
            f"the chat template drops the answer of turn {turn + 1}: it does not show its tool "
            "call",
            hint="use a data.template that knows tool calls",
        )


def _split_tail(span: str, message: Message) -> tuple[str, str]:
    """Split a turn into the learned part and the text after the content.

    The end-of-turn mark is learned; the white space after it is not, because sampling stops at the
    mark.
    """
    content = message["content"].strip()
    found = span.find(content)
    if found < 0:
        raise UserError(
            f"the chat template does not show the answer {content[:40]!r} unchanged",
            hint="use another data.template",
        )
    tail = span[found + len(content) :]
    return (span.rstrip() if tail.strip() else span), tail
