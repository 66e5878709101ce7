"""Row formats: detection from the columns, checks of a row, the published corpora."""

from __future__ import annotations

from typing import Any

import pytest

from wegeft_cli.data.sources.formats import FORMATS, find_format, read_row
from wegeft_cli.errors import UserError


@pytest.mark.parametrize(
    ("columns", "renames", "expected"),
    [
        (["instruction", "input", "output"], {}, "instruction"),
        (["instruction", "input", "output", "answer"], {}, "instruction"),
        (["prompt", "completion"], {}, "prompt_completion"),
        (["messages", "prompt"], {}, "messages"),
        (["text", "id"], {}, "text"),
        (
            ["question", "answer"],
            {"prompt": "question", "completion": "answer"},
            "prompt_completion",
        ),
        (["question", "answer"], {"instruction": "question", "output": "answer"}, "instruction"),
        (["instruction", "output"], {"text": "output"}, "text"),
    ],
)
def test_formats_are_known_by_their_columns(
    columns: list[str], renames: dict[str, str], expected: str
) -> None:
    assert find_format("auto", columns, renames) == expected


@pytest.mark.parametrize(
    ("name", "renames", "message", "key", "hint"),
    [
        ("auto", {}, "no row format fits; columns found: question, answer", "columns", "columns:"),
        ("auto", {"prompt": "questoin"}, "no column 'questoin'", "columns", "mean question"),
        ("alpaca", {}, "no row format 'alpaca'", "format", None),
        ("mesages", {}, "no row format 'mesages'", "format", "did you mean messages"),
        ("text", {"txt": "answer"}, "format text has no field 'txt'", "columns", None),
    ],
)
def test_what_does_not_fit_is_told_with_the_way_out(
    name: str, renames: dict[str, str], message: str, key: str, hint: str | None
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        find_format(name, ["question", "answer"], renames)
    assert caught.value.key == key
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_columns_that_only_fit_a_corpus_are_not_guessed() -> None:
    with pytest.raises(UserError, match="no row format fits"):
        find_format("auto", ["query", "response", "type"], {})


def test_rows_keep_the_fields_of_their_format() -> None:
    row = {"question": "q", "answer": "a", "id": 3}
    renames = {"instruction": "question", "output": "answer"}
    assert read_row(row, FORMATS["instruction"], renames) == {
        "instruction": "q",
        "output": "a",
    }


@pytest.mark.parametrize(
    ("number", "text"), [(4, "4"), (-2, "-2"), (0.5, "0.5"), (10**20, "1" + "0" * 20)]
)
def test_numbers_are_read_as_their_json_text(number: float, text: str) -> None:
    row = {"instruction": "two plus two", "output": number}
    fields = read_row(row, FORMATS["instruction"], {})
    assert fields is not None
    assert fields["output"] == text
    talk = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": number}]
    fields = read_row({"messages": talk}, FORMATS["messages"], {})
    assert fields is not None
    assert fields["messages"][1]["content"] == text


@pytest.mark.parametrize(
    ("columns", "suggestion"),
    [
        (["question", "answer", "id"], "set columns: {prompt: question, completion: answer}"),
        (["context", "response"], "set columns: {prompt: context, completion: response}"),
        (
            ["instruction", "context", "response", "category"],
            "set columns: {instruction: instruction, input: context, output: response}",
        ),
        (["Question", "Answer"], "set columns: {prompt: Question, completion: Answer}"),
        (["a", "b"], "say which columns to read"),
    ],
)
def test_unknown_columns_get_a_setting_to_paste(columns: list[str], suggestion: str) -> None:
    with pytest.raises(UserError) as caught:
        find_format("auto", columns, {})
    assert suggestion in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("instruction", {"instruction": "a"}, "no `output`; the row has instruction"),
        ("instruction", {"instruction": "a", "output": None}, "`output` is null"),
        ("instruction", {"instruction": "a", "output": True}, r"must be text, got True \(bool\)"),
        ("instruction", {"instruction": "a", "output": {"b": 1}}, r"must be text, got .* \(dict\)"),
        ("instruction", {"instruction": "a", "output": float("nan")}, "must be text, got nan"),
        ("instruction", {"instruction": "a", "output": "b", "input": ["c"]}, r"got \['c'\] \(list"),
        ("text", {"text": "half \ud83d"}, "half of a surrogate pair at character 5"),
        (
            "messages",
            {"messages": "hi"},
            "must be a list of {role, content} or {from, value}, got 'hi'",
        ),
        ("messages", {"messages": []}, "must be a list"),
        ("messages", {"messages": ["hi"]}, "message 1 must be"),
        ("messages", {"messages": [{"role": "user"}]}, r"messages\[1\].content. must be text"),
    ],
)
def test_bad_rows_are_faults(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_row(row, FORMATS[name], {})


def test_nulls_of_a_table_are_no_message_fields() -> None:
    row = {"messages": [{"role": "user", "content": "a", "tool_calls": None}]}
    assert read_row(row, FORMATS["messages"], {}) == {
        "messages": [{"role": "user", "content": "a"}]
    }


def test_metamath_keeps_gsm_rows_and_cuts_the_last_line() -> None:
    row = {"query": "How many?", "response": "1+2=3\n#### 3\nThe answer is: 3", "type": "GSM_SV"}
    assert read_row(row, FORMATS["metamath"], {}) == {
        "instruction": "How many?",
        "output": "1+2=3\n#### 3",
    }
    assert read_row({**row, "type": "MATH_AnsAug"}, FORMATS["metamath"], {}) is None


def test_codefeedback_keeps_the_first_code_block() -> None:
    row = {"query": "Sort.", "answer": "So:\n```py\nx.sort()\n```\nor\n```py\nsorted(x)\n```"}
    assert read_row(row, FORMATS["codefeedback"], {}) == {
        "instruction": "Sort.",
        "output": "So:\n```py\nx.sort()\n```",
    }
    assert read_row({"query": "Sort.", "answer": "x.sort()"}, FORMATS["codefeedback"], {}) is None


@pytest.mark.parametrize(
    ("output", "is_kept"),
    [("Sure: 3", True), ("I'm SORRY", False), ("As an AI model", False)],
)
def test_wizardlm_drops_refusals(output: str, is_kept: bool) -> None:
    row = read_row({"instruction": "a", "output": output}, FORMATS["wizardlm"], {})
    assert (row is not None) == is_kept


def test_the_published_sizes() -> None:
    sizes = {
        name: (form.corpus.length_below, form.corpus.num_train, form.corpus.num_validation)
        for name, form in FORMATS.items()
        if form.corpus
    }
    assert sizes == {
        "metamath": (512, 100_000, 10_000),
        "codefeedback": (1024, 100_000, 10_000),
        "wizardlm": (1024, 52_000, 18_000),
    }
