"""Renderers of chat templates: the tokenizer's own, or a user's Jinja file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from wegeft_cli.data.sources.messages import check_arguments
from wegeft_cli.data.sources.paths import find_local
from wegeft_cli.data.text.chat_renderer import ChatRenderer
from wegeft_cli.data.text.template_settings import CHAT, TemplateSettings
from wegeft_cli.data.text.templates import is_template_file, template_hash
from wegeft_cli.errors import UserError

_MARK = "answer"
_ROW_FIELDS = {"instruction", "input", "output", "prompt", "completion", "question", "answer"}


class Template(NamedTuple):
    """A template with its renderer.

    Args:
        settings: Its name in the recipe and the arguments of a chat template.
        digest: Its fingerprint.
        apply: The renderer of a chat template, else None.
        text: The Jinja text of a chat template; several named ones are JSON.
    """

    settings: TemplateSettings
    digest: str
    apply: ChatRenderer | None
    text: str | None = None

    @property
    def name(self) -> str:
        """The name in the recipe."""
        return self.settings.name

    @property
    def writes_date(self) -> bool:
        """Whether it can write today's date, so that a row changes from day to day."""
        return self.text is not None and "strftime_now" in self.text


def build_template(settings: TemplateSettings, tokenizer: Any, recipe_dir: Path | None) -> Template:
    """Return the template of a name out of `TEMPLATES`, or of the path of a Jinja file.

    The tokenizer renders conversations in transformers' sandboxed Jinja.
    """
    text = settings.text
    if text is not None:
        pass
    elif is_template_file(settings.name):
        text = _read_template(settings.name, recipe_dir)
    elif settings.name != CHAT:
        if settings.system is not None:
            raise UserError(
                f"the prompt form {settings.name!r} has no place for a system prompt",
                key="data.system",
                hint=f"use data.template: {CHAT}, if the model has a chat template",
            )
        return Template(settings, template_hash(settings.name), None)
    elif not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            key="data.template",
            hint="use an instruction-tuned model's tokenizer, or data.template: my.jinja",
        )
    shown = tokenizer.chat_template if text is None else text
    if not isinstance(shown, str):
        # Of named templates each row takes its own: those with tools `tool_use`.
        shown = json.dumps(shown, sort_keys=True)
    try:
        check_arguments("data.chat_template_kwargs", settings.arguments)
    except UserError as fault:
        fault.key = "data.chat_template_kwargs"
        raise
    digest = template_hash(shown + settings.describe_options())
    return Template(settings, digest, ChatRenderer(tokenizer, text, settings), shown)


def find_turn_ends(template: Template, tokenizer: Any) -> list[int]:
    """Return the special token that ends an assistant's turn in a chat template, if any.

    Some tokenizers declare another end-of-text token: Gemma's turns end in `<end_of_turn>`, Llama
    3's in `<|eot_id|>`.
    """
    if template.apply is None:
        return []
    asked = {"role": "user", "content": "question"}
    try:
        text = template.apply([asked, {"role": "assistant", "content": _MARK}], False)
    except UserError:
        return []
    tail = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return [token for token in tail[:1] if token in added and added[token].special]


def _read_template(name: str, recipe_dir: Path | None) -> str:
    file = find_local(name, recipe_dir)
    if file is None:
        raise UserError(f"no such template file: {name!r}", key="data.template")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the template cannot be read: {error}", file=str(file), key="data.template"
        ) from error
    fields = sorted(_ROW_FIELDS.intersection(re.findall(r"\w+", text)))
    if fields and not re.search(r"\bmessages\b", text):
        raise UserError(
            f"the template reads {', '.join(f'`{name}`' for name in fields)}, but a row is in the "
            "variable `messages`",
            file=str(file),
            key="data.template",
            hint="loop over the turns: {% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
            "{% endfor %}; rows of instruction and output become a user and an assistant turn",
        )
    return text
