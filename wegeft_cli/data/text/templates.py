"""Prompt templates by name, exact to the byte, and the learned part of each."""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from wegeft_cli.data.text.chat_rendering import (
    ApplyChatTemplate,
    Message,
    RenderedText,
    Segment,
    render_chat,
)
from wegeft_cli.data.text.template_settings import AUTO, CHAT
from wegeft_cli.errors import UserError
from wegeft_cli.storage.json_files import shorten


@dataclass(frozen=True)
class PairTemplate:
    """A prompt and a completion around a row's instruction and output.

    Args:
        prompt: Text before the completion, with `{instruction}`.
        completion: The learned text, with `{output}`.
        prompt_with_input: The prompt of rows with an `input`; without it such rows do not fit.
        answer_mark: Replacement of GSM8K's `####` in the completion.
        asked_as: The prompt of the authors' scorer, if it differs from the one of training.
    """

    prompt: str
    completion: str = "{output}"
    prompt_with_input: str | None = None
    answer_mark: str | None = None
    asked_as: str | None = None

    def question(self, *, as_trained: bool = False) -> str:
        """The prompt of the scorer, with `{instruction}`."""
        return self.prompt if as_trained or self.asked_as is None else self.asked_as

    def write_answer(self, output: str) -> str:
        """Return the learned text of an answer."""
        if self.answer_mark is not None:
            output = output.replace("####", self.answer_mark)
        return self.completion.format(output=output)


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# LLM-Adapters indents the prompt like its source code, blank line included.
_INDENT = " " * 16
_LLM_ADAPTERS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    f"the request.  \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
    f"{_INDENT}### Response:\n{_INDENT}"
)
# Its scorers leave out one space and the blank line's, and end in the indent.
_LLM_ADAPTERS_ASKED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    f"the request. \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n"
    f"{_INDENT}### Response:\n{_INDENT}"
)
# MetaMath's eval_gsm8k.py.
_METAMATH_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response: Let's think step by step."
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
    "llm_adapters": PairTemplate(_LLM_ADAPTERS, asked_as=_LLM_ADAPTERS_ASKED),
    "gsm8k_wegeft": PairTemplate(_GSM8K, answer_mark="The answer is:"),
    "gsm8k_gift": PairTemplate(_GSM8K, answer_mark="The final answer is: "),
    # LoRA-GA joins x and y by a space and masks the tokens of x: the space is learned. Its scorers,
    # and LoRA-Pro's, put that space behind the question.
    "metamath": PairTemplate(
        "Q: {instruction}\nA: ", " {output}", asked_as="Q: {instruction}\nA:  "
    ),
    "lora_ga": PairTemplate(_ALPACA, " {output}", asked_as=f"{_ALPACA} "),
    "metamath_alpaca": PairTemplate(_METAMATH_ALPACA, " {output}"),
}
"""Every template by name; none stands for the tokenizer's own chat template."""


def fill_turns(pair: PairTemplate, messages: Sequence[Message], eos: str) -> str:
    """Render turns of user and assistant by a form of single questions, up to the next answer.

    Raises:
        UserError: If a turn has another role.
    """
    texts = []
    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            texts.append(pair.prompt.format(instruction=content, input=""))
        elif message["role"] == "assistant":
            texts.append(pair.write_answer(content) + eos)
        else:
            raise UserError(f"the prompt form has no place for a turn of {message['role']!r}")
    return "".join(texts)


def is_template_file(template: str) -> bool:
    """Return whether `data.template` names a user's own Jinja file."""
    return PurePath(template).suffix in {".jinja", ".j2"}


def check_template(template: str) -> None:
    """Raise UserError for an unknown template name, with the nearest one as the hint."""
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
    """Return the first 16 hex digits of the SHA-256 of a template's text.

    The argument is a template's name, or a chat template's Jinja text.
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
    max_characters: int | None = None,
) -> RenderedText:
    """Render a row as text and mark its learned parts.

    Args:
        row: `instruction`, `input` (optional), `output`; or `prompt`, `completion`; or `messages`
            with `learned` (whether each message is, or None), `num_prompt` (the number of first
            messages that are learned only if they say so, or with `all`), `tools` and
            `chat_template_kwargs`; or `text`, which is learned as a whole.

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
        find_marks = getattr(apply_chat_template, "find_marks", None)
        options = {
            option: row[field]
            for option, field in (("tools", "tools"), ("arguments", "chat_template_kwargs"))
            if row.get(field)
        }
        if options:
            apply_chat_template = functools.partial(apply_chat_template, **options)
            find_marks = find_marks and functools.partial(find_marks, **options)
        messages = row["messages"] if "messages" in row else _as_messages(row)
        flags = list(row.get("learned") or [None] * len(messages))
        if loss_on != "all":
            num_prompt = row.get("num_prompt", 0)
            flags[:num_prompt] = [bool(flag) for flag in flags[:num_prompt]]
        return render_chat(
            messages, flags, loss_on, apply_chat_template, max_characters, find_marks
        )
    if "messages" in row:
        raise _misfit("messages", template, CHAT)
    if "text" in row:
        if template != "plain":
            raise _misfit("text", template, "auto")
        return RenderedText((Segment(row["text"], True),))
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
    """Return the row's (instruction, input, output), under either pair of names."""
    if "prompt" in row:
        return row["prompt"], "", row["completion"]
    return row["instruction"], row.get("input") or "", row["output"]


def _render_pair(
    row: Mapping[str, Any], template: PairTemplate, name: str, loss_on: str
) -> RenderedText:
    instruction, extra, output = _pair_fields(row)
    form = template.prompt
    if extra.strip():
        if template.prompt_with_input is None:
            raise UserError(
                f"the template {name!r} has no place for `input`, got {shorten(extra)}",
                hint="use data.template: alpaca, or leave `input` empty",
            )
        form = template.prompt_with_input
    # The values go in by one call: braces inside a row are never read as fields.
    prompt = form.format(instruction=instruction, input=extra)
    completion = template.write_answer(output)
    return RenderedText((Segment(prompt, loss_on == "all"), Segment(completion, True)))


def _as_messages(row: Mapping[str, Any]) -> list[Message]:
    instruction, extra, output = _pair_fields(row)
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": output},
    ]
