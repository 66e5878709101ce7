"""`TemplateSettings`: a prompt template with its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    system_turn: str = "template"

    def describe_options(self) -> str:
        """Return the options that differ from their defaults as text; empty for none."""
        options: dict[str, Any] = {}
        if self.arguments:
            options["chat_template_kwargs"] = dict(self.arguments)
        if self.system_turn != "template":
            options["system_turn"] = self.system_turn
        return json.dumps(options, sort_keys=True) if options else ""


def read_settings(section: DataSection, name: str = CHAT) -> TemplateSettings:
    """Return the settings of a template of this name with the options of a recipe's `data`."""
    return TemplateSettings(name, section.chat_template_kwargs, section.system_turn)
