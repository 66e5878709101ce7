"""Templates: the published prompt forms byte for byte, and what of a conversation is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from wegeft_cli.data.text.chat_rendering import RenderedText
from wegeft_cli.data.text.templates import (
    TEMPLATES,
    check_template,
    is_template_file,
    render_row,
    template_hash,
)
from wegeft_cli.errors import UserError

I16 = "                "  # the sixteen spaces of LLM-Adapters' source
ROW = {"instruction": "Add {a} and b.", "output": "#### 3"}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\nAdd {a} and b.\n\n### Response:\n"
)
GSM8K = (
    "Add {a} and b.\nAnswer the above question. First think step by step and then answer the"
    " final number.\n"
)
PUBLISHED = {
    "alpaca": (ALPACA, "#### 3"),
    "plain": ("Add {a} and b.", "#### 3"),
    "commonsense": ("Add {a} and b.\n", "#### 3"),
    "question_answer": ("Question: Add {a} and b.\nAnswer:", " #### 3"),
    "llm_adapters": (
        "Below is an instruction that describes a task. Write a response that appropriately"
        f" completes the request.  \n\n{I16}### Instruction:\n{I16}Add {{a}} and b.\n{I16}\n"
        f"{I16}### Response:\n{I16}",
        "#### 3",
    ),
    "gsm8k_wegeft": (GSM8K, "The answer is: 3"),
    "gsm8k_gift": (GSM8K, "The final answer is:  3"),
    "metamath": ("Q: Add {a} and b.\nA: ", " #### 3"),
    "lora_ga": (ALPACA, " #### 3"),
    "metamath_alpaca": (
        ALPACA.removesuffix("\n") + " Let's think step by step.",
        " #### 3",
    ),
}


def chatml(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    text = "".join(f"<|{m['role']}|>\n{m['content'].strip()}<|end|>\n" for m in messages)
    return text + ("<|assistant|>\n" if add_generation_prompt else "")


def talk(*turns: str) -> dict[str, Any]:
    """A conversation: u: and a: are the roles."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


def trained(rendered: RenderedText) -> list[str]:
    return [segment.text for segment in rendered.segments if segment.trained]


def test_every_pair_template_is_published_here() -> None:
    assert set(PUBLISHED) | {"chat"} == set(TEMPLATES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_pair_templates_are_byte_exact(name: str) -> None:
    prompt, completion = PUBLISHED[name]
    rendered = render_row(ROW, template=name, loss_on="completion")
    assert [(s.text, s.trained) for s in rendered.segments] == [(prompt, False), (completion, True)]
    assert rendered.append_eos
    assert rendered.add_special_tokens
    same = {"prompt": ROW["instruction"], "completion": ROW["output"]}
    assert render_row(same, template=name, loss_on="completion") == rendered


def test_alpaca_with_input_is_byte_exact() -> None:
    row = {"instruction": "Translate.", "input": "oui", "output": "yes"}
    assert render_row(row, template="alpaca", loss_on="completion").segments[0].text == (
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Translate.\n\n### Input:\noui\n\n### Response:\n"
    )


@pytest.mark.parametrize("extra", ["", "  ", None])
def test_a_blank_input_is_no_input(extra: str | None) -> None:
    row = {**ROW, "input": extra}
    assert render_row(row, template="alpaca", loss_on="completion").text == ALPACA + "#### 3"


def test_a_template_without_a_place_for_input_refuses_it() -> None:
    row = {**ROW, "input": "more"}
    with pytest.raises(UserError, match=r"no place for `input`, got 'more'"):
        render_row(row, template="commonsense", loss_on="completion")


def test_auto_goes_by_the_fields() -> None:
    assert render_row(ROW, template="auto", loss_on="completion").text.startswith("Below is")
    pair = {"prompt": "a", "completion": "b"}
    assert render_row(pair, template="auto", loss_on="completion").text == "ab"
    text = render_row({"text": "abc"}, template="auto", loss_on="completion")
    assert trained(text) == ["abc"]
    chat = render_row(
        talk("u:a", "a:b"), template="auto", loss_on="completion", apply_chat_template=chatml
    )
    assert chat.text == "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n"


def test_loss_on_all_learns_the_prompt_too() -> None:
    assert trained(render_row(ROW, template="plain", loss_on="all")) == ["Add {a} and b.", "#### 3"]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("completion", ["four<|end|>"]),
        ("assistant", ["two<|end|>", "four<|end|>"]),
        (
            "all",
            [
                "<|user|>\none<|end|>\n<|assistant|>\ntwo<|end|>\n<|user|>\nthree<|end|>\n"
                "<|assistant|>\n",
                "four<|end|>",
                "\n",
            ],
        ),
    ],
)
def test_learned_turns_of_a_conversation(loss_on: str, expected: list[str]) -> None:
    rendered = render_row(
        talk("u:one", "a: two ", "u:three", "a:four", "u:thanks"),
        template="chat",
        loss_on=loss_on,
        apply_chat_template=chatml,
    )
    assert trained(rendered) == expected
    assert "thanks" not in rendered.text  # nothing is learned from what follows the last answer
    assert not rendered.append_eos  # the template has its own end mark
    assert not rendered.add_special_tokens


