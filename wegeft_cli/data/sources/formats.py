"""Row formats: required columns, and the filters and fields of named corpora."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from wegeft_cli.data.sources.messages import (
    check_text,
    join_conversations,
    read_arguments,
    read_conversation,
    read_text,
    read_tools,
)
from wegeft_cli.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """The published selection of a corpus: which rows, how many, and which part of each.

    Args:
        keeps: Whether a row is used at all.
        instruction: The column with the instruction.
        shorten: Returns the part of the row that is learned.
        length_below: Rows of this number of tokens or more are excluded (before EOS, BOS counted).
        num_train: Number of rows for training: the first ones in file order.
        num_validation: Number of rows for validation: the ones after these.
    """

    keeps: Callable[[Mapping[str, str]], bool]
    instruction: str
    shorten: Callable[[Mapping[str, str]], str]
    length_below: int
    num_train: int
    num_validation: int


@dataclass(frozen=True)
class RowFormat:
    """The fields of a row, and the template that `auto` selects for it.

    Args:
        required: Fields that every row has.
        template: The template of `auto`; for conversations always the chat template.
        optional: Fields that a row may have.
        corpus: The published selection, for a named corpus.
        others: (field, another name of it in files).
    """

    required: tuple[str, ...]
    template: str
    optional: tuple[str, ...] = ()
    corpus: Corpus | None = None
    others: tuple[tuple[str, str], ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields, the required ones first."""
        return self.required + self.optional

    def find_columns(self, columns: Collection[str], renames: Mapping[str, str]) -> dict[str, str]:
        """Complete the renames with the other names of missing fields."""
        found = {
            field: other
            for field, other in self.others
            if field not in columns and other in columns
        }
        return {**found, **renames}


def _first_code_block(row: Mapping[str, str]) -> str:
    """Return the answer up to the end of its first fenced block."""
    return "```".join(row["answer"].split("```")[:2]) + "```"


def _is_helpful(row: Mapping[str, str]) -> bool:
    output = row["output"].lower()
    return "sorry" not in output and "as an ai" not in output


_CHAT_OPTIONS = ("tools", "chat_template_kwargs")

FORMATS: dict[str, RowFormat] = {
    # In the order of detection.
    "messages": RowFormat(("messages",), "chat", _CHAT_OPTIONS),
    "conversations": RowFormat(
        ("conversations",),
        "chat",
        ("system", *_CHAT_OPTIONS),
        others=(("conversations", "conversation"),),
    ),
    "instruction": RowFormat(("instruction", "output"), "alpaca", ("input",)),
    # The options are those of conversations.
    "prompt_completion": RowFormat(("prompt", "completion"), "plain", _CHAT_OPTIONS),
    "text": RowFormat(("text",), "plain"),
    # The filters and sizes of the LoRA-GA code base, whose loaders do not shuffle.
    "metamath": RowFormat(
        ("query", "response", "type"),
        "metamath",
        corpus=Corpus(
            lambda row: "GSM" in row["type"],
            "query",
            lambda row: row["response"].split("\nThe answer is:")[0],
            512,
            100_000,
            10_000,
        ),
    ),
    "codefeedback": RowFormat(
        ("query", "answer"),
        "lora_ga",
        corpus=Corpus(
            lambda row: "```" in row["answer"], "query", _first_code_block, 1024, 100_000, 10_000
        ),
    ),
    "wizardlm": RowFormat(
        ("instruction", "output"),
        "lora_ga",
        corpus=Corpus(_is_helpful, "instruction", lambda row: row["output"], 1024, 52_000, 18_000),
    ),
}
"""Every row format by name."""


_COLUMN_NAMES = {
    "prompt": ("prompt", "instruction", "question", "query", "problem", "user", "human", "source"),
    "input": ("context", "input", "document", "passage"),
    "completion": (
        "completion", "output", "response", "answer", "solution", "assistant", "target", "chosen"
    ),
}  # fmt: skip
"""Common names of columns, by the field that they hold."""


