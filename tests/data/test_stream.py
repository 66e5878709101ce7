"""Stream: a data set's rows in a fixed order, from any place on, with few of them in memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from transformers import PreTrainedTokenizerFast

from wegeft_cli.data.sources import files
from wegeft_cli.data.text import streaming as stream
from wegeft_cli.data.text.dataset import build_datasets
from wegeft_cli.data.text.streaming import RowStream, open_stream
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSection, DataSource

WriteRows = Callable[..., Path]
SEED = 11


def numbered(first: int, count: int, name: str = "") -> list[dict[str, str]]:
    return [{"prompt": f"{name}{i}?", "completion": f" {i}"} for i in range(first, first + count)]


def section(*sources: Path | DataSource, **fields: Any) -> DataSection:
    train = [s if isinstance(s, DataSource) else DataSource(path=str(s)) for s in sources]
    return DataSection(train=train, streaming=True, **fields)


@pytest.fixture
def texts(tokenizer: PreTrainedTokenizerFast) -> Callable[..., list[str]]:
    """A function: the next rows of a stream as text, in steps of `size`."""

    def take(rows: RowStream, steps: int, size: int = 1) -> list[list[str]]:
        drawn = (rows.take(size) for _ in range(steps))
        return [[tokenizer.decode(ids.tolist()) for ids, _ in step] for step in drawn]

    return take


def test_unshuffled_rows_are_those_of_the_whole_data_set_pass_after_pass(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, texts: Callable[..., Any]
) -> None:
    rows = [*numbered(0, 5), {"prompt": "empty", "completion": ""}, *numbered(5, 300)]
    what = section(write_rows(rows), write_rows(numbered(900, 4), "b.jsonl"), shuffle=False)
    data = build_datasets(replace(what, streaming=False), tokenizer=tokenizer, recipe_dir=None)
    opened = open_stream(what, tokenizer, None, SEED)
    for _ in range(2):
        for index in range(len(data.train)):
            ids, mask = opened.take(1)[0]
            expected = data.train.row(index)
            assert ids.tolist() == expected[0].tolist()
            assert mask.tolist() == expected[1].tolist()
    assert opened.num_passes == 1
    assert opened.sources[0].encoded.num_empty == 2


def test_a_step_ends_with_its_pass(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, texts: Callable[..., Any]
) -> None:
    opened = open_stream(section(write_rows(numbered(0, 10))), tokenizer, None, SEED)
    assert [len(step) for step in texts(opened, 7, 4)] == [4, 4, 2, 4, 4, 2, 4]
    opened = open_stream(section(write_rows(numbered(0, 8))), tokenizer, None, SEED)
    assert [len(step) for step in texts(opened, 5, 4)] == [4] * 5


def test_blocks_are_shuffled_by_seed_and_pass(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, texts: Callable[..., Any]
) -> None:
    what = section(write_rows(numbered(0, 50)), shuffle_buffer_size=20)
    steps = texts(open_stream(what, tokenizer, None, SEED), 6, 20)
    plain = texts(open_stream(replace(what, shuffle=False), tokenizer, None, SEED), 3, 20)
    assert [len(step) for step in steps] == [20, 20, 10] * 2
    for number, step in enumerate(steps):
        assert sorted(step) == sorted(plain[number % 3])  # a block's rows stay in their block
        assert step != plain[number % 3]
    assert steps[:3] != steps[3:]
    assert steps[0] == texts(open_stream(what, tokenizer, None, SEED), 1, 20)[0]
    assert steps[0] != texts(open_stream(what, tokenizer, None, SEED + 1), 1, 20)[0]


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_goes_on_where_it_stood(
    tokenizer: PreTrainedTokenizerFast,
    write_rows: WriteRows,
    texts: Callable[..., Any],
    weights: tuple[float, ...] | None,
    shuffle: bool,
) -> None:
    blank = [{"prompt": "q", "completion": ""}]
    paths = [write_rows(numbered(0, 23) + blank), write_rows(blank + numbered(50, 9), "b.jsonl")]
    sources = [
        DataSource(path=str(path), weight=weights and weights[i]) for i, path in enumerate(paths)
    ]
    what = section(*sources, shuffle=shuffle, shuffle_buffer_size=7)
    opened = open_stream(what, tokenizer, None, SEED)
    states, steps = [], []
    for _ in range(25):
        states.append(json.loads(json.dumps(opened.state())))
        steps += texts(opened, 1, 4)
    assert opened.num_passes >= 2
    for number, state in enumerate(states):
        again = open_stream(what, tokenizer, None, SEED)
        texts(again, 2, 3)  # wherever it stood before
        again.seek(state)
        assert again.state() == state
        assert texts(again, 2, 4) == steps[number : number + 2] or number > 23


def test_rows_that_lie_behind_are_neither_parsed_nor_tokenised(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(numbered(0, 2000))
    what = section(file, shuffle_buffer_size=100)
    opened = open_stream(what, tokenizer, None, SEED)
    state = {"chains": [{"pass": 0, "row": 1650, "taken": 1650}]}
    lines = file.read_text().splitlines()
    lines[1:1600] = ["{bad"] * 1599
    file.write_text("\n".join(lines))
    texts_seen = 0
    each = stream.encode_each

    def counting(rendered: Iterator[Any], **options: Any) -> Iterator[Any]:
        nonlocal texts_seen
        for row in each(rendered, **options):
            texts_seen += 1
            yield row

    monkeypatch.setattr(stream, "encode_each", counting)
    opened.seek(state)
    assert len(opened.take(10)) == 10
    assert 10 <= texts_seen <= stream.CHUNK_ROWS
    opened.seek({"chains": [{"pass": 0, "row": 1550, "taken": 1550}]})
    with pytest.raises(UserError, match="not JSON"):
        opened.take(1)


def test_only_a_block_and_a_chunk_are_read_ahead(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = 0
    kind = files.KINDS[".jsonl"]

    def counting(
        file: BinaryIO, name: str, skip: int, list_field: str | None
    ) -> Iterator[files.RawRow]:
        nonlocal pulled
        for row in kind.read(file, name, skip, list_field):
            pulled += 1
            yield row

    monkeypatch.setitem(files.KINDS, ".jsonl", replace(kind, read=counting))
    size = 50
    opened = open_stream(
        section(write_rows(numbered(0, 5000)), shuffle_buffer_size=size), tokenizer, None, SEED
    )
    for step in range(1, 60):
        opened.take(20)
        assert 20 * step <= pulled <= 20 * step + stream.CHUNK_ROWS + size + 1


def test_memory_does_not_grow_with_the_data(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    # 12 MB of rows of 12 KB; a block and a chunk hold 276 of them, the data set a thousand.
    file = write_rows([{"text": f"{i} " + "word " * 2400} for i in range(1000)])
    limit = 6_000_000
    assert file.stat().st_size > 2 * limit
    what = section(file, shuffle_buffer_size=20, max_length=16)
    opened = open_stream(what, tokenizer, None, SEED)
    tracemalloc.start()
    for _ in range(120):
        opened.take(10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened.num_passes == 1
    assert peak < limit


def test_weighted_sources_are_drawn_by_their_shares(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, texts: Callable[..., Any]
) -> None:
    many = DataSource(path=str(write_rows(numbered(0, 100, "m"))), weight=1.5)
    few = DataSource(path=str(write_rows(numbered(0, 4, "f"), "few.jsonl")), weight=0.5)
    opened = open_stream(section(many, few, shuffle_buffer_size=10), tokenizer, None, SEED)
    steps = texts(opened, 50, 8)
    assert all(len(step) == 8 for step in steps)  # no pass ends for all of them
    assert [sum("f" in row for row in step) for step in steps] == [2] * 50
    drawn = [row for step in steps for row in step]
    large = [row for row in drawn if "m" in row]
    small = [row for row in drawn if "f" in row]
    assert len(set(large[:100])) == len(set(large[100:200])) == 100
    assert all(len(set(small[i : i + 4])) == 4 for i in range(0, 100, 4))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "not JSON"),
        ("[1]", "is not an object"),
        ('{"prompt": "q"}', "no `completion`"),
        ('{"prompt": "q", "completion": null}', "`completion` is null"),
        ('{"prompt": "q", "completion": true}', "must be text"),
    ],
)
def test_a_bad_row_is_told_with_its_place(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, line: str, message: str
) -> None:
    good = write_rows(numbered(0, 3), "good.jsonl")
    file = write_rows(numbered(0, 3))
    file.write_text(file.read_text() + line + "\n")
    opened = open_stream(section(good, file, shuffle=False), tokenizer, None, SEED)
    with pytest.raises(UserError, match=message) as caught:
        opened.take(100)
    assert str(caught.value.file).startswith(f"{file}:4")
    assert caught.value.key == "data.train[1]"
    with pytest.raises(UserError, match=message) as caught:
        build_datasets(section(good, file), tokenizer=tokenizer, recipe_dir=None)
    assert str(caught.value.file).startswith(f"{file}:4")
    assert caught.value.key == "data.train[1]"


def test_a_pass_without_anything_to_learn_ends_the_stream(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    file = write_rows([{"prompt": "q", "completion": " "}] * 600)
    opened = open_stream(section(file), tokenizer, None, SEED)
    with pytest.raises(UserError, match=r"learn: 600 with an empty .* \(one is .*:\d+\)") as caught:
        opened.take(1)
    assert (caught.value.file, caught.value.key) == (str(file), "data.train[0]")


def test_sources_that_cannot_be_streamed_are_told_together(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, tmp_path: Path
) -> None:
    array = tmp_path / "a.json"
    array.write_text("[{}]")
    empty = write_rows([], "empty.jsonl")
    odd = write_rows([{"question": "q"}], "odd.jsonl")
    good = write_rows(numbered(0, 3))
    with pytest.raises(ExceptionGroup) as caught:
        open_stream(section(array, empty, good, odd, "no.jsonl"), tokenizer, None, SEED)  # type: ignore[arg-type]
    told = [(fault.key, fault.message[:30]) for fault in caught.value.exceptions]
    assert [key for key, _ in told] == [
        "data.train[0]",
        "data.train[1]",
        "data.train[3].columns",
        "data.train[4].path",
    ]


def test_of_a_stream_the_first_rows_are_prepared(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    rows = [{"prompt": "q", "completion": "word " * 99}, *numbered(0, 3000)]
    validation = DataSource(path=str(write_rows(numbered(0, 4), "validation.jsonl")))
    what = section(write_rows(rows), validation=[validation], max_length=64)
    data = build_datasets(what, tokenizer=tokenizer, recipe_dir=None)
    assert len(data.train) == data.report.num_rows == 1001
    assert data.validation is not None
    assert len(data.validation) == data.report.num_validation_rows == 4
    assert data.report.streaming
    assert data.report.sources[0]["rows"] is None
    assert data.report.lengths["max"] == 64
    assert "1 of the first 1024 rows were cut" in data.report.warnings[0]
    assert data.mixture is None
