"""Pipeline: the data section becomes data sets, and everything that was not learned is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from wegeft_cli.data import formats
from wegeft_cli.data.encode import EncodedDataset
from wegeft_cli.data.pipeline import PreparedData, build_datasets
from wegeft_cli.data.templates import template_hash
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSection, DataSource

WriteRows = Callable[..., Path]
QA = [{"prompt": f"{i} + 1?", "completion": f" {i + 1}"} for i in range(10)]
TALK = [
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "the sum"},
        ]
    }
]


def source(file: Path | str, **fields: Any) -> DataSource:
    return DataSource(path=str(file), **fields)


def build(tokenizer: Any, *files: Path | DataSource, **fields: Any) -> PreparedData:
    sources = [each if isinstance(each, DataSource) else source(each) for each in files]
    need_validation = fields.pop("need_validation", True)
    return build_datasets(
        DataSection(train=sources, **fields),
        tokenizer=tokenizer,
        recipe_dir=None,
        need_validation=need_validation,
    )


def texts(dataset: EncodedDataset, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(dataset.row(i)[0].tolist()) for i in range(len(dataset))]


def trained_texts(dataset: EncodedDataset, tokenizer: Any) -> list[str]:
    rows = (dataset.row(i) for i in range(len(dataset)))
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in rows]


def test_rows_become_tokens_and_a_report(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    file = write_rows(QA)
    data = build(tokenizer, file)
    assert texts(data.train, tokenizer)[3] == "<s>3 + 1? 4</s>"
    assert trained_texts(data.train, tokenizer)[3] == " 4</s>"
    report = data.report
    assert data.validation is None
    assert report.num_rows == len(data.train) == 10
    assert report.num_tokens == len(data.train.ids)
    assert report.num_label_tokens == data.train.label_counts.sum()
    assert report.lengths["max"] == data.train.lengths.max()
    assert set(report.lengths) == {"p50", "p95", "max"}
    assert report.sources[0]["path"] == str(file)
    assert report.sources[0]["rows"] == 10
    assert len(report.sources[0]["sha256"]) == 64
    assert (report.template, report.template_hash) == ("plain", template_hash("plain"))
    assert report.warnings == []


def test_sources_are_joined_in_order_each_with_its_own_template(
    chat_tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    talk, plain = write_rows(TALK, "talk.jsonl"), write_rows(QA, "qa.jsonl")
    gsm = write_rows([{"question": "2?", "answer": "#### 2"}], "gsm.jsonl")
    renamed = source(gsm, columns={"prompt": "question", "completion": "answer"})
    data = build(chat_tokenizer, talk, source(plain, limit=2), renamed)
    assert texts(data.train, chat_tokenizer) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nthe sum<|im_end|>\n",
        "<s>0 + 1? 1</s>",
        "<s>1 + 1? 2</s>",
        "<s>2?#### 2</s>",
    ]
    assert trained_texts(data.train, chat_tokenizer)[0] == "the sum<|im_end|>"
    assert data.report.template == "chat, plain"
    assert [each["rows"] for each in data.report.sources] == [1, 2, 1]


@pytest.mark.parametrize(
    ("fraction", "held_out"), [(0.1, 1), (0.19, 1), (0.3, 3), (0.7, 7), (0.99, 9)]
)
def test_the_last_rows_are_held_out(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, fraction: float, held_out: int
) -> None:
    file = write_rows(QA)
    whole = texts(build(tokenizer, file).train, tokenizer)
    data = build(tokenizer, file, validation_fraction=fraction)
    assert data.validation is not None
    assert texts(data.train, tokenizer) == whole[: 10 - held_out]
    assert texts(data.validation, tokenizer) == whole[10 - held_out :]
    assert data.report.num_validation_rows == held_out
    without = build(tokenizer, file, validation_fraction=fraction, need_validation=False)
    assert without.validation is None
    assert len(without.train) == 10 - held_out


def test_a_fraction_that_holds_out_nothing_is_a_fault(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    with pytest.raises(UserError, match=r"0\.01 of 10 rows is no row") as caught:
        build(tokenizer, write_rows(QA), validation_fraction=0.01)
    assert caught.value.key == "data.validation_fraction"


def test_validation_sources_are_read_when_needed(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    file, other = write_rows(QA), write_rows(QA[:3], "validation.jsonl")
    data = build(tokenizer, file, validation=[source(other)])
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (10, 3)
    missing = [source("nowhere.jsonl")]
    assert build(tokenizer, file, validation=missing, need_validation=False).validation is None
    with pytest.raises(UserError) as caught:
        build(tokenizer, file, validation=missing)
    assert caught.value.key == "data.validation[0].path"


def test_what_is_cut_dropped_or_merged_is_told(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    rows = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": ""},
        {"prompt": "q", "completion": "abcdefghijkl"},
        {"prompt": "abcdefghijkl", "completion": "a"},
        {"prompt": "q ", "completion": "the"},
    ]
    report = build(tokenizer, write_rows(rows), max_length=8).report
    assert (report.num_rows, report.num_truncated, report.num_dropped_empty) == (3, 1, 2)
    assert report.num_boundary_merged == 1
    assert len(report.warnings) == 4
    for sentence, part in zip(
        report.warnings,
        ["1 of 5 rows were cut", "1 of 5 rows have an empty", "1 of 5 rows were left out", "joins"],
        strict=True,
    ):
        assert part in sentence


def test_nothing_to_learn_at_all_is_a_fault(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    rows = [{"prompt": "q", "completion": ""}, {"prompt": "abcdefghijkl", "completion": "a"}]
    with pytest.raises(UserError, match="none of the 2 rows") as caught:
        build(tokenizer, write_rows(rows), max_length=8)
    assert "1 with an empty completion" in caught.value.message
    assert "data.max_length 8" in caught.value.message
    assert caught.value.key == "data.train[0]"
    with pytest.raises(UserError, match="no data to train on"):
        build(tokenizer)


def test_bad_rows_are_told_together_with_their_lines(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    bad = [{"prompt": "q"}, {"prompt": "q", "completion": None}, {"prompt": 3, "completion": "a"}]
    file = write_rows([*QA[:1], *bad])
    with pytest.raises(ExceptionGroup) as caught:
        build(tokenizer, file)
    told = [(each.file, each.message) for each in caught.value.exceptions]
    assert [place for place, _ in told] == [f"{file}:{line}" for line in (2, 3, 4)]
    assert ["no `completion`" in told[0][1], "null" in told[1][1], "(int)" in told[2][1]] == [
        True
    ] * 3
    assert all(each.key == "data.train[0]" for each in caught.value.exceptions)


def test_only_a_handful_of_bad_rows_is_told(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        build(tokenizer, write_rows([*QA[:1], *[{"prompt": "q"}] * 50]))
    assert len(caught.value.exceptions) == 5


def test_faults_of_all_sources_come_at_once(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    odd = write_rows([{"question": "q"}], "odd.jsonl")
    with pytest.raises(ExceptionGroup) as caught:
        build(tokenizer, source("nowhere.jsonl"), write_rows(QA), odd)
    assert [each.key for each in caught.value.exceptions] == [
        "data.train[0].path",
        "data.train[2].columns",
    ]


def test_a_template_that_does_not_fit_is_told_once(
    chat_tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    with pytest.raises(UserError, match="do not fit the template 'alpaca'") as caught:
        build(chat_tokenizer, write_rows(TALK * 9), template="alpaca")
    assert caught.value.key == "data.template"


def test_a_tokenizer_without_a_chat_template_is_a_fault(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    with pytest.raises(UserError, match="has no chat template") as caught:
        build(tokenizer, write_rows(TALK))
    assert caught.value.key == "data.template"


def test_a_template_file_of_ones_own(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, tmp_path: Path
) -> None:
    template = tmp_path / "mine.jinja"
    text = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    template.write_text(text)
    section = DataSection(train=[source(write_rows(QA[:1]))], template="mine.jinja")
    data = build_datasets(section, tokenizer=tokenizer, recipe_dir=tmp_path)
    # The template's own BOS is the only one; no end mark of its own, so EOS follows.
    assert texts(data.train, tokenizer) == ["<s>[user] 0 + 1? [assistant]  1 </s>"]
    assert trained_texts(data.train, tokenizer)[0].endswith("1 </s>")
    assert data.report.template_hash == template_hash(text)


@pytest.mark.parametrize(
    ("text", "message", "key"),
    [
        ("{% for %}", "is not Jinja", "data.template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate", "data.train[0]"),
        ("{{ messages[0].content + 3 }}", "refuses the conversation", "data.train[0]"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation: .*unsafe", "data.train[0]"),
        ("{{ messages[0].content }}", "does not show the answer", "data.train[0]"),
    ],
)
def test_a_faulty_template_file_is_told(
    tokenizer: PreTrainedTokenizerFast,
    write_rows: WriteRows,
    tmp_path: Path,
    text: str,
    message: str,
    key: str,
) -> None:
    template = tmp_path / "mine.j2"
    template.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        build(tokenizer, write_rows(TALK), template=str(template))
    assert caught.value.key == key


def test_a_missing_template_file_is_told(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    with pytest.raises(UserError, match=r"no such template file: 'gone\.jinja'"):
        build(tokenizer, write_rows(QA), template="gone.jinja")


def test_a_corpus_takes_its_first_rows_for_training_and_the_next_for_validation(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = formats.FORMATS["metamath"]
    assert form.corpus is not None
    small = formats.Corpus(
        **{**vars(form.corpus), "length_below": 40, "num_train": 3, "num_validation": 2}
    )
    monkeypatch.setitem(
        formats.FORMATS, "metamath", formats.RowFormat(form.required, "metamath", corpus=small)
    )
    rows = [
        {
            "query": str(i),
            "response": f"{'long ' * 40 if i == 1 else 'a'}\n#### {i}\nThe answer is: {i}",
            "type": "MATH" if i == 2 else "GSM_Rephrased",
        }
        for i in range(9)
    ]
    file = source(write_rows(rows), format="metamath")
    data = build(tokenizer, file, validation=[file])
    assert texts(data.train, tokenizer) == [f"<s>Q: {i}\nA:  a\n#### {i}</s>" for i in (0, 3, 4)]
    assert trained_texts(data.train, tokenizer)[0].strip() == "a\n#### 0</s>"
    assert data.validation is not None
    assert [text[6] for text in texts(data.validation, tokenizer)] == ["5", "6"]
    assert data.report.num_filtered == 6
    assert "6 of 9 rows were left out by the rule of the format 'metamath'" in str(
        data.report.warnings
    )
    with pytest.raises(UserError, match="the corpus's rule keeps none"):
        build(tokenizer, source(write_rows(rows[2:3], "math.jsonl"), format="metamath"))
