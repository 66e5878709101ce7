"""`TemplateSettings`: a prompt template with its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wegeft_cli.artifacts.prompt_record import PromptRecord
from wegeft_cli.recipe.schema import DataSection

AUTO = "auto"
CHAT = "chat"


@dataclass(frozen=True)
class TemplateSettings:
    """A prompt template with its options, as a recipe states it.

    Args:
        name: A name of `TEMPLATES`, or the path of a Jinja file.
        arguments: Variables of a chat template, e.g. `enable_thinking`.
        system_turn: `template` leaves a system turn to the chat template, `merge` writes its text
            before the first user turn.
        system: Text of the system turn of conversations without one.
        text: Jinja text; None for that of the named file or of the tokenizer.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    system_turn: str = "template"
    system: str | None = None
    text: str | None = None

    def describe_options(self) -> str:
        """Return the options that differ from their defaults as text; empty for none."""
        options = PromptRecord(
            self.name, None, self.arguments, self.system_turn, self.system
        ).options
        return json.dumps(options, sort_keys=True) if options else ""


def read_settings(section: DataSection, name: str = CHAT) -> TemplateSettings:
    """Return the settings of a template of this name with the options of a recipe's `data`."""
    return TemplateSettings(name, section.chat_template_kwargs, section.system_turn, section.system)


def recorded_settings(record: PromptRecord) -> TemplateSettings:
    """Return the settings that an adapter records."""
    return TemplateSettings(
        record.template,
        record.chat_template_kwargs,
        record.system_turn,
        record.system,
        record.chat_template,
    )
