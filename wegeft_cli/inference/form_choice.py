"""The prompt format of a model, and the chat template that a merge or an export writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.prompt_record import PromptRecord
from wegeft_cli.data.text.chat_template import build_template
from wegeft_cli.data.text.template_settings import AUTO, CHAT, TemplateSettings
from wegeft_cli.data.text.templates import check_template
from wegeft_cli.data.text.trained_form import describe_difference, write_trained_form
from wegeft_cli.errors import UserError
from wegeft_cli.inference.prompt_format import PromptForm
from wegeft_cli.inference.trained_form import find_trained_form, settings_of
from wegeft_cli.models.base_folder import find_base_folder, read_chat_template
from wegeft_cli.recipe.schema import ModelSection, Recipe

CHAT_TEMPLATES = ("base", "trained")
"""Choices of the chat template."""


def choose_form(
    name: str | None, target: str | Path, recipe: Recipe | None, tokenizer: Any
) -> PromptForm:
    """Choose the prompt format of a model.

    Args:
        name: A template's name or Jinja file, as typed. Default, and with `auto`: that of the
            run's training, else the tokenizer's chat template, else the plain text.

    Raises:
        UserError: If there is no such template, or it cannot be read.
    """
    if name is not None and name != AUTO:
        try:
            check_template(name)
            return PromptForm(
                build_template(settings_of(recipe, name), tokenizer, None), "--template"
            )
        except UserError as fault:
            fault.key = "--template"
            raise
    trained = find_trained_form(target, recipe)
    if trained is not None and (trained != TemplateSettings(CHAT) or tokenizer.chat_template):
        return PromptForm(build_template(trained, tokenizer, None), "as in training")
    if tokenizer.chat_template:
        template = build_template(settings_of(recipe), tokenizer, None)
        return PromptForm(template, "the tokenizer's")
    plain = build_template(TemplateSettings("plain"), tokenizer, None)
    return PromptForm(plain, "there is no chat template")


def choose_chat_template(
    record: PromptRecord | None, choice: str, base: ModelSection, warn: Callable[[str], None]
) -> str | None:
    """Return the trained form as the chat template to write, or None for the base's own.

    With the base's own, warn if a chat server would prompt the model in another form.

    Args:
        choice: `base` or `trained`.
        base: The base, whose tokenizer is loaded for `trained`.

    Raises:
        UserError: If the adapter does not record its form, or it cannot be written.
    """
    if choice not in CHAT_TEMPLATES:
        hint = f"one of {', '.join(CHAT_TEMPLATES)}"
        raise UserError(f"got {choice!r}", key="--chat-template", hint=hint)
    if choice == "base":
        folder = find_base_folder(base.name_or_path, base.revision)
        template = None if folder is None else read_chat_template(folder)
        difference = None if record is None else describe_difference(record, template)
        if difference is not None and template is not None:
            warn(
                f"{difference}, so a chat server will not prompt the model as it was trained; "
                "--chat-template trained writes the trained form"
            )
        return None
    if record is None:
        raise UserError(
            "the prompt form of the training is not recorded",
            key="--chat-template",
            hint="the adapter is of an earlier version, of another program, or a classifier's; "
            "several adapters must have been trained with the same form",
        )
    from wegeft_cli.models.loading import load_tokenizer_of

    return write_trained_form(record, load_tokenizer_of(base))
