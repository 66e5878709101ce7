"""Turns: which answers of a conversation are learned, by the recipe and by the rows themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from wegeft_cli.data.text.chat_rendering import RenderedText
from wegeft_cli.data.text.templates import render_row
from wegeft_cli.errors import UserError

CALL = {"name": "add"}


def chatml(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, tools: Any = None
) -> str:
    text = "" if tools is None else f"<|tools|>{tools}<|end|>\n"
    for m in messages:
        calls = "".join(f"<call>{call['name']}</call>" for call in m.get("tool_calls", ()))
        text += f"<|{m['role']}|>\n{m['content'].strip()}{calls}<|end|>\n"
    return text + ("<|assistant|>\n" if add_generation_prompt else "")


def talk(*turns: str) -> list[dict[str, Any]]:
    roles = {"u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def render(messages: list[dict[str, Any]], loss_on: str = "completion", **row: Any) -> RenderedText:
    return render_row(
        {"messages": messages, **row},
        template="chat",
        loss_on=loss_on,
        apply_chat_template=chatml,
    )


def learned(rendered: RenderedText) -> list[str]:
    return [segment.text for segment in rendered.segments if segment.trained]


FOUR = talk("u:1", "a:two", "u:3", "a:four")


@pytest.mark.parametrize(
    ("flags", "loss_on", "expected"),
    [
        ([None, True, None, None], "completion", ["two<|end|>", "four<|end|>"]),
        ([None, True, None, False], "completion", ["two<|end|>"]),
        ([None, False, None, None], "assistant", ["four<|end|>"]),
        ([None, False, None, False], "assistant", []),
    ],
)
def test_a_rows_own_word_goes_before_the_recipes(
    flags: list[bool | None], loss_on: str, expected: list[str]
) -> None:
    rendered = render(FOUR, loss_on, learned=flags)
    assert learned(rendered) == expected
    assert rendered.is_blank == (not expected)


def test_of_a_whole_conversation_a_turn_can_be_left_out() -> None:
    whole = "".join(learned(render(FOUR, "all", learned=[None, False, None, None])))
    assert "two" not in whole
    assert "four<|end|>" in whole
    assert "<|user|>\n1<|end|>" in whole


def test_what_follows_the_last_learned_turn_is_left_out() -> None:
    assert "four" not in render(FOUR, learned=[None, True, None, False]).text


def test_calls_of_tools_are_learned() -> None:
    messages = talk("u:1+1?", "a:", "t:2", "a:It is 2.")
    messages[1]["tool_calls"] = [CALL]
    rendered = render(messages, "assistant", tools=[CALL])
    assert rendered.text.startswith("<|tools|>[{'name': 'add'}]")
    assert learned(rendered) == ["<call>add</call><|end|>", "It is 2.<|end|>"]
    assert "<|tools|>" not in render(messages, "assistant").text


def test_a_template_that_drops_a_call_is_a_fault() -> None:
    def silent(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        said = "".join(f"{m['role']}: {m['content']}" for m in messages if m["content"])
        return said + ("assistant: " if add_generation_prompt else "")

    messages = talk("u:1+1?", "a:")
    messages[1]["tool_calls"] = [CALL]
    row = {"messages": messages}
    with pytest.raises(UserError, match=r"writes turn 2 differently|does not show the answer"):
        render_row(row, template="chat", loss_on="completion", apply_chat_template=silent)


@pytest.mark.parametrize("content", ["", "I look it up."])
def test_a_template_that_knows_no_calls_would_teach_half_an_answer(content: str) -> None:
    def plain(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return chatml(
            [{"role": m["role"], "content": m["content"]} for m in messages], add_generation_prompt
        )

    messages = talk("u:1+1?", f"a:{content}", "t:2", "a:It is 2.")
    messages[1]["tool_calls"] = [CALL]
    for loss_on, part in (("completion", messages[:2]), ("assistant", messages)):
        with pytest.raises(UserError, match=r"drops the answer of turn 2: .* tool call"):
            render_row(
                {"messages": part}, template="chat", loss_on=loss_on, apply_chat_template=plain
            )
        assert "<call>add</call>" in learned(render(part, loss_on))[0]
    # The call is read and not learned.
    row = {"messages": messages}
    render_row(row, template="chat", loss_on="completion", apply_chat_template=plain)


def test_a_greeting_is_read_and_not_learned() -> None:
    greeted = talk("a:Welcome", "u:hi", "a:hello")
    for loss_on in ("completion", "assistant"):
        rendered = render(greeted, loss_on)
        assert learned(rendered) == ["hello<|end|>"]
        assert "Welcome" in rendered.text


def test_turns_behind_the_cut_are_not_looked_for() -> None:
    calls = 0

    def counting(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        nonlocal calls
        calls += 1
        return chatml(messages, add_generation_prompt)

    long = talk(*(f"{'ua'[i % 2]}:{i}" for i in range(2000)))
    rendered = render_row(
        {"messages": long},
        template="chat",
        loss_on="assistant",
        apply_chat_template=counting,
        max_characters=500,
    )
    assert calls < 60  # two for each turn looked for, of which 500 characters hold about twenty
    assert rendered.text == chatml(long, False)
    whole = render(long[:20], "assistant")
    assert learned(rendered)[: len(learned(whole))] == learned(whole)
