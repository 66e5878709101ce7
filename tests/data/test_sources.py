"""Sources: every kind of file yields its rows with their places, every damage one fault."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wegeft_cli.data.sources import files
from wegeft_cli.data.sources.loading import Rows, digest_source, load_rows, stream_rows
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.recipe.schema import DataSource

ROWS = [{"prompt": f"p{i}\u2028", "completion": f"c,\n{i}"} for i in range(4)]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / name
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if name.endswith(".json"):
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif name.endswith(".jsonl"):
        file.write_text(lines, encoding="utf-8")
    elif name.endswith(".gz"):
        file.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".csv"):
        cells = [[row["prompt"], row["completion"]] for row in rows]
        quoted = [",".join(f'"{cell}"' for cell in row) for row in cells]
        file.write_text("\n".join(["prompt,completion", *quoted]), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def load(path: Path | str, **fields: Any) -> Rows:
    return load_rows(DataSource(path=str(path), **fields), recipe_dir=None)


@pytest.mark.parametrize(
    ("name", "third"),
    [
        ("a.json", "a.json: row 3"),
        ("a.jsonl", "a.jsonl:3"),
        ("a.jsonl.gz", "a.jsonl.gz:3"),
        ("a.csv", "a.csv:6"),  # each row takes two lines, below the header
        ("a.parquet", "a.parquet: row 3"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, third: str) -> None:
    file = write(tmp_path, name, ROWS)
    rows = load(file)
    assert rows.rows == ROWS
    assert rows.place(2) == str(tmp_path / third)
    assert rows.origin == str(file)
    assert rows.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert load(file, limit=2).rows == ROWS[:2]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    rows = load(file)
    assert [row["text"] for row in rows.rows] == ["a", "b"]
    assert rows.place(1) == f"{file}:3"


def test_a_folder_gives_the_files_of_the_split_in_order(tmp_path: Path) -> None:
    write(tmp_path, "train-00001-of-00002.jsonl", ROWS[2:])
    write(tmp_path, "train-00000-of-00002.jsonl", ROWS[:2])
    write(tmp_path, "trainer.jsonl", ROWS[:1])
    write(tmp_path, "test.json", ROWS[:1])
    rows = load(tmp_path)
    assert rows.rows == ROWS
    assert rows.place(3) == f"{tmp_path / 'train-00001-of-00002.jsonl'}:2"
    assert load(tmp_path, limit=3).rows == ROWS[:3]
    assert load(tmp_path, split="test").rows == ROWS[:1]


def test_a_relative_path_is_tried_from_the_recipe_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    write(there, "a.json", ROWS)
    source = DataSource(path="a.json")
    assert load_rows(source, recipe_dir=there).origin == str(there / "a.json")
    write(here, "a.json", ROWS)
    assert load_rows(source, recipe_dir=there).origin == "a.json"


@pytest.mark.parametrize(
    ("name", "content", "message", "place"),
    [
        ("a.json", b'[{"a": 1},\n]', "comma before the closing", ":2:1"),
        ("a.json", b'[{"a": 1,\n }]', "comma before the closing", ":2:2"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "Extra data", ":2:1"),
        ("a.json", b'{"data": [{"a": 1}]}', "rows under 'data'", ""),
        ("a.json", b'"abc"', "list of rows is needed", ""),
        ("a.json", b"[1]", "1 is not an object", ": row 1"),
        ("a.json", b"[]", "there are no rows", ""),
        ("a.json", b"[" * 100_000, "not readable JSON", ":1"),
        ("a.json", b'[{"a":\n "\xff"}]', "byte 0xff is not UTF-8", ":2"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2,}\n', "comma before the closing", ":2:9"),
        ("a.jsonl", b'{"a": 1}\n\xe9', "byte 0xe9 is not UTF-8", ":2"),
        ("a.jsonl", b'{"a": 1}\n[2]', r"\[2\] is not an object", ":2"),
        ("a.jsonl", b"", "there are no rows", ""),
        ("a.jsonl.gz", b"not gzip", "not a whole gzip file", ""),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 50, mtime=0)[:-9], "not a whole gzip file", ""),
        ("a.csv", b"a,b\n1,2\n3\n", "1 cells where the header has 2", ":3"),
        ("a.csv", b"a,a\n1,2\n", "two columns of one name", ":1"),
        ("a.csv", b'a,b\n1,"2\n', "not CSV", ":2"),
        ("a.csv", b"", "there are no rows", ""),
        ("a.csv", b"a,b\n1,2\n3,\xe9\n", "byte 0xe9 is not UTF-8", ":3"),
        ("a.csv", b"a,\xe9\n1,2\n", "byte 0xe9 is not UTF-8", ":1"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "not readable JSON: Exceeds the limit", ":1"),
        ("a.parquet", b"PAR1 no", "not a whole Parquet file", ""),
        ("a.xlsx", b"x", "unknown kind of file", ""),
    ],
)
def test_damage_is_one_fault_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str, place: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(file)
    assert caught.value.file == f"{file}{place}"


def test_a_text_of_a_parquet_file_that_is_not_utf8_is_a_fault_of_its_row(tmp_path: Path) -> None:
    texts = [b"ab", b"c\xe9", b"d", b"\xff"]
    offsets = pa.array([0, *np.cumsum([len(text) for text in texts])], pa.int32())
    column = pa.StringArray.from_buffers(
        len(texts), offsets.buffers()[1], pa.py_buffer(b"".join(texts))
    )
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), file)
    with pytest.raises(ExceptionGroup) as caught:
        load(file)
    faults = [fault for fault in caught.value.exceptions if isinstance(fault, UserError)]
    assert [fault.file for fault in faults] == [f"{file}: row 2", f"{file}: row 4"]
    assert "byte 0xe9 is not UTF-8" in str(faults[0])
    assert load(file, limit=1).rows == [{"text": "ab"}]
    assert stream(file, 2, limit=3)[2] == (f"{file}: row 3", {"text": "d"})


def test_a_list_in_a_jsonl_file_is_told_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n")
    with pytest.raises(UserError, match="one JSON document over several lines") as caught:
        load(file)
    assert "name the file .json" in str(caught.value.hint)


def test_a_pretty_object_in_a_jsonl_file_is_one_fault(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(ROWS[0], indent=1))
    with pytest.raises(UserError, match="one JSON document over several lines") as caught:
        load(file)
    assert caught.value.file == f"{file}:1"


def test_rows_inside_of_an_object_are_named_by_their_field(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"version": "1", "data": ROWS, "more": {"rows": ROWS[:1]}}))
    with pytest.raises(UserError, match="rows under 'data'") as caught:
        load(file)
    assert "set field: data" in str(caught.value.hint)
    assert load_rows(DataSource(path=str(file), field="data"), recipe_dir=None).rows == ROWS
    nested = load_rows(DataSource(path=str(file), field="more.rows"), recipe_dir=None)
    assert nested.rows == ROWS[:1]
    with pytest.raises(UserError, match=r"no field 'date'; fields found: 'version', 'data'"):
        load_rows(DataSource(path=str(file), field="date"), recipe_dir=None)
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        other = DataSource(path=str(write(tmp_path, name, ROWS)), field="data")
        with pytest.raises(UserError, match="is for JSON files") as caught:
            load_rows(other, recipe_dir=None)
        assert caught.value.key == "field"


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_with_another_separator_is_named(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"prompt{mark}completion\na{mark}b\n")
    with pytest.raises(UserError, match="separated by") as caught:
        load(file)
    assert "commas" in str(caught.value.hint)


def test_hidden_files_are_not_data(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", ROWS)
    (tmp_path / "._train.jsonl").write_bytes(b"\0\5\26\7")
    assert load(tmp_path).rows == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.json", "a.parquet"])
def test_a_row_of_ten_megabytes_is_a_row(tmp_path: Path, name: str) -> None:
    long = [{"prompt": "p", "completion": "word " * 2_000_000}, *ROWS]
    assert load(write(tmp_path, name, long)).rows == long


@pytest.mark.parametrize(
    ("name", "message"), [("a.jsonl", "a line of more than 1 MiB"), ("a.csv", "field larger than")]
)
def test_a_line_without_end_is_refused_before_it_is_read(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 2**20)
    file = write(tmp_path, name, [*ROWS[:1], {"prompt": "p", "completion": "x" * 2**21}])
    with pytest.raises(UserError, match=message) as caught:
        load(file)
    assert str(caught.value.file).startswith(f"{file}:")
    csv.field_size_limit(2**17)


def test_a_handful_of_bad_lines_is_told_together(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{}\n" + "{bad\n" * 9)
    with pytest.raises(ExceptionGroup) as caught:
        load(file)
    assert [fault.file for fault in caught.value.exceptions] == [
        f"{file}:{line}:2" for line in range(2, 7)
    ]


def test_a_folder_without_the_split_tells_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, "test.json", ROWS)
    with pytest.raises(UserError, match=r"split 'train'; files found: test\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("rows.txt", "one", '{"text": "..."}'),
        ("rows.tsv", "a\tb", "write the rows as JSONL"),
        ("rows.jsonl", "{'prompt': 'a'}", "JSON has double quotes"),
        ("rows.jsonl", """{"prompt": "a", 'completion': "b"}""", "JSON has double quotes"),
        (
            "rows.json",
            '{"version": 1, "splits": {"train": [{"text": "a"}]}}',
            "field: splits.train",
        ),
    ],
)
def test_the_message_names_what_to_write(
    tmp_path: Path, name: str, content: str, hint: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        load(tmp_path / name)
    assert hint in (caught.value.hint or "")


def test_a_misspelled_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", ROWS)
    with pytest.raises(UserError, match="no such file or folder") as caught:
        load(tmp_path / "trian.jsonl")
    assert "did you mean train.jsonl?" in (caught.value.hint or "")
    with pytest.raises(UserError, match="no such file or folder") as caught:
        load(tmp_path / "other.jsonl")
    assert "did you mean" not in (caught.value.hint or "")


def test_a_split_of_two_kinds_is_not_guessed(tmp_path: Path) -> None:
    write(tmp_path, "train.json", ROWS)
    write(tmp_path, "train.csv", ROWS)
    with pytest.raises(UserError, match=r"more than once: train\.csv, train\.json"):
        load(tmp_path)


@pytest.mark.parametrize("path", ["nope.json", "data/rows.jsonl", "squad", "json", "", "a/b/c"])
def test_what_is_neither_here_nor_a_hub_id_tells_where_it_looked(path: str) -> None:
    with pytest.raises(UserError, match="no such file or folder") as caught:
        load(path)
    assert caught.value.key == "path"
    assert str(Path.cwd()) in (caught.value.hint or "")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real loader, which finds hub ids below a local folder."""
    folder = tmp_path / "hub"
    real = datasets.load_dataset

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        return real(str(folder / path), name, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return folder


def test_hub_rows_come_through_the_loader(hub: Path) -> None:
    (hub / "owner/name").mkdir(parents=True)
    write(hub / "owner/name", "train.json", ROWS)
    rows = load("owner/name", limit=3)
    assert rows.rows == ROWS[:3]
    assert (rows.origin, rows.sha256) == ("owner/name:train", None)
    assert rows.place(1) == "owner/name:train: row 2"
    with pytest.raises(UserError, match=r"cannot be loaded: .*dev") as caught:
        load("owner/name", split="dev")
    assert caught.value.file == "owner/name:dev"


def test_an_unreachable_hub_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub cannot be reached") as caught:
        load("owner/name")
    assert caught.value.key == "path"
    assert "HF_HUB_OFFLINE" in (caught.value.hint or "")


def stream(path: Path | str, skip: int = 0, **fields: Any) -> list[tuple[str, Any]]:
    return list(stream_rows(DataSource(path=str(path), **fields), recipe_dir=None, skip=skip))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
@pytest.mark.parametrize("skip", [0, 1, 3, 4])
def test_streamed_rows_are_the_loaded_ones(tmp_path: Path, name: str, skip: int) -> None:
    file = write(tmp_path, name, ROWS)
    rows = load(file)
    places = [rows.place(i) for i in range(4)]
    expected = [None] * skip + ROWS[skip:]
    assert stream(file, skip) == list(zip(places, expected, strict=True))
    assert stream(file, skip, limit=2) == list(zip(places[:2], expected[:2], strict=True))


def test_groups_of_a_parquet_file_that_are_skipped_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    rows = [{"text": f"{i}" * 1000} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=8, compression="none")
    damaged = bytearray(file.read_bytes())
    first = pq.ParquetFile(file).metadata.row_group(0).column(0)
    start = first.dictionary_page_offset or first.data_page_offset
    damaged[start : start + 40] = b"\xff" * 40
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="not a whole Parquet file"):
        stream(file)
    assert [row for _, row in stream(file, 8)] == [None] * 8 + rows[8:]
    assert [row for _, row in stream(file, 20)] == [None] * 20 + rows[20:]


