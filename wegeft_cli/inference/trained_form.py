"""The prompt form that a model was trained with, found beside it."""

from __future__ import annotations

from pathlib import Path

from wegeft_cli.artifacts.adapter import find_prompt_record
from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.data.text.template_settings import (
    AUTO,
    CHAT,
    TemplateSettings,
    read_settings,
    recorded_settings,
)
from wegeft_cli.data.text.templates import TEMPLATES, check_template
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import Recipe


def find_trained_form(target: str | Path, recipe: Recipe | None) -> TemplateSettings | None:
    """Return the prompt form of a target's training; None where it is unknown.

    The record of the adapter or the merged model has priority. Adapters of earlier versions have
    none: the recipe of their run says it.

    Raises:
        UserError: If the record is damaged, or of a newer version.
    """
    record = find_prompt_record(target)
    if record is not None:
        if record.chat_template is None and record.template not in TEMPLATES:
            raise UserError(
                f"this version knows no prompt form {record.template!r}",
                file=str(target),
                key="prompt.template",
                hint="install the version that trained it, or give --template",
            )
        return recorded_settings(record)
    if recipe is None:
        return None
    name = _find_name(target, recipe)
    return None if name is None else settings_of(recipe, name)


def settings_of(recipe: Recipe | None, name: str = CHAT) -> TemplateSettings:
    """Return the settings of a template, with a run's options if it is a chat template."""
    if recipe is None or TEMPLATES.get(name) is not None:
        return TemplateSettings(name)
    return read_settings(recipe.data, name)


def _find_name(target: str | Path, recipe: Recipe) -> str | None:
    """Return the template of the training rows; with `auto` the first that they used."""
    if recipe.data.template != AUTO:
        return recipe.data.template
    for folder in (Path(target), Path(target).parent):
        try:
            name = str(RunDirectory(folder).record()["data"]["template"]).partition(", ")[0]
            check_template(name)
        except (OSError, ValueError, LookupError, TypeError, RecursionError, UserError):
            continue
        return name
    return None
