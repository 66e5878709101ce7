"""Messages: every way to write a conversation becomes {role, content}, or is told."""

from __future__ import annotations

from typing import Any

import pytest

from wegeft_cli.data.sources.formats import FORMATS, find_format, read_row
from wegeft_cli.data.sources.messages import read_conversation
from wegeft_cli.errors import UserError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "tool", "content": "4"},
]


def sharegpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": said} for speaker, said in turns]


def read(row: dict[str, Any], columns: dict[str, str] | None = None) -> dict[str, Any]:
    """A row's fields, with the format found by itself."""
    row_format = FORMATS[find_format("auto", list(row), columns or {})]
    fields = read_row(row, row_format, row_format.find_columns(row, columns or {}))
    assert fields is not None
    return fields


@pytest.mark.parametrize(
    ("user", "assistant", "tool"),
    [
        ("human", "gpt", "observation"),
        ("user", "assistant", "tool"),
        ("Human", "model", "function"),
    ],
)
@pytest.mark.parametrize("column", ["conversations", "conversation"])
def test_sharegpt_rows_become_messages(user: str, assistant: str, tool: str, column: str) -> None:
    talk = sharegpt(("system", "Be brief."), (user, "hi"), (assistant, "hello"), (tool, "4"))
    assert read({column: talk, "id": "x"}) == {"messages": TALK}


@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
def test_roles_and_contents_are_taken_under_any_name(column: str) -> None:
    assert read({column: TALK}) == {"messages": TALK}
    assert read({"dialog": TALK}, {column.rstrip("s") + "s": "dialog"}) == {"messages": TALK}


def test_a_system_column_is_the_first_message() -> None:
    talk = sharegpt(("human", "hi"), ("gpt", "hello"), ("tool", "4"))
    assert read({"conversations": talk, "system": "Be brief."}) == {"messages": TALK}
    assert len(read({"conversations": talk, "system": " "})["messages"]) == 3
    assert len(read({"conversations": talk, "system": None})["messages"]) == 3
    own = [{"from": "system", "value": "Be long."}, *talk]
    assert read({"conversations": own, "system": "Be brief."})["messages"][0]["content"] == (
        "Be long."
    )


def test_unknown_speakers_are_faults_and_unknown_roles_are_the_templates() -> None:
    with pytest.raises(UserError, match=r"conversations\[1\].from. is 'alice'; known are human"):
        read({"conversations": sharegpt(("alice", "hi"))})
    own = [{"role": "ipython", "content": "4"}]
    assert read({"messages": own}) == {"messages": own}


def test_tool_calls_need_no_content() -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    talk = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    expected = {"messages": [talk[0], called], "tools": tools}
    assert read({"messages": talk, "tools": tools}) == expected
    assert read({"messages": talk, "tools": '[{"type": "function", "function": {"name": "add"}}]'})
    assert "tools" not in read({"messages": TALK, "tools": None})
    assert "tools" not in read({"messages": TALK, "tools": ""})
    with pytest.raises(UserError, match="`tools` is not JSON"):
        read({"messages": TALK, "tools": "[add"})
    with pytest.raises(UserError, match="`tools` must be a list"):
        read({"messages": TALK, "tools": {"name": "add"}})


def test_parts_of_text_are_joined_and_pictures_refused() -> None:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"messages": [{"role": "user", "content": parts}]}) == {
        "messages": [{"role": "user", "content": "ab"}]
    }
    parts.append({"type": "image", "image": "x.png"})
    with pytest.raises(UserError, match=r"messages\[1\].content. part 3 is not text"):
        read({"messages": [{"role": "user", "content": parts}]})


@pytest.mark.parametrize(
    ("no", "yes"), [({"train": False}, {"train": True}), ({"weight": 0}, {"weight": 1.0})]
)
def test_messages_say_themselves_whether_they_are_learned(no: Any, yes: Any) -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", **no},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", **yes},
    ]
    fields = read_conversation("messages", talk)
    assert fields["learned"] == [None, False, None, True]
    assert all(set(message) == {"role", "content"} for message in fields["messages"])


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "user", "content": "a", "train": True}, "only turns of the assistant"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "must be true or false"),
        ({"role": "assistant", "content": "a", "train": "yes"}, "must be true or false"),
        ({"role": "assistant", "content": "a", "train": True, "weight": 0}, "true or false"),
    ],
)
def test_flags_that_cannot_be_kept_are_faults(message: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        read_conversation("messages", [message])


def test_a_prompt_and_a_completion_may_be_messages() -> None:
    row = {"prompt": TALK[:2], "completion": TALK[2:]}
    assert find_format("auto", list(row), {}) == "prompt_completion"
    assert read(row) == {"messages": TALK, "learned": [None, None, True, False], "num_prompt": 2}
    with pytest.raises(UserError, match="`completion` must be a list"):
        read({"prompt": TALK[:2], "completion": "hello"})
    with pytest.raises(UserError, match="`completion` must be text"):
        read({"prompt": "hi", "completion": TALK[2:]})


@pytest.mark.parametrize(
    ("talk", "fault"),
    [
        ([{"from": "human"}], r"conversations\[1\].value. must be text, got None"),
        ([{"from": 3, "value": "a"}], r"conversations\[1\].from. must be text, got 3"),
        ([{"from": "human", "value": ["a"]}], r"value. must be text"),
        ([{"text": "a"}], r"conversations\[1\].role. must be text, got None"),
        ([["human", "a"]], "message 1 must be"),
        ({"human": "a"}, "must be a list"),
        ([{"from": "human", "value": "\udcff"}], "half of a surrogate pair"),
    ],
)
def test_bad_conversations_are_faults(talk: Any, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        read({"conversations": talk})
