"""Render a conversation as one text and find the assistant's turns in it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wegeft_cli.data.sources.messages import check_characters
from wegeft_cli.errors import UserError
from wegeft_cli.storage.json_files import shorten

Message = Mapping[str, Any]
ApplyChatTemplate = Callable[..., str]
"""(messages, add_generation_prompt) -> the text of a conversation; rows with tools give them as
`tools` too, and rows with template arguments give these as `arguments`."""
FindMarks = Callable[..., list[tuple[int, int]] | None]
"""messages -> the characters that the template marks as answers; None without marks."""

_EMPTY_BLOCK = re.compile(r"<([a-zA-Z_]+)>\s*</\1>")
_LONGEST_MARK = 40


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
        earlier: Sequences of earlier answers of a conversation, where the chat template writes
            these differently once later turns follow.
        added_block: An empty block that the template writes into a learned answer and the row does
            not hold, such as `<think></think>`.
    """

    segments: tuple[Segment, ...]
    append_eos: bool = True
    add_special_tokens: bool = True
    render_whole: Callable[[], RenderedText] | None = None
    is_unmarked: bool = False
    earlier: tuple[RenderedText, ...] = ()
    added_block: str | None = None

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
    find_marks: FindMarks | None = None,
) -> RenderedText:
    """Render a conversation and find its learned turns as character spans of the text.

    Marks of the template (`{% generation %}`) are the learned spans. Without marks, a turn is the
    text from the end of the generation prompt to the end of the conversation up to this turn. Both
    are found by rendering prefixes. A template that writes an answer differently once later turns
    follow gets one sequence for each answer, rendered as the model will be prompted for it.

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
    if loss_on != "all":
        if not any(turns.values()):
            return RenderedText(
                (Segment(whole, False),), add_special_tokens=False, is_unmarked=True
            )
        marks = None if find_marks is None else find_marks(messages)
        if marks is not None:
            assert find_marks is not None
            return _render_marked(messages, turns, whole, marks, find_marks)
    spans: dict[int, tuple[int, int]] = {}
    position, render_whole = 0, None
    for turn in turns:
        if max_characters is not None and position > max_characters:
            render_whole = functools.partial(
                render_chat, messages, flags, loss_on, apply_chat_template, None
            )
            break
        before, upto = _render_turn(messages, turn, whole, apply_chat_template)
        if not whole.startswith(upto) and loss_on != "all":
            return _render_separately(messages, list(turns), apply_chat_template, max_characters)
        if not (whole.startswith(upto) and upto.startswith(before)):
            raise _inseparable(turn)
        spans[turn] = len(before), len(upto)
        position = len(upto)
    rendered = _build_text(messages, whole, spans, turns, loss_on, apply_chat_template)
    return replace(rendered, render_whole=render_whole)


def _render_turn(
    messages: Sequence[Message], turn: int, whole: str, apply_chat_template: ApplyChatTemplate
) -> tuple[str, str]:
    """Return the text before an answer, and the text up to its end."""
    before = apply_chat_template(messages[:turn], True)
    if turn + 1 == len(messages):
        return before, whole
    return before, apply_chat_template(messages[: turn + 1], False)


def _inseparable(turn: int) -> UserError:
    return UserError(
        f"the chat template writes turn {turn + 1} differently once its answer is there, so the "
        "answer cannot be separated from the prompt",
        hint="set data.chat_template_kwargs if the template has a variable for this, or write your "
        "own Jinja file as data.template",
    )


def _render_separately(
    messages: Sequence[Message],
    turns: Sequence[int],
    apply_chat_template: ApplyChatTemplate,
    max_characters: int | None,
) -> RenderedText:
    """Render the learned answers in as few sequences as the template's text allows."""
    texts: dict[int, tuple[str, str]] = {}
    for turn in turns:
        before = apply_chat_template(messages[:turn], True)
        upto = apply_chat_template(messages[: turn + 1], False)
        if not upto.startswith(before):
            raise _inseparable(turn)
        check_characters("the conversation as the chat template writes it", upto)
        texts[turn] = before, upto
        if max_characters is not None and len(before) > max_characters:
            break  # later answers are cut away too
    groups: list[list[int]] = []
    for turn in reversed(texts):
        if groups and texts[groups[-1][0]][1].startswith(texts[turn][1]):
            groups[-1].append(turn)
        else:
            groups.append([turn])
    sequences = [
        _build_text(
            messages,
            texts[group[0]][1],
            {turn: (len(texts[turn][0]), len(texts[turn][1])) for turn in sorted(group)},
            dict.fromkeys(group, True),
            "assistant",
            apply_chat_template,
        )
        for group in reversed(groups)
    ]
    return replace(sequences[-1], earlier=tuple(sequences[:-1]))


