"""The prompt form of a training as a chat template, which servers apply."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from wegeft_cli.artifacts.prompt_record import PromptRecord
from wegeft_cli.data.text.chat_rendering import Message
from wegeft_cli.data.text.chat_template import Template, build_template
from wegeft_cli.data.text.template_settings import (
    CHAT,
    TemplateSettings,
    read_settings,
    recorded_settings,
)
from wegeft_cli.data.text.templates import (
    TEMPLATES,
    PairTemplate,
    fill_turns,
    is_template_file,
    template_hash,
)
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSection

_KEY = "--chat-template"
_ASKED: Message = {"role": "user", "content": "What is 2 + 3?"}
_PROBES: tuple[Sequence[Message], ...] = (
    [_ASKED],
    [{"role": "user", "content": " leading space\nand {braces} 'quotes' \"too\""}],
    [_ASKED, {"role": "assistant", "content": "It is 5."}, {"role": "user", "content": "Why?"}],
)


def describe_prompt(section: DataSection, names: str, tokenizer: Any) -> PromptRecord:
    """Return the record of a run's prompt form.

    `names` are the templates of its sources, as in the statistics of the data.
    """
    first, *others = names.split(", ")
    if is_template_file(section.template):
        first = section.template  # an absolute path, where the statistics have it as it was typed
    settings = read_settings(section, first)
    template = build_template(settings, tokenizer, None)
    is_file = first not in TEMPLATES
    return PromptRecord(
        first.replace("\\", "/").rpartition("/")[2] if is_file else first,
        template_hash(first if template.text is None else template.text),
        settings.arguments if template.apply is not None else {},
        settings.system_turn if template.apply is not None else "template",
        settings.system,
        template.text if is_file else None,
        tuple(name.rpartition("/")[2] for name in others),
    )


def describe_difference(record: PromptRecord, base_template: str | None) -> str | None:
    """Return how the trained form differs from the base's chat template, or None if it does not."""
    if not record.is_chat:
        there = (
            "the base has no chat template" if base_template is None else "the base's chat template"
        )
        more = ", and " + (there if base_template is None else f"{there} writes another form")
        return f"the prompts of the training have the form `{record.template}`{more}"
    if record.options:
        written = json.dumps(record.options, ensure_ascii=False)
        return (
            f"the training used the base's chat template with {written}, which the template does "
            "not hold"
        )
    if base_template is not None and record.template_hash not in (
        None,
        template_hash(base_template),
    ):
        return "the base's chat template is not the one of the training"
    return None


def write_trained_form(record: PromptRecord, tokenizer: Any) -> str:
    """Return the trained prompt form as Jinja for `apply_chat_template`.

    The result is checked: it gives the tokens of the training's prompts.

    Raises:
        UserError: If the form cannot be written for this tokenizer.
    """
    return write_form(build_template(recorded_settings(record), tokenizer, None), tokenizer)


def write_form(template: Template, tokenizer: Any) -> str:
    """Return a prompt form as Jinja; errors as of `write_trained_form`."""
    settings = template.settings
    pair = TEMPLATES.get(settings.name)
    if template.apply is None:
        assert pair is not None
        candidates = _write_pair(pair, settings.name, tokenizer)
    else:
        candidates = [_write_options(settings) + str(tokenizer.get_chat_template(settings.text))]
    for text in candidates:
        if _is_same_form(text, template, tokenizer):
            return text
    raise UserError(
        f"the prompt form {template.name!r} cannot be written as a chat template that gives the "
        "same tokens with this tokenizer",
        key=_KEY,
        hint=f"use {_KEY} base, and render the prompts yourself",
    )


