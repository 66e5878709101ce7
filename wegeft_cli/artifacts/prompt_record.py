"""`PromptRecord`: the prompt form of an adapter's training, as its files state it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import SPECIAL_TOKENS

PROMPT_KEY = "prompt"
"""Key of the record in the files of an adapter and of a merged model."""

_CHAT = "chat"
_TEXTS = ("template", "template_hash", "system_turn", "system", "chat_template")


@dataclass(frozen=True)
class PromptRecord:
    """How the prompts of the training rows were written.

    Args:
        template: A template's name, `chat` for the base's chat template, or a Jinja file's name.
        template_hash: Hash of the template's text, without the options below.
        chat_template_kwargs: Variables of the chat template.
        system_turn: `template` or `merge`, see `data.system_turn`.
        system: Text of the system turn of conversations without one.
        chat_template: Text of a Jinja file.
        more_templates: Further templates, if the sources have several.
        special_tokens: Special tokens that replaced the tokenizer's own, see
            `model.special_tokens`.
    """

    template: str
    template_hash: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_turn: str = "template"
    system: str | None = None
    chat_template: str | None = None
    more_templates: tuple[str, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether the template is the base's chat template."""
        return self.template == _CHAT

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        options: dict[str, Any] = {}
        if self.chat_template_kwargs:
            options["chat_template_kwargs"] = dict(self.chat_template_kwargs)
        if self.system_turn != "template":
            options["system_turn"] = self.system_turn
        if self.system is not None:
            options["system"] = self.system
        return options

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object, without what is at its default."""
        values = {"template": self.template, "template_hash": self.template_hash, **self.options}
        if self.chat_template is not None:
            values["chat_template"] = self.chat_template
        if self.more_templates:
            values["more_templates"] = list(self.more_templates)
        if self.special_tokens:
            values["special_tokens"] = dict(self.special_tokens)
        return values

    @classmethod
    def from_json(cls, values: Any, *, file: str) -> PromptRecord:
        """Read a record; raise UserError if it is damaged. Unknown keys are ignored."""
        if wrong := prompt_complaint(values):
            raise UserError(f"must be {wrong}, got {values!r:.80}", file=file, key=PROMPT_KEY)
        known = {name: values[name] for name in _TEXTS if values.get(name) is not None}
        return cls(
            **known,
            chat_template_kwargs=values.get("chat_template_kwargs") or {},
            more_templates=tuple(values.get("more_templates") or ()),
            special_tokens=values.get("special_tokens") or {},
        )


def prompt_complaint(values: Any) -> str | None:
    """Return what a record must be, if the value is none."""
    if not isinstance(values, dict) or not isinstance(values.get("template"), str):
        return "a map with the text `template`"
    for name in _TEXTS:
        if values.get(name) is not None and not isinstance(values[name], str):
            return f"a map with a text in `{name}`"
    if not isinstance(values.get("chat_template_kwargs") or {}, dict):
        return "a map with a map in `chat_template_kwargs`"
    more = values.get("more_templates") or []
    if not isinstance(more, list) or not all(isinstance(name, str) for name in more):
        return "a map with a list of names in `more_templates`"
    tokens = values.get("special_tokens") or {}
    if not isinstance(tokens, dict) or not all(
        name in SPECIAL_TOKENS and isinstance(text, str) for name, text in tokens.items()
    ):
        return f"a map with a map of {', '.join(SPECIAL_TOKENS)} to texts in `special_tokens`"
    return None