def _build_text(
    messages: Sequence[Message],
    whole: str,
    spans: Mapping[int, tuple[int, int]],
    turns: Mapping[int, bool],
    loss_on: str,
    apply_chat_template: ApplyChatTemplate,
) -> RenderedText:
    """Cut a text into segments at its turns, given as turn -> characters in ascending order."""
    segments: list[Segment] = []
    position = 0
    last_tail = ""
    added_block = None
    for turn, (begin, end) in spans.items():
        message, is_learned = messages[turn], turns[turn]
        answer, last_tail = _split_tail(whole[begin:end], message)
        if is_learned and message.get("tool_calls"):
            _check_calls_shown(messages, turn, whole[:end], apply_chat_template)
        segments.append(Segment(whole[position:begin], loss_on == "all"))
        is_said = bool((message.get("content") or "").strip() or message.get("tool_calls"))
        segments.append(Segment(answer, is_learned and (is_said or loss_on == "all")))
        position = begin + len(answer)
        if is_learned and added_block is None:
            added_block = _find_added_block(whole, begin, position, message)
    segments.append(Segment(whole[position:], loss_on == "all"))
    return RenderedText(
        tuple(segment for segment in segments if segment.text),
        # A template that writes nothing after the answer never says when to stop.
        append_eos=not last_tail.strip(),
        add_special_tokens=False,
        added_block=added_block,
    )


def _render_marked(
    messages: Sequence[Message],
    turns: Mapping[int, bool],
    whole: str,
    marks: Sequence[tuple[int, int]],
    find_marks: FindMarks,
) -> RenderedText:
    """Learn the marked characters of the learned turns."""
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marks) == len(answers):
        by_turn = {turn: [mark] for turn, mark in zip(answers, marks, strict=True)}
    else:
        ends = {turn: len(find_marks(messages[: turn + 1]) or ()) for turn in answers}
        starts = [0, *ends.values()]
        by_turn = {
            turn: list(marks[start:end])
            for start, (turn, end) in zip(starts, ends.items(), strict=False)
        }
    segments: list[Segment] = []
    position = 0
    for turn in turns:
        for begin, end in by_turn[turn]:
            segments += [Segment(whole[position:begin], False), Segment(whole[begin:end], True)]
            position = end
    if not any(segment.trained for segment in segments):
        raise UserError("the chat template marks no part of the answer by `{% generation %}`")
    segments.append(Segment(whole[position:], False))
    last = max(turns)
    content = (messages[last].get("content") or "").strip()
    tail = whole[by_turn[last][0][0] :].partition(content)[2] if content and by_turn[last] else "."
    return RenderedText(
        tuple(segment for segment in segments if segment.text),
        append_eos=not tail.strip(),
        add_special_tokens=False,
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
    content = (message.get("content") or "").strip()
    end = _find_end(span, content)
    if end is None:
        raise UserError(
            f"the chat template does not show the answer {shorten(content)} unchanged",
            hint="use a data.template that writes {{ message['content'] }} of each turn as it is",
        )
    tail = span[end:]
    return (span.rstrip() if tail.strip() else span), tail


def _find_end(span: str, content: str) -> int | None:
    """Return where the content ends in a turn; the template may change white space at thoughts."""
    found = span.find(content)
    if found >= 0:
        return found + len(content)
    position = 0
    for part in re.split(r"(</?think>)", content):
        found = span.find(part.strip(), position)
        if found < 0:
            return None
        position = found + len(part.strip())
    return position


def _find_added_block(whole: str, begin: int, end: int, message: Message) -> str | None:
    """Return an empty block in the answer that the template adds, with its white space removed."""
    said = json.dumps(message, ensure_ascii=False, default=str)
    # The generation prompt may already hold the block's first mark.
    for match in _EMPTY_BLOCK.finditer(whole, max(begin - _LONGEST_MARK, 0), end):
        if match.end() > begin and f"<{match.group(1)}>" not in said:
            return f"<{match.group(1)}></{match.group(1)}>"
    return None
