"""A row becomes text: every prompt form by name, byte for byte, and which part of it is learned."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from wegeft_cli.errors import UserError

AUTO = "auto"
CHAT = "chat"

Message = Mapping[str, Any]
ApplyChatTemplate = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> the text of a conversation."""


@dataclass(frozen=True)
class Segment:
    """A piece of a row's text, learned or only read."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Args:
        segments: Pieces that make up the whole text in order.
        append_eos: Whether the end-of-text token follows the text and is learned.
        add_special_tokens: Whether the tokenizer adds its own (BOS). Off for conversations: a chat
            template writes them itself, and what serves the model adds none either.
    """

    segments: tuple[Segment, ...]
    append_eos: bool = True
    add_special_tokens: bool = True

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(segment.text for segment in self.segments)

    @property
    def is_blank(self) -> bool:
        """Whether no learned piece holds anything but white space."""
        return not any(segment.trained and segment.text.strip() for segment in self.segments)


@dataclass(frozen=True)
class PairTemplate:
    """A prompt and a completion around a row's instruction and output.

    Args:
        prompt: Text before the completion, with `{instruction}`.
        completion: What is learned, with `{output}`.
        prompt_with_input: The prompt of rows with an `input`; none means such rows do not fit.
        answer_mark: What stands for GSM8K's `####` in the completion.
    """

    prompt: str
    completion: str = "{output}"
    prompt_with_input: str | None = None
    answer_mark: str | None = None


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# LLM-Adapters indents the prompt as its source code stands, blank line included.
_INDENT = " " * 16
_LLM_ADAPTERS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    f"the request.  \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
    f"{_INDENT}### Response:\n{_INDENT}"
)
_GSM8K = (
    "{instruction}\nAnswer the above question. First think step by step and then answer the final "
    "number.\n"
)

TEMPLATES: dict[str, PairTemplate | None] = {
    "alpaca": PairTemplate(_ALPACA, prompt_with_input=_ALPACA_WITH_INPUT),
    "plain": PairTemplate("{instruction}"),
    CHAT: None,
    "commonsense": PairTemplate("{instruction}\n"),
    "question_answer": PairTemplate("Question: {instruction}\nAnswer:", " {output}"),
    "llm_adapters": PairTemplate(_LLM_ADAPTERS),
    "gsm8k_wegeft": PairTemplate(_GSM8K, answer_mark="The answer is:"),
    "gsm8k_gift": PairTemplate(_GSM8K, answer_mark="The final answer is: "),
    # LoRA-GA joins x and y by a space and masks the tokens of x: the space is learned.
    "metamath": PairTemplate("Q: {instruction}\nA: ", " {output}"),
    "lora_ga": PairTemplate(_ALPACA, " {output}"),
}
"""Every template by name; none stands for the tokenizer's own chat template."""


def is_template_file(template: str) -> bool:
    """Whether `data.template` names a user's own Jinja file."""
    return PurePath(template).suffix in {".jinja", ".j2"}


def check_template(template: str) -> None:
    """Refuse a template name that does not exist, with the nearest one as the hint."""
    if template in {AUTO, *TEMPLATES} or is_template_file(template):
        return
    near = difflib.get_close_matches(template, TEMPLATES, n=1)
    hint = f"did you mean {near[0]}?" if near else "or the path of a .jinja file"
    raise UserError(
        f"no template {template!r}; there are auto, {', '.join(sorted(TEMPLATES))}",
        key="data.template",
        hint=hint,
    )


def template_hash(name_or_text: str) -> str:
    """Fingerprint of a prompt form, to tell two results apart.

    Args:
        name_or_text: A template's name, or a chat template's Jinja text.

    Returns:
        The first 16 hex digits of the SHA-256 of the form's own text.
    """
    template = TEMPLATES.get(name_or_text)
    if template is None:
        text = name_or_text
    else:
        parts = (template.prompt, template.completion, template.prompt_with_input)
        text = "\0".join(part or "" for part in (*parts, template.answer_mark))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render_row(
    row: Mapping[str, Any],
    *,
    template: str,
    loss_on: str,
    apply_chat_template: ApplyChatTemplate | None = None,
) -> Rendered:
    """Write a row as text and say which part of it is learned.

    Args:
        row: `instruction`, `input` (may be left out), `output`; or `prompt`, `completion`; or
            `messages`; or `text`. Texts are learned as a whole.
        template: A name out of `TEMPLATES`, `auto`, or the path of a Jinja file (whose text
            `apply_chat_template` applies).
        loss_on: completion (of a conversation: its last assistant turn), assistant (every
            assistant turn), all.
        apply_chat_template: Renders a conversation; needed for `chat` and Jinja files.

    Returns:
        The pieces of text.

    Raises:
        UserError: If the row does not fit the template (with `key` set), or the template does not
            show the row's answer (without).
    """
    check_template(template)
    if template == AUTO:
        template = _choose_template(row)
    pair = TEMPLATES.get(template)
    if pair is None:
        if "text" in row:
            raise _misfit("text", template, "auto")
        if apply_chat_template is None:
            raise ValueError("a chat template needs apply_chat_template")
        messages = row["messages"] if "messages" in row else _as_messages(row)
        return _render_chat(messages, loss_on, apply_chat_template)
    if "messages" in row:
        raise _misfit("messages", template, CHAT)
    if "text" in row:
        if template != "plain":
            raise _misfit("text", template, "auto")
        return Rendered((Segment(row["text"], True),))
    return _render_pair(row, pair, template, loss_on)