def test_lines_that_are_skipped_are_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{bad\n\n{"text": "a"}\n[1]\n')
    assert stream(file, 1, limit=2) == [(f"{file}:1", None), (f"{file}:3", {"text": "a"})]
    for skip, place in ((0, "1:2"), (2, "4")):
        with pytest.raises(UserError) as caught:
            stream(file, skip)
        assert caught.value.file == f"{file}:{place}"


def test_shards_are_streamed_one_behind_the_other(tmp_path: Path) -> None:
    write(tmp_path, "train-00001-of-00002.jsonl", ROWS[2:])
    write(tmp_path, "train-00000-of-00002.jsonl", ROWS[:2])
    assert [row for _, row in stream(tmp_path, 3)] == [None] * 3 + ROWS[3:]


def test_a_json_list_is_not_streamed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be streamed") as caught:
        stream(write(tmp_path, "a.json", ROWS))
    assert "JSONL" in (caught.value.hint or "")


def test_the_digest_is_that_of_the_rows_that_would_be_loaded(tmp_path: Path) -> None:
    write(tmp_path, "train-00000-of-00002.jsonl", ROWS[:2])
    write(tmp_path, "train-00001-of-00002.jsonl", ROWS[2:])
    for path in (tmp_path, tmp_path / "train-00000-of-00002.jsonl"):
        source = DataSource(path=str(path))
        assert digest_source(source, recipe_dir=None) == load(path).sha256


def test_hub_rows_are_streamed_and_told_apart_by_version(hub: Path) -> None:
    (hub / "owner/name").mkdir(parents=True)
    file = write(hub / "owner/name", "train.jsonl", ROWS)
    source = DataSource(path="owner/name")
    first = digest_source(source, recipe_dir=None)
    assert first == digest_source(source, recipe_dir=None)
    assert stream("owner/name", 1) == [
        ("owner/name:train: row 1", None),
        *((f"owner/name:train: row {i + 1}", ROWS[i]) for i in range(1, 4)),
    ]
    write(hub / "owner/name", "train.jsonl", ROWS[:3])
    assert digest_source(source, recipe_dir=None) != first
    file.write_text('{"prompt": "p", "completion": "c"}\n{bad\n')
    with pytest.raises(MachineError, match="broke off at row"):
        stream("owner/name")
