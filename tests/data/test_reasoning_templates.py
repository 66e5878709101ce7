"""Chat templates of reasoning models: each answer is trained in the form of its prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from wegeft_cli.data.text.dataset import PreparedData, build_datasets
from wegeft_cli.data.text.streaming import RowStream, open_stream
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSection, DataSource

TEMPLATES = Path(__file__).parent / "templates"
STRIPS = str(TEMPLATES / "strips-earlier-thoughts.jinja")
EMPTY = "<think>\n\n</think>\n\n"

Write = Callable[..., Path]


def message(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


COLORS = [
    message("user", "Name a color."),
    message("assistant", "<think>\nred is one\n</think>\n\nRed."),
    message("user", "Another one?"),
    message("assistant", "<think>\nblue too\n</think>\n\nBlue."),
]
PLAIN = [
    message("user", "Name a color."),
    message("assistant", "Red."),
    message("user", "Another one?"),
    message("assistant", "Blue."),
]
SHORT = [message("user", "Two plus two?"), message("assistant", "Four.")]


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "1", "function": {"name": "weather", "arguments": arguments}}


def weather(arguments: Any, content: str | None = "") -> list[dict[str, Any]]:
    return [
        message("user", "Weather?"),
        message("assistant", content, tool_calls=[call(arguments)]),
        message("tool", "rain", tool_call_id="1"),
        message("assistant", "It rains."),
    ]


def build(
    write_rows: Write, tokenizer: Any, rows: list[Any], *, template: str = STRIPS, **section: Any
) -> PreparedData:
    path = write_rows([row if isinstance(row, dict) else {"messages": row} for row in rows])
    settings = {"loss_on": "assistant", "max_length": 1000, **section}
    sources = [DataSource(path=str(path))]
    return build_datasets(
        DataSection(train=sources, template=template, **settings),
        tokenizer=tokenizer,
        recipe_dir=None,
    )


def texts(data: PreparedData, tokenizer: Any) -> list[tuple[str, str]]:
    """Return (whole text, learned text) of each training sequence."""
    rows = (data.train.row(i) for i in range(len(data.train)))
    return [(tokenizer.decode(ids), tokenizer.decode(ids[mask])) for ids, mask in rows]


def test_each_answer_is_learned_as_the_model_will_be_prompted(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build(write_rows, chat_tokenizer, [COLORS, SHORT])
    found = texts(data, chat_tokenizer)
    assert [learned for _, learned in found] == [
        "<think>\nred is one\n</think>\n\nRed.<|im_end|>",
        "<think>\nblue too\n</think>\n\nBlue.<|im_end|>",
        EMPTY + "Four.<|im_end|>",
    ]
    # The second prompt holds the first answer as the template writes it there.
    assert "<|im_start|>assistant\nRed.<|im_end|>" in found[1][0]
    (sequences,) = (each for each in data.report.warnings if "training sequences" in each)
    added = int(data.train.lengths[0])
    assert "2 rows became 3 training sequences" in sequences
    assert f"adds {added} tokens" in sequences


def test_turns_that_stay_as_they_are_share_one_sequence(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    # Thoughts of the calls after the last question are kept, those before it are not.
    thought = [*weather({"city": "Oslo"}), message("user", "Sure?"), message("assistant", "Yes.")]
    thought[1]["reasoning_content"] = thought[3]["reasoning_content"] = "hm"
    data = build(write_rows, chat_tokenizer, [thought])
    learned = [text for _, text in texts(data, chat_tokenizer)]
    assert len(learned) == 2
    assert learned[0].count("<think>") == 2
    assert learned[1] == EMPTY + "Yes.<|im_end|>"


def test_with_an_argument_the_empty_block_belongs_to_the_prompt(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build(
        write_rows, chat_tokenizer, [PLAIN, SHORT], chat_template_kwargs={"enable_thinking": False}
    )
    assert [learned for _, learned in texts(data, chat_tokenizer)] == [
        "Red.<|im_end|>", "Blue.<|im_end|>", "Four.<|im_end|>"
    ]  # fmt: skip
    assert texts(data, chat_tokenizer)[0][0].endswith(EMPTY + "Red.<|im_end|>\n")
    assert not any("empty" in each for each in data.report.warnings)


def test_a_note_names_a_learned_block_that_no_row_holds(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build(write_rows, chat_tokenizer, [PLAIN, COLORS])
    (note,) = (each for each in data.report.warnings if "empty" in each)
    assert "empty <think></think> into the learned answers of 1 rows" in note
    assert "data.chat_template_kwargs" in note


def test_a_rows_own_arguments_take_precedence(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [
        {"messages": SHORT, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": SHORT, "chat_template_kwargs": '{"enable_thinking": true}'},
        {"messages": SHORT, "chat_template_kwargs": None},
    ]
    data = build(write_rows, chat_tokenizer, rows, chat_template_kwargs={"enable_thinking": False})
    assert [EMPTY in learned for _, learned in texts(data, chat_tokenizer)] == [False, True, False]
    for value, message in ((7, "must be an object"), ({"tools": []}, "cannot set 'tools'")):
        with pytest.raises(UserError) as caught:
            build(
                write_rows,
                chat_tokenizer,
                [{"messages": SHORT, "chat_template_kwargs": value}],
            )
        assert message in str(caught.value)


def test_arguments_that_every_rendering_sets_are_refused(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError) as caught:
        build(write_rows, chat_tokenizer, [SHORT], chat_template_kwargs={"tokenize": True})
    assert caught.value.key == "data.chat_template_kwargs"


def test_arguments_change_the_template_hash(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    hashes = {
        build(write_rows, chat_tokenizer, [SHORT], **options).report.template_hash
        for options in (
            {},
            {"chat_template_kwargs": {}},
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"chat_template_kwargs": {"enable_thinking": True}},
            {"system_turn": "merge"},
        )
    }
    assert len(hashes) == 4


def test_a_split_never_divides_a_conversation(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    # Of six sequences the last third begins inside of a conversation.
    long = [*PLAIN, message("user", "More?"), message("assistant", "Green.")]
    data = build(write_rows, chat_tokenizer, [long, long], validation_fraction=0.34)
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (3, 3)


def test_the_cache_keeps_conversations_together(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    first, again = (build(write_rows, chat_tokenizer, [PLAIN, SHORT], **options) for _ in range(2))
    assert again.report.num_from_cache == 1
    for data in (first, again):
        assert data.train.continues is not None
        assert data.train.continues.tolist() == [True, False, False]
    assert first.report.warnings == again.report.warnings
    other = build(
        write_rows,
        chat_tokenizer,
        [PLAIN, SHORT],
        chat_template_kwargs={"enable_thinking": False},
        **options,
    )
    assert other.report.num_from_cache == 0


def test_the_cut_removes_answers_and_not_whole_conversations(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = build(write_rows, chat_tokenizer, [PLAIN, SHORT])
    red, blue, four = whole.train.lengths.tolist()
    cut = max(red, four)
    assert cut < blue
    data = build(write_rows, chat_tokenizer, [PLAIN, SHORT], max_length=cut)
    assert [learned for _, learned in texts(data, chat_tokenizer)] == [
        EMPTY + "Red.<|im_end|>", EMPTY + "Four.<|im_end|>"
    ]  # fmt: skip
    assert data.report.num_dropped_empty == 1
    assert data.train.continues is None


def stream(write_rows: Write, tokenizer: Any) -> RowStream:
    path = write_rows([{"messages": PLAIN}, {"messages": SHORT}, {"messages": COLORS}])
    section = DataSection(
        train=[DataSource(path=str(path))], template=STRIPS, loss_on="assistant", streaming=True,
        max_length=1000,
    )  # fmt: skip
    return open_stream(section, tokenizer, None, 0)


def test_a_stream_resumes_inside_a_conversation(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    def read(rows: RowStream) -> Iterator[tuple[list[int], dict[str, Any]]]:
        for _ in range(10):
            state = json.loads(json.dumps(rows.state()))
            ((ids, _),) = rows.take(1)
            yield ids.tolist(), state

    expected = list(read(stream(write_rows, chat_tokenizer)))
    assert len({str(ids) for ids, _ in expected}) == 5
    assert any("sequences" in state["chains"][0] for _, state in expected)
    for position, (_, state) in enumerate(expected):
        resumed = stream(write_rows, chat_tokenizer)
        resumed.seek(state)
        found = [ids.tolist() for ids, _ in (resumed.take(1)[0] for _ in expected[position:])]
        assert found == [ids for ids, _ in expected[position:]]


def test_marks_of_the_template_are_what_is_learned(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    marked = (TEMPLATES / "generation-marks.jinja").read_text()
    template = write_rows([], "marks.jinja")
    template.write_text(marked)
    data = build(write_rows, chat_tokenizer, [COLORS], template=str(template))
    assert [learned for _, learned in texts(data, chat_tokenizer)] == [
        f"{COLORS[1]['content']}<|im_end|>{COLORS[3]['content']}<|im_end|>"
    ]
    last = build(write_rows, chat_tokenizer, [COLORS], template=str(template), loss_on="completion")
    assert [learned for _, learned in texts(last, chat_tokenizer)] == [
        f"{COLORS[3]['content']}<|im_end|>"
    ]
    # Only what the marks hold is learned, wherever it is in the turn.
    template.write_text(
        marked.replace("{% generation %}", "{{ '(model) ' }}{% generation %}")
        .replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen")
        .replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")
    )
    data = build(write_rows, chat_tokenizer, [SHORT], template=str(template))
    assert texts(data, chat_tokenizer)[0][1] == "Four."


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("arguments-tojson", '"parameters": {"city": "Oslo"}}'),
        ("arguments-as-text", 'weather\n{"city": "Oslo"}'),
        ("strips-earlier-thoughts", '"arguments": {"city": "Oslo"}}'),
    ],
)
@pytest.mark.parametrize("content", ["", None])
def test_tool_calls_are_given_in_the_form_that_the_template_takes(
    write_rows: Write,
    chat_tokenizer: PreTrainedTokenizerFast,
    arguments: Any,
    template: str,
    shown: str,
    content: str | None,
) -> None:
    path = str(TEMPLATES / f"{template}.jinja")
    data = build(write_rows, chat_tokenizer, [weather(arguments, content)], template=path)
    assert shown in "".join(learned for _, learned in texts(data, chat_tokenizer))
    notes = [each for each in data.report.warnings if "arguments of tool calls" in each]
    converts = {"arguments-tojson": str, "arguments-as-text": dict}.get(template, ())
    assert len(notes) == isinstance(arguments, converts)


def test_arguments_that_are_no_json_are_one_fault(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = str(TEMPLATES / "arguments-tojson.jinja")
    with pytest.raises(UserError) as caught:
        build(write_rows, chat_tokenizer, [weather("{city")], template=path)
    assert "are not JSON" in str(caught.value)


def test_what_the_template_does_not_show_is_noted(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"messages": weather({"city": "Oslo"}), "tools": [{"name": "weather"}]}
    data = build(write_rows, chat_tokenizer, [row], template="chat", loss_on="completion")
    notes = "\n".join(data.report.warnings)
    assert "does not show the `tools` of 1 rows" in notes
    assert "does not show the `tool_calls` of 1 rows" in notes
    path = str(TEMPLATES / "strips-earlier-thoughts.jinja")
    shown = build(write_rows, chat_tokenizer, [row], template=path, loss_on="completion")
    assert not any("does not show the `tool_calls`" in each for each in shown.report.warnings)


def test_a_system_turn_can_be_merged(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = str(TEMPLATES / "instruct-no-system.jinja")
    rows = [[message("system", "Be brief."), *PLAIN]]
    with pytest.raises(UserError) as caught:
        build(write_rows, chat_tokenizer, rows, template=path)
    assert "only user and assistant" in caught.value.message
    assert "data.system_turn: merge" in str(caught.value.hint)
    data = build(write_rows, chat_tokenizer, rows, template=path, system_turn="merge")
    ((whole, learned),) = texts(data, chat_tokenizer)
    assert "[INST] Be brief.\n\nName a color. [/INST]" in whole
    assert learned == " Red.</s> Blue.</s>"


def test_numbers_and_unlearned_answers_are_noted(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    talk = [*SHORT[:1], message("assistant", None)]
    talk[1]["content"] = 4
    last = build(write_rows, chat_tokenizer, [talk, PLAIN], template="chat", loss_on="completion")
    notes = "\n".join(last.report.warnings)
    assert "the numbers of 1 rows are read as their JSON text" in notes
    assert "only the last answer of 1 conversations with several answers is learned" in notes
    every = build(write_rows, chat_tokenizer, [talk, PLAIN], template="chat")
    assert not any("only the last answer" in each for each in every.report.warnings)


def test_random_split_keeps_a_conversation_whole(
    write_rows: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    talks = [PLAIN for _ in range(6)]
    for seed in range(5):
        data = build(
            write_rows, chat_tokenizer, talks,
            validation_fraction=0.3, validation_split="random", validation_seed=seed,
        )  # fmt: skip
        for part in (data.train, data.validation):
            assert part is not None
            assert part.continues is not None
            assert not part.continues[-1]
            assert len(part) % 2 == 0
