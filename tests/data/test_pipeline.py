"""Pipeline: the data section becomes data sets, and everything that was not learned is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from wegeft_cli.data.batches.mixture import Mixture
from wegeft_cli.data.sources import formats
from wegeft_cli.data.text.dataset import PreparedData, build_datasets
from wegeft_cli.data.text.encode import EncodedDataset
from wegeft_cli.data.text.templates import template_hash
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
        [
            "1 of 5 rows were cut",
            "1 of 5 rows with an empty completion were excluded (the first is ",
            "train.jsonl:4)",
            "joins",
        ],
        strict=True,
    ):
        assert part in sentence


def test_nothing_to_learn_at_all_is_a_fault(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    rows = [{"prompt": "q", "completion": ""}, {"prompt": "abcdefghijkl", "completion": "a"}]
    with pytest.raises(UserError, match="none of the 2 rows") as caught:
        build(tokenizer, write_rows(rows), max_length=8)
    assert "1 with an empty completion (the first is " in caught.value.message
    assert "train.jsonl:1)" in caught.value.message
    assert re.search(r"data.max_length 8 \(the first is .*train.jsonl:2\)", caught.value.message)
    assert caught.value.key == "data.train[0]"
    with pytest.raises(UserError, match="no data to train on"):
        build(tokenizer)


def test_bad_rows_are_told_together_with_their_lines(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    bad = [
        {"prompt": "q"},
        {"prompt": "q", "completion": None},
        {"prompt": True, "completion": "a"},
    ]
    file = write_rows([*QA[:1], *bad])
    with pytest.raises(ExceptionGroup) as caught:
        build(tokenizer, file)
    told = [(each.file, each.message) for each in caught.value.exceptions]
    assert [place for place, _ in told] == [f"{file}:{line}" for line in (2, 3, 4)]
    assert ["no `completion`" in told[0][1], "null" in told[1][1], "(bool)" in told[2][1]] == [
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


def test_of_named_chat_templates_each_row_takes_its_own(
    chat_tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    chat_tokenizer.chat_template = {"tool_use": chat_tokenizer.chat_template}
    tools = [{"type": "function", "function": {"name": "add"}}]
    data = build(chat_tokenizer, write_rows([{**TALK[0], "tools": tools}]))
    assert len(data.train) == 1
    message = r"\(tool_use\) none is for a conversation without tools"
    with pytest.raises(UserError, match=message) as caught:
        build(chat_tokenizer, write_rows(TALK * 3))
    assert caught.value.key == "data.template"


@pytest.mark.parametrize("where", ["name", "tools"])
def test_half_a_surrogate_pair_is_told_wherever_the_template_takes_it_from(
    chat_tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, where: str
) -> None:
    chat_tokenizer.chat_template = (
        "{{ tools | tojson }}{{ messages[0].name }}" + chat_tokenizer.chat_template
    )
    talk = TALK[0]["messages"]
    half = {"messages": [{**talk[0], "name": "\ud800"}, *talk[1:]]}
    if where == "tools":
        half = {"messages": talk, "tools": [{"name": "\ud800"}]}
    file = write_rows([TALK[0], half])
    with pytest.raises(UserError, match="half of a surrogate pair") as caught:
        build(chat_tokenizer, file)
    assert caught.value.file == f"{file}:2"


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
        (
            "Q: {{ instruction }}\nA: {{ output }}",
            "reads `instruction`, `output`, but a row is in the variable `messages`",
            "data.template",
        ),
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


def test_a_dropped_tool_call_is_told_with_its_row(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, tmp_path: Path
) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    asked = {"role": "user", "content": "1?"}
    said = {"role": "assistant", "content": "2"}
    path = write_rows([{"messages": [asked, said]}, {"messages": [asked, calling]}])
    with pytest.raises(UserError, match="drops the answer of turn 2") as caught:
        build(tokenizer, path, template=str(template))
    assert caught.value.file == f"{path}:2"


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
    assert "6 of 9 rows were excluded by the rule of the format 'metamath'" in str(
        data.report.warnings
    )
    with pytest.raises(UserError, match="the corpus's rule keeps none"):
        build(tokenizer, source(write_rows(rows[2:3], "math.jsonl"), format="metamath"))


def test_weighted_sources_become_a_mixture(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    one, two = write_rows(QA), write_rows(QA[:4], "two.jsonl")
    weighted = [source(one, weight=1), source(two, weight=3)]
    data = build(tokenizer, *weighted)
    assert data.mixture == Mixture((10, 4), (1, 3))
    assert len(data.train) == 14
    held_out = build(tokenizer, *weighted, validation_fraction=0.2)
    assert held_out.mixture == Mixture((10, 2), (1, 3))
    assert build(tokenizer, one, two).mixture is None
    with pytest.raises(UserError, match=r"takes every row of data.train\[1\]") as caught:
        build(tokenizer, *weighted, validation_fraction=0.3)
    assert caught.value.key == "data.validation_fraction"
    with pytest.raises(UserError, match="of 14 rows is no row") as caught:
        build(tokenizer, source(one, weight=1000), source(two, weight=1))
    assert caught.value.key == "data.train[1].weight"


SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "the sum"},
            {"from": "human", "value": "?"},
            {"from": "gpt", "value": "is 7"},
        ]
    }
]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("completion", "is 7<|im_end|>"), ("assistant", "the sum<|im_end|>is 7<|im_end|>")],
)
def test_sharegpt_rows_take_the_chat_template(
    chat_tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, loss_on: str, expected: str
) -> None:
    data = build(chat_tokenizer, write_rows(SHAREGPT), loss_on=loss_on)
    assert trained_texts(data.train, chat_tokenizer) == [expected]
    assert data.report.template == "chat"


def test_a_prompt_and_a_completion_of_messages_take_the_chat_template(
    chat_tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    talk = TALK[0]["messages"]
    rows: list[dict[str, Any]] = [{"prompt": talk[:1], "completion": talk[1:]}]
    data = build(chat_tokenizer, write_rows(rows))
    whole = build(chat_tokenizer, write_rows(TALK, "talk.jsonl"))
    assert texts(data.train, chat_tokenizer) == texts(whole.train, chat_tokenizer)
    assert data.train.label_mask.tolist() == whole.train.label_mask.tolist()
    with pytest.raises(UserError, match="`prompt` must be a list of messages, as in the first"):
        build(chat_tokenizer, write_rows([*rows, *QA[:1]]))
    with pytest.raises(UserError, match="`prompt` must be text, as in the first row; got"):
        build(chat_tokenizer, write_rows([*QA[:1], *rows]))


@pytest.mark.parametrize(
    ("loss_on", "is_learned"), [("completion", False), ("assistant", False), ("all", True)]
)
def test_answers_in_a_prompt_are_read(
    chat_tokenizer: PreTrainedTokenizerFast,
    write_rows: WriteRows,
    loss_on: str,
    is_learned: bool,
) -> None:
    before = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "old"},
        {"role": "user", "content": "b"},
    ]
    rows = [{"prompt": before, "completion": [{"role": "assistant", "content": "new"}]}]
    data = build(chat_tokenizer, write_rows(rows), loss_on=loss_on)
    learned = trained_texts(data.train, chat_tokenizer)[0]
    assert "old" in texts(data.train, chat_tokenizer)[0]
    assert "new<|im_end|>" in learned
    assert ("old" in learned) == is_learned
    before[1]["train"] = True  # type: ignore[assignment]
    data = build(chat_tokenizer, write_rows(rows), loss_on=loss_on)
    assert "old" in trained_texts(data.train, chat_tokenizer)[0]


def test_turns_that_no_row_learns_are_a_fault(
    chat_tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    silent = [{"messages": [*TALK[0]["messages"][:1], {**TALK[0]["messages"][1], "train": False}]}]
    reason = r"3 whose turns .* marked as not learned .* \(the first is .*train\.jsonl:1\)"
    with pytest.raises(UserError, match=f"none of the 3 rows has anything to learn: {reason}"):
        build(chat_tokenizer, write_rows(silent * 3))
    report = build(chat_tokenizer, write_rows([*TALK, *silent]), loss_on="assistant").report
    assert any(
        re.search(r"1 of \d rows whose turns .* were excluded .*train\.jsonl:\d", told)
        for told in report.warnings
    )
    assert "empty" not in "".join(report.warnings)


def test_places_of_dropped_rows_come_from_the_cache_unless_the_file_has_moved(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows([*QA, {"prompt": "q", "completion": ""}])
    first = build(tokenizer, file, cache_dir=str(tmp_path / "cache")).report
    again = build(tokenizer, file, cache_dir=str(tmp_path / "cache")).report
    assert again.num_from_cache == 1
    assert first.warnings == again.warnings
    assert f"(the first is {file}:{len(QA) + 1})" in first.warnings[0]
    moved = file.rename(tmp_path / "moved.jsonl")
    elsewhere = build(tokenizer, moved, cache_dir=str(tmp_path / "cache")).report
    assert elsewhere.num_from_cache == 1
    assert str(file) not in elsewhere.warnings[0]


def test_a_row_of_ten_megabytes_is_told_as_cut(
    chat_tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    turns = [{"from": "human", "value": "hi " * 30}, {"from": "gpt", "value": "the sum " * 30}]
    rows = [*SHAREGPT, {"conversations": turns * 15_000}]
    data = build(chat_tokenizer, write_rows(rows), loss_on="assistant", max_length=64)
    assert data.report.num_truncated + data.report.num_dropped_empty == 1
    plain = [*QA, {"prompt": "q", "completion": "word " * 2_000_000}]
    report = build(chat_tokenizer, write_rows(plain), max_length=64).report
    assert "1 of 11 rows were cut" in report.warnings[0]
    assert "the longest has more than" in report.warnings[0]


def test_random_validation_split(tokenizer: Any, write_rows: Callable[..., Path]) -> None:
    """A pure function of its seed, over all sources; every row is on one side."""
    rows = {
        name: [{"prompt": f"{name}{n}?", "completion": str(n)} for n in range(10)] for name in "ab"
    }
    files = [write_rows(each, f"{name}.jsonl") for name, each in rows.items()]

    def split(**fields: Any) -> list[list[str]]:
        data = build(tokenizer, *files, **fields)
        assert data.validation is not None
        return [texts(data.train, tokenizer), texts(data.validation, tokenizer)]

    random: dict[str, Any] = {"validation_fraction": 0.25, "validation_split": "random"}
    train, held_out = split(**random)
    first, last = split(validation_fraction=0.05)
    everything = first + last
    assert len(held_out) == 5
    assert sorted(train + held_out) == sorted(everything)
    assert train == [text for text in everything if text in set(train)]
    assert split(**random) == [train, held_out]
    assert split(**random, validation_seed=1)[1] != held_out
    assert split(validation_fraction=0.25)[1] == everything[-5:]
    # The rows of each source are known, for its own validation loss.
    counts = build(tokenizer, *files, **random).validation_counts
    assert counts == {name: sum(name in text for text in held_out) for name in "ab"}
    assert min(counts.values()) > 0
    alone = build(tokenizer, *files, **random, need_validation=False)
    assert alone.validation_counts == {}
    assert len(alone.train) == 15