def test_a_template_without_an_end_mark_gets_eos() -> None:
    def bare(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        lines = [f"{m['role']}: {m['content']}\n" for m in messages]
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")

    rendered = render_row(
        talk("u:hi", "a:hello"), template="chat", loss_on="completion", apply_chat_template=bare
    )
    assert trained(rendered) == ["hello\n"]
    assert rendered.append_eos


def test_instruction_rows_become_a_conversation() -> None:
    row = {"instruction": "Translate.", "input": "oui", "output": "yes"}
    rendered = render_row(
        row, template="mine.jinja", loss_on="completion", apply_chat_template=chatml
    )
    assert rendered.text == ("<|user|>\nTranslate.\n\noui<|end|>\n<|assistant|>\nyes<|end|>\n")


def test_a_blank_answer_is_not_learned() -> None:
    rendered = render_row(
        talk("u:hi", "a: "), template="chat", loss_on="completion", apply_chat_template=chatml
    )
    assert rendered.is_blank


def test_a_template_that_drops_the_answer_is_a_fault() -> None:
    def forgetful(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return "".join(f"<|{m['role']}|>" for m in messages)

    with pytest.raises(UserError, match="does not show the answer 'hello'"):
        render_row(
            talk("u:hi", "a:hello"),
            template="chat",
            loss_on="completion",
            apply_chat_template=forgetful,
        )


def test_a_template_that_rewrites_earlier_turns_gets_a_sequence_for_each_answer() -> None:
    def forgets_thoughts(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return chatml(
            [
                m if i == len(messages) - 1 else {**m, "content": m["content"].replace("hm ", "")}
                for i, m in enumerate(messages)
            ],
            add_generation_prompt,
        )

    row = talk("u:a", "a:hm b", "u:c", "a:hm d")
    kept = render_row(
        row, template="chat", loss_on="completion", apply_chat_template=forgets_thoughts
    )
    assert trained(kept) == ["hm d<|end|>"]
    both = render_row(
        row, template="chat", loss_on="assistant", apply_chat_template=forgets_thoughts
    )
    assert [trained(each) for each in (*both.earlier, both)] == [["hm b<|end|>"], ["hm d<|end|>"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (talk("u:a"), "no turn of the role `assistant`"),
        (talk("a:a"), "begins with the turn of the assistant"),
    ],
)
def test_conversations_that_teach_nothing_are_faults(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_row(row, template="chat", loss_on="completion", apply_chat_template=chatml)


@pytest.mark.parametrize(
    ("row", "template"),
    [(talk("u:a", "a:b"), "alpaca"), ({"text": "a"}, "alpaca"), ({"text": "a"}, "chat")],
)
def test_rows_that_do_not_fit_the_template_name_the_key(row: dict[str, Any], template: str) -> None:
    with pytest.raises(UserError, match="do not fit the template") as caught:
        render_row(row, template=template, loss_on="completion", apply_chat_template=chatml)
    assert caught.value.key == "data.template"


def test_an_unknown_template_hints_at_the_nearest() -> None:
    with pytest.raises(UserError, match="no template 'alpcaa'") as caught:
        check_template("alpcaa")
    assert caught.value.hint == "did you mean alpaca?"


def test_template_files_are_known_by_their_ending() -> None:
    assert is_template_file("a/b.jinja")
    assert is_template_file("b.j2")
    assert not is_template_file("chat")


def test_hashes_tell_templates_apart() -> None:
    hashes = {template_hash(name) for name in [*TEMPLATES, "{{ a jinja text }}"]}
    assert len(hashes) == len(TEMPLATES) + 1
    assert all(len(digest) == 16 for digest in hashes)