def find_format(name: str, columns: Collection[str], renames: Mapping[str, str]) -> str:
    """Return a source's format name; raise UserError if its columns are missing.

    `renames` maps the format's fields to the source's columns. The error's `key` is relative to the
    source (`format`, `columns`).
    """
    found = f"columns found: {', '.join(columns)}"
    for field, column in renames.items():
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"did you mean {near[0]}?" if near else None
            raise UserError(
                f"no column {column!r} to read as `{field}`; {found}", key="columns", hint=hint
            )
    if name == "auto":
        fitting = [
            key
            for key, form in FORMATS.items()
            if form.corpus is None
            and {*columns, *form.find_columns(columns, renames)}.issuperset(form.required)
        ]
        # A format whose fields the renames name is the one that is meant.
        fitting.sort(key=lambda key: not set(renames).issubset(FORMATS[key].fields))
        if not fitting:
            raise UserError(f"no row format fits; {found}", key="columns", hint=_suggest(columns))
        name = fitting[0]
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        raise UserError(
            f"no row format {name!r}; there are auto, {', '.join(FORMATS)}",
            key="format",
            hint=f"did you mean {near[0]}?" if near else None,
        )
    foreign = [field for field in renames if field not in FORMATS[name].fields]
    if foreign:
        raise UserError(
            f"format {name} has no field {foreign[0]!r}; its fields are "
            f"{', '.join(FORMATS[name].fields)}",
            key="columns",
        )
    return name


def _suggest(columns: Collection[str]) -> str:
    """Return a `columns` setting that fits the names of the columns, or an example of one."""
    lowered = {column.lower(): column for column in columns}
    found = {
        field: next((lowered[name] for name in names if name in lowered), None)
        for field, names in _COLUMN_NAMES.items()
    }
    # A column is read once: `context` is the question where there is no other.
    if found["prompt"] is None:
        found["prompt"], found["input"] = found["input"], None
    if found["prompt"] is None or found["completion"] is None:
        return (
            "say which columns to read, e.g. columns: {prompt: question, completion: answer}, or "
            "set `format`"
        )
    names = {"prompt": found["prompt"], "completion": found["completion"]}
    if found["input"] is not None:
        names = {
            "instruction": found["prompt"], "input": found["input"], "output": found["completion"]
        }  # fmt: skip
    return f"set columns: {{{', '.join(f'{field}: {name}' for field, name in names.items())}}}"


def read_row(
    row: Mapping[str, Any], row_format: RowFormat, renames: Mapping[str, str]
) -> dict[str, Any] | None:
    """Check a row and return its format's fields, or None if the corpus excludes the row.

    The fields have the format's names: a corpus row has instruction and output; a conversation has
    `messages`, and `learned` and `tools` if it defines them. Raise UserError if a field is missing,
    null or of a wrong type.
    """
    given: dict[str, tuple[str, Any]] = {}
    for name in row_format.fields:
        column = renames.get(name, name)
        value = row.get(column)
        if value is not None:
            given[name] = column, value
        elif name in row_format.required:
            if column in row:
                raise UserError(f"`{column}` is null")
            raise UserError(f"no `{column}`; the row has {', '.join(row) or 'no fields'}")
    if row_format.template == "chat" or isinstance(given.get("prompt", ("", ""))[1], list):
        return _read_talk(given)
    fields = {
        name: read_text(column, value)
        for name, (column, value) in given.items()
        if name not in _CHAT_OPTIONS
    }
    corpus = row_format.corpus
    if corpus is None:
        return fields
    if not corpus.keeps(fields):
        return None
    return {"instruction": fields[corpus.instruction], "output": corpus.shorten(fields)}


def _read_talk(given: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    if "prompt" in given:
        talk = join_conversations(given["prompt"][1], given["completion"][1])
    else:
        talk = read_conversation(*given["messages" if "messages" in given else "conversations"])
    if "system" in given:
        system = check_text(*given["system"])
        if system.strip() and talk["messages"][0]["role"] != "system":
            talk["messages"].insert(0, {"role": "system", "content": system})
            if "learned" in talk:
                talk["learned"].insert(0, None)
    if "tools" in given and (tools := read_tools(*given["tools"])):
        talk["tools"] = tools
    if "chat_template_kwargs" in given:
        talk["chat_template_kwargs"] = read_arguments(*given["chat_template_kwargs"])
    return talk
