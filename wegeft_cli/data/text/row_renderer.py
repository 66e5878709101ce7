"""How the rows of one source become text: its format, its columns and its template, settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.formats import FORMATS, RowFormat, find_format, read_row
from wegeft_cli.data.text.chat_rendering import Rendered
from wegeft_cli.data.text.chat_template import Template, build_template
from wegeft_cli.data.text.templates import AUTO, CHAT, render_row
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSection, DataSource


@dataclass(frozen=True)
class SourceForm:
    """How rows become text.

    Args:
        row_format: What a row must hold.
        columns: The format's field -> the file's column, where they differ.
        template: The prompt form.
        is_talk: Whether rows are conversations.
        loss_on: Which part of the text is learned.
    """

    row_format: RowFormat
    columns: Mapping[str, str]
    template: Template
    is_talk: bool
    loss_on: str

    def read(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Check a row and keep its fields.

        Args:
            row: The row as the file has it.

        Returns:
            Its fields; none if a named corpus leaves the row out.

        Raises:
            UserError: If it is not what the first row promised.
        """
        if "prompt" in self.row_format.fields:
            self._check_kind(row.get(self.columns.get("prompt", "prompt")))
        return read_row(row, self.row_format, self.columns)

    def _check_kind(self, prompt: Any) -> None:
        if prompt is not None and isinstance(prompt, list) != self.is_talk:
            kinds = ("text", "a list of messages")
            raise UserError(
                f"`prompt` must be {kinds[self.is_talk]}, as in the first row; got {prompt!r:.60}"
            )

    def render(self, fields: Mapping[str, Any], *, max_characters: int) -> Rendered:
        """Write a row as text.

        Args:
            fields: What `read` gave.
            max_characters: What lies behind so many characters will be cut away.

        Returns:
            The pieces of text.

        Raises:
            UserError: If the template does not fit; with `key` where all rows share the fault.
        """
        return render_row(
            fields,
            template=self.template.name,
            loss_on=self.loss_on,
            apply_chat_template=self.template.apply,
            max_characters=max_characters,
        )


def build_form(
    source: DataSource,
    section: DataSection,
    first_row: Mapping[str, Any],
    *,
    tokenizer: Any,
    recipe_dir: Path | None,
) -> SourceForm:
    """Settle how a source's rows become text.

    Args:
        source: The recipe's entry.
        section: The recipe's `data`.
        first_row: Its first row, which tells what `auto` is.
        tokenizer: The model's tokenizer.
        recipe_dir: Folder of the recipe, for a template's file.

    Returns:
        The form.

    Raises:
        UserError: If no format fits the columns, or the template cannot be used.
    """
    renames = source.columns or {}
    row_format = FORMATS[find_format(source.format, list(first_row), renames)]
    columns = row_format.find_columns(first_row, renames)
    prompt = first_row.get(columns.get("prompt", "prompt"))
    is_pair_of_talks = "prompt" in row_format.fields and isinstance(prompt, list)
    is_talk = row_format.template == CHAT or is_pair_of_talks
    name = section.template
    if name == AUTO:
        name = CHAT if is_talk else row_format.template
    template = build_template(name, tokenizer, recipe_dir)
    return SourceForm(row_format, columns, template, is_talk, section.loss_on)


def add_key(fault: UserError, key: str) -> UserError:
    """The fault of a source with its key counted from the recipe's root."""
    if fault.key is None:
        fault.key = key
    elif "." not in fault.key:
        fault.key = f"{key}.{fault.key}"
    return fault
