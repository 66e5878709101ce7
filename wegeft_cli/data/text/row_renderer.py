"""Renderer of one source's rows: its format, columns and template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.formats import FORMATS, RowFormat, find_format, read_row
from wegeft_cli.data.sources.messages import is_number
from wegeft_cli.data.text.chat_rendering import RenderedText
from wegeft_cli.data.text.chat_template import Template, build_template
from wegeft_cli.data.text.template_settings import AUTO, CHAT, read_settings
from wegeft_cli.data.text.templates import render_row
from wegeft_cli.data.text.tokenizer import Encoder
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSection, DataSource


@dataclass(frozen=True)
class RowRenderer:
    """Renders the rows of one source as text.

    Args:
        row_format: The fields of a row.
        columns: The format's field -> the file's column, where they differ.
        template: The template.
        is_conversation: Whether rows are conversations.
        loss_on: Which part of the text is learned.
        added_blocks: Empty blocks that the template adds to learned answers -> number of rows.
        unseen: Fields that the template does not show -> number of rows.
        counts: Number of rows with `numbers` as texts, and of conversations with `several`
            answers of which only the last one is learned.
    """

    row_format: RowFormat
    columns: Mapping[str, str]
    template: Template
    is_conversation: bool
    loss_on: str
    added_blocks: Counter[str] = field(default_factory=Counter)
    unseen: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def read(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Check a row and return its fields, or None if a named corpus excludes it."""
        if "prompt" in self.row_format.fields:
            self._check_kind(row.get(self.columns.get("prompt", "prompt")))
        fields = read_row(row, self.row_format, self.columns)
        values = (row.get(self.columns.get(name, name)) for name in self.row_format.fields)
        if any(map(_holds_number, values)):
            self.counts["numbers"] += 1
        return fields

    def _check_kind(self, prompt: Any) -> None:
        if prompt is not None and isinstance(prompt, list) != self.is_conversation:
            kinds = ("text", "a list of messages")
            raise UserError(
                f"`prompt` must be {kinds[self.is_conversation]}, as in the first row; "
                f"got {prompt!r:.60}"
            )

    @property
    def length_below(self) -> int | None:
        """The corpus's rule: rows of this number of tokens or more are excluded."""
        return self.row_format.corpus.length_below if self.row_format.corpus else None

    def max_characters(self, encoder: Encoder, max_length: int) -> int:
        """Return after how many characters text cannot affect the tokens that are kept."""
        return encoder.count_characters(max(max_length, self.length_below or 0))

    def render(self, fields: Mapping[str, Any], *, max_characters: int) -> RenderedText:
        """Render a row's fields as text; text after `max_characters` will be cut.

        Raise UserError if the template does not fit, with `key` if the error concerns all rows.
        """
        rendered = render_row(
            fields,
            template=self.template.name,
            loss_on=self.loss_on,
            apply_chat_template=self.template.apply,
            max_characters=max_characters,
        )
        for text in (*rendered.earlier, rendered):
            if text.added_block is not None:
                self.added_blocks[text.added_block] += 1
                break
        self.unseen.update(self._find_unseen(fields))
        if self.loss_on == "completion" and "learned" not in fields:
            roles = Counter(message["role"] for message in fields.get("messages", ()))
            self.counts["several"] += roles["assistant"] > 1
        return rendered

    def _find_unseen(self, fields: Mapping[str, Any]) -> Iterator[str]:
        """Yield the fields of a conversation for which the chat template has no place."""
        tools = fields.get("tools")
        apply = self.template.apply
        if apply is None or "messages" not in fields:
            return
        if tools and not apply.tool_form(tools).shows_tools:
            yield "tools"
        has_calls = any(message.get("tool_calls") for message in fields["messages"])
        if has_calls and not apply.tool_form(tools).shows_calls:
            yield "tool_calls"

    def list_notes(self) -> tuple[str, ...]:
        """Return sentences about the rows rendered so far."""
        return tuple(self._list_notes())

    def _list_notes(self) -> Iterator[str]:
        if self.is_conversation and self.template.writes_date:
            yield (
                "the chat template writes today's date into every row, so a run on another day, a "
                "resumed one too, learns from other rows"
            )
        for block, count in self.added_blocks.items():
            yield (
                f"the chat template writes an empty {block} into the learned answers of {count} "
                "rows that contain none, so the model learns to write it; set "
                "data.chat_template_kwargs (of Qwen3: {enable_thinking: false}) to make it a part "
                "of the prompt"
            )
        if self.counts["numbers"]:
            yield f"the numbers of {self.counts['numbers']} rows are read as their JSON text"
        if self.counts["several"]:
            yield (
                f"only the last answer of {self.counts['several']} conversations with several "
                "answers is learned (data.loss_on: completion); set data.loss_on: assistant to "
                "learn all of them"
            )
        for name, count in self.unseen.items():
            yield f"the chat template does not show the `{name}` of {count} rows"
        if self.template.apply is not None:
            for form in sorted(self.template.apply.converted_arguments):
                kind = {"object": "objects", "text": "JSON text"}[form]
                yield f"the arguments of tool calls are given to the chat template as {kind}"


def _holds_number(value: Any) -> bool:
    """Return whether a field, or the text of one of its messages, is a number."""
    if isinstance(value, list):
        return any(
            is_number(message.get("content", message.get("value")))
            for message in value
            if isinstance(message, Mapping)
        )
    return is_number(value)


def build_renderer(
    source: DataSource,
    section: DataSection,
    first_row: Mapping[str, Any],
    *,
    tokenizer: Any,
    recipe_dir: Path | None,
) -> RowRenderer:
    """Build the renderer of a source; its first row determines `auto`."""
    renames = source.columns or {}
    row_format = FORMATS[find_format(source.format, list(first_row), renames)]
    columns = row_format.find_columns(first_row, renames)
    prompt = first_row.get(columns.get("prompt", "prompt"))
    is_pair_of_conversations = "prompt" in row_format.fields and isinstance(prompt, list)
    is_conversation = row_format.template == CHAT or is_pair_of_conversations
    name = section.template
    if name == AUTO:
        name = CHAT if is_conversation else row_format.template
    template = build_template(read_settings(section, name), tokenizer, recipe_dir)
    return RowRenderer(row_format, columns, template, is_conversation, section.loss_on)