def _choose_template(row: Mapping[str, Any]) -> str:
    if "messages" in row:
        return CHAT
    return "alpaca" if "instruction" in row else "plain"


def _misfit(rows: str, template: str, better: str) -> UserError:
    return UserError(
        f"rows of `{rows}` do not fit the template {template!r}",
        key="data.template",
        hint=f"use data.template: {better}",
    )


def _pair_fields(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The row's (instruction, input, output), under either pair of names."""
    if "prompt" in row:
        return row["prompt"], "", row["completion"]
    return row["instruction"], row.get("input") or "", row["output"]


def _render_pair(
    row: Mapping[str, Any], template: PairTemplate, name: str, loss_on: str
) -> Rendered:
    instruction, extra, output = _pair_fields(row)
    form = template.prompt
    if extra.strip():
        if template.prompt_with_input is None:
            raise UserError(
                f"the template {name!r} has no place for `input`, got {extra[:40]!r}",
                hint="use data.template: alpaca, or leave `input` empty",
            )
        form = template.prompt_with_input
    if template.answer_mark is not None:
        output = output.replace("####", template.answer_mark)
    # The values go in by one call: braces inside a row are never read as fields.
    prompt = form.format(instruction=instruction, input=extra)
    completion = template.completion.format(output=output)
    return Rendered((Segment(prompt, loss_on == "all"), Segment(completion, True)))


def _as_messages(row: Mapping[str, Any]) -> list[Message]:
    instruction, extra, output = _pair_fields(row)
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": output},
    ]


def _render_chat(
    messages: Sequence[Message], loss_on: str, apply_chat_template: ApplyChatTemplate
) -> Rendered:
    """Render a conversation and find its learned turns as character spans of the one text.

    A turn runs from where the generation prompt ends to where the rendering of the conversation up
    to it ends. Both are found by rendering prefixes, so it works for every template whose prefixes
    are prefixes of the whole, whether or not it marks its turns with `{% generation %}`.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("the conversation has no turn of the role `assistant`")
    # What follows the last answer teaches nothing.
    messages = messages[: turns[-1] + 1]
    whole = apply_chat_template(messages, False)
    segments: list[Segment] = []
    position = 0
    last_tail = ""
    for turn in turns if loss_on == "assistant" else turns[-1:]:
        begin, end = _turn_span(messages, turn, whole, apply_chat_template)
        answer, last_tail = _split_tail(whole[begin:end], messages[turn]["content"])
        segments.append(Segment(whole[position:begin], loss_on == "all"))
        is_said = bool(messages[turn]["content"].strip())
        segments.append(Segment(answer, is_said or loss_on == "all"))
        position = begin + len(answer)
    segments.append(Segment(whole[position:], loss_on == "all"))
    return Rendered(
        tuple(segment for segment in segments if segment.text),
        # A template that writes nothing after the answer never says when to stop.
        append_eos=not last_tail.strip(),
        add_special_tokens=False,
    )


def _turn_span(
    messages: Sequence[Message], turn: int, whole: str, apply_chat_template: ApplyChatTemplate
) -> tuple[int, int]:
    if turn == 0:
        raise UserError("the conversation begins with the turn of the assistant: nothing asks it")
    before = apply_chat_template(messages[:turn], True)
    upto = whole
    if turn + 1 < len(messages):
        upto = apply_chat_template(messages[: turn + 1], False)
    if not (whole.startswith(upto) and upto.startswith(before)):
        raise UserError(
            f"the chat template writes turn {turn + 1} otherwise once later turns follow or its "
            "answer is there, so the answer cannot be told from the prompt",
            hint="use data.loss_on: completion, or a Jinja file of your own as data.template",
        )
    return len(before), len(upto)


def _split_tail(span: str, content: str) -> tuple[str, str]:
    """Split a turn into (what is learned, what follows the content).

    The end-of-turn mark is learned, the white space behind it is not: nobody samples past the mark.
    """
    content = content.strip()
    found = span.find(content)
    if found < 0:
        raise UserError(
            f"the chat template does not show the answer {content[:40]!r} as it stands",
            hint="use another data.template",
        )
    tail = span[found + len(content) :]
    return (span.rstrip() if tail.strip() else span), tail