def _write_pair(pair: PairTemplate, name: str, tokenizer: Any) -> list[str]:
    """Return Jinja texts of a form of single questions: the tokens decide which one is exact."""
    before, after = pair.prompt.split("{instruction}")
    lead, tail = pair.completion.split("{output}")
    answer = "message['content']"
    if pair.answer_mark is not None:
        answer += f" | replace('####', {_quote(pair.answer_mark)})"
    has_answer_text = " + ".join(
        part for part in (_quote(lead) if lead else "", f"({answer})", _quote(tail) if tail else "")
        if part
    )  # fmt: skip
    refusal = _quote(f"The prompt form `{name}` has no place for ")
    body = (
        "{%- if tools -%}{{- raise_exception(" + refusal + " + 'tools.') -}}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        "{{- " + f"{_quote(before)} + message['content'] + {_quote(after)}" + " -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- " + has_answer_text + " + eos_token -}}"
        "{%- else -%}"
        "{{- raise_exception(" + refusal + " + 'a turn of the role ' + message['role'] + '.') -}}"
        "{%- endif -%}{%- endfor -%}"
    )
    special = _quote(_find_special_start(tokenizer))
    # A tokenizer can add a space to the beginning of a text, where the special tokens now are, and
    # some add it only to a text without one.
    spaces = "", " + ' '", " + ('' if messages[0]['content'][:1] == ' ' else ' ')"
    return [body, *(f"{{{{- {special}{space} -}}}}{body}" for space in spaces)]


def _find_special_start(tokenizer: Any) -> str:
    """Return the text of the special tokens that the tokenizer writes before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return "".join(tokenizer.convert_ids_to_tokens(whole[:start]))
    return ""


def _write_options(settings: TemplateSettings) -> str:
    """Return Jinja that gives a chat template its options, unless the caller sets them."""
    parts = [
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(value)} -%}}{{%- endif -%}}"
        for name, value in settings.arguments.items()
    ]
    if settings.system is not None:
        parts.append(
            "{%- if messages[0]['role'] != 'system' -%}"
            "{%- set messages = [{'role': 'system', 'content': "
            + _quote(settings.system)
            + "}] + messages -%}{%- endif -%}"
        )
    if settings.system_turn == "merge":
        parts.append(_MERGE)
    return "".join(parts)


_MERGE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set merged = namespace(turns=[], system=messages[0]['content'], is_done=false) -%}"
    "{%- for message in messages[1:] -%}"
    "{%- if message['role'] == 'user' and not merged.is_done -%}"
    "{%- set merged.is_done = true -%}"
    "{%- set merged.turns = merged.turns + [dict(message, content=merged.system + '\\n\\n' + "
    "message['content'])] -%}"
    "{%- else -%}"
    "{%- set merged.turns = merged.turns + [message] -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if merged.is_done -%}{%- set messages = merged.turns -%}{%- endif -%}"
    "{%- endif -%}"
)


def _is_same_form(text: str, template: Template, tokenizer: Any) -> bool:
    """Return whether a Jinja text gives the tokens of a template for the probes."""
    written = build_template(TemplateSettings(CHAT, text=text), tokenizer, None)
    assert written.apply is not None
    has_system = template.apply is not None and template.settings.system_turn == "merge"
    probes = [*_PROBES]
    if has_system:
        probes.append([{"role": "system", "content": "Be brief."}, _ASKED])
    try:
        return all(
            tokenizer(written.apply(probe, True), add_special_tokens=False)["input_ids"]
            == _trained_ids(probe, template, tokenizer)
            for probe in probes
        )
    except UserError:
        return False


def _trained_ids(messages: Sequence[Message], template: Template, tokenizer: Any) -> list[int]:
    if template.apply is not None:
        text = template.apply(messages, True)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    pair = TEMPLATES[template.name]
    assert pair is not None
    ids = tokenizer(fill_turns(pair, messages, tokenizer.eos_token or ""))["input_ids"]
    # Some tokenizers add the end of text to every text.
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _quote(text: str) -> str:
    """Return a text as a Jinja literal."""
    return json.dumps(text)


def _literal(value: Any) -> str:
    """Return a JSON value as a Jinja literal."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        inner = ", ".join(f"{_quote(str(key))}: {_literal(each)}" for key, each in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value)
