"""`TemplateSettings`: a prompt template with its options, in a recipe or with an adapter."""

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
    """A prompt template with its options, as a recipe or an adapter states it.

    Args:
        name: A name of `TEMPLATES`, or the path of a Jinja file.
        arguments: Variables of a chat template, e.g. `enable_thinking`.
        system_turn: `template` leaves a system turn to the chat template, `merge` writes its text
            before the first user turn.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    system_turn: str = "template"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TemplateSettings:
        """Read what `to_json` returned."""
        return cls(
            str(values["name"]),
            dict(values.get("chat_template_kwargs") or {}),
            str(values.get("system_turn", "template")),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the settings under the names of the recipe's keys."""
        return {
            "name": self.name,
            "chat_template_kwargs": dict(self.arguments),
            "system_turn": self.system_turn,
        }

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
