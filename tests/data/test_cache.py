"""Cache: the same rows as without it, of nothing but equal ingredients, and whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import AddedToken, normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from wegeft_cli.data.text import cache
from wegeft_cli.data.text import chat_template as chat
from wegeft_cli.data.text import encoded_source as parts
from wegeft_cli.data.text.dataset import PreparedData, build_datasets
from wegeft_cli.data.text.encode import EncodedDataset
from wegeft_cli.data.text.template_settings import TemplateSettings
from wegeft_cli.recipe.schema import DataSection, DataSource
from wegeft_cli.storage.atomic import hold_folder

WriteRows = Callable[..., Path]
ROWS = [{"prompt": f"{i} + 1?", "completion": f" {i + 1}", "other": f" o{i}"} for i in range(8)]
TALK = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"sum {i}"}]}
    for i in range(4)
]
FILES = ["entry.json", "ids.npy", "label_mask.npy", "offsets.npy"]


def prepare(section: DataSection, tokenizer: Any, recipe_dir: Path | None = None) -> PreparedData:
    return build_datasets(section, tokenizer=tokenizer, recipe_dir=recipe_dir)


def same(one: PreparedData, two: PreparedData) -> bool:
    names = ("ids", "label_mask", "offsets")
    arrays = [(getattr(one.train, name), getattr(two.train, name)) for name in names]
    return all(a.dtype == b.dtype and a.tolist() == b.tolist() for a, b in arrays)


@pytest.fixture
def section(write_rows: WriteRows, tmp_path: Path) -> DataSection:
    source = DataSource(path=str(write_rows(ROWS)))
    return DataSection(train=[source], cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def talk_section(write_rows: WriteRows, tmp_path: Path) -> DataSection:
    source = DataSource(path=str(write_rows(TALK, "talk.jsonl")))
    return DataSection(train=[source], cache_dir=str(tmp_path / "cache"))


def entries(section: DataSection) -> list[Path]:
    return sorted(Path(str(section.cache_dir)).iterdir())


def test_a_second_run_takes_the_same_rows_from_the_cache(
    tokenizer: PreTrainedTokenizerFast, section: DataSection, write_rows: WriteRows
) -> None:
    bad = [{"prompt": "q", "completion": ""}, {"prompt": "q", "completion": "long " * 99}]
    other = DataSource(path=str(write_rows(ROWS[:3] + bad, "other.jsonl")))
    section = replace(section, train=[*section.train, other], validation=[other], max_length=32)
    plain = prepare(replace(section, cache_dir=None), tokenizer)
    first = prepare(section, tokenizer)
    second = prepare(section, tokenizer)
    assert [each.report.num_from_cache for each in (plain, first, second)] == [0, 0, 3]
    assert same(plain, first)
    assert same(first, second)
    assert plain.validation is not None
    assert second.validation is not None
    assert plain.validation.ids.tolist() == second.validation.ids.tolist()
    assert second.report.warnings == plain.report.warnings != []
    assert replace(second.report, num_from_cache=0) == plain.report
    # The group is an ingredient: a corpus gives other rows for validation.
    assert len(entries(section)) == 3
    assert all(sorted(file.name for file in entry.iterdir()) == FILES for entry in entries(section))


def test_rows_of_one_source_stay_in_their_files(
    tokenizer: PreTrainedTokenizerFast, section: DataSection
) -> None:
    prepare(section, tokenizer)
    train = prepare(section, tokenizer).train
    assert all(isinstance(array, np.memmap) for array in (train.ids, train.label_mask))


SECTION_CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("limit", {}, {"limit": 5}),
    ("columns", {}, {"columns": {"completion": "other"}}),
    ("format", {}, {"format": "text", "columns": {"text": "other"}}),
    ("template", {"template": "question_answer"}, {}),
    ("loss_on", {"loss_on": "all"}, {}),
    ("max_length", {"max_length": 7}, {}),
]


@pytest.mark.parametrize(
    ("changes", "of_source"),
    [case[1:] for case in SECTION_CHANGES],
    ids=[case[0] for case in SECTION_CHANGES],
)
def test_every_key_of_the_recipe_that_shows_in_the_rows_is_an_ingredient(
    tokenizer: PreTrainedTokenizerFast,
    section: DataSection,
    changes: dict[str, Any],
    of_source: dict[str, Any],
) -> None:
    before = prepare(section, tokenizer)
    changed = replace(section, **changes, train=[replace(section.train[0], **of_source)])
    after = prepare(changed, tokenizer)
    assert after.report.num_from_cache == 0
    assert not same(before, after)
    assert same(after, prepare(replace(changed, cache_dir=None), tokenizer))
    assert prepare(changed, tokenizer).report.num_from_cache == 1
    assert prepare(section, tokenizer).report.num_from_cache == 1


def test_the_bytes_of_the_data_are_an_ingredient_and_their_name_is_not(
    tokenizer: PreTrainedTokenizerFast, section: DataSection, write_rows: WriteRows, tmp_path: Path
) -> None:
    prepare(section, tokenizer)
    moved = tmp_path / "moved.jsonl"
    file = Path(section.train[0].path)
    shutil.copy(file, moved)
    hit = prepare(replace(section, train=[DataSource(path=str(moved))]), tokenizer)
    assert hit.report.num_from_cache == 1
    assert hit.report.sources[0]["path"] == str(moved)
    file.write_text(file.read_text().replace("7 + 1", "7 * 1"))
    changed = prepare(section, tokenizer)
    assert changed.report.num_from_cache == 0
    assert "7 * 1" in tokenizer.decode(changed.train.row(7)[0].tolist())


def test_the_kind_of_file_is_an_ingredient(
    tokenizer: PreTrainedTokenizerFast, section: DataSection, tmp_path: Path
) -> None:
    for name in ("a.csv", "a.jsonl"):
        # One line of JSON, or a header without rows.
        file = tmp_path / name
        file.write_text('{"text":"a"}\n{"text":"b"}\n')
        source = DataSource(path=str(file), format="text", columns={"text": '{"text":"a"}'})
        if name == "a.jsonl":
            source = DataSource(path=str(file), format="text")
        data = prepare(replace(section, train=[source]), tokenizer)
        assert data.report.num_from_cache == 0


def _with_added_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken(" + 1")])


def _with_lower_case(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("+", "plus")


def _with_other_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = "<|im_end|>"


def _with_split_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.split_special_tokens = True


@pytest.mark.parametrize(
    "change", [_with_added_token, _with_lower_case, _with_other_eos, _with_split_special_tokens]
)
def test_the_tokenizer_is_an_ingredient(
    chat_tokenizer: PreTrainedTokenizerFast,
    section: DataSection,
    change: Callable[[PreTrainedTokenizerFast], None],
) -> None:
    prepare(section, chat_tokenizer)
    assert prepare(section, chat_tokenizer).report.num_from_cache == 1
    change(chat_tokenizer)
    assert prepare(section, chat_tokenizer).report.num_from_cache == 0


def test_how_the_tokenizer_was_used_last_is_no_ingredient(
    chat_tokenizer: PreTrainedTokenizerFast, section: DataSection
) -> None:
    prepare(section, chat_tokenizer)
    chat_tokenizer("a", padding="max_length", truncation=True, max_length=4)
    assert prepare(section, chat_tokenizer).report.num_from_cache == 1


def test_the_text_of_a_chat_template_and_its_special_tokens_are_ingredients(
    chat_tokenizer: PreTrainedTokenizerFast, talk_section: DataSection, tmp_path: Path
) -> None:
    prepare(talk_section, chat_tokenizer)
    assert prepare(talk_section, chat_tokenizer).report.num_from_cache == 1
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("<|im_end|>", "</s>")
    assert prepare(talk_section, chat_tokenizer).report.num_from_cache == 0
    chat_tokenizer.pad_token = "<s>"
    assert prepare(talk_section, chat_tokenizer).report.num_from_cache == 0
    own = tmp_path / "own.jinja"
    own.write_text(chat_tokenizer.chat_template)
    named = replace(talk_section, template=str(own))
    prepare(named, chat_tokenizer)
    assert prepare(named, chat_tokenizer).report.num_from_cache == 1
    own.write_text(chat_tokenizer.chat_template + "\n")
    assert prepare(named, chat_tokenizer).report.num_from_cache == 0


def test_every_named_chat_template_is_an_ingredient(
    chat_tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, talk_section: DataSection
) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    file = write_rows([{**row, "tools": tools} for row in TALK], "tools.jsonl")
    section = replace(talk_section, train=[DataSource(path=str(file))])
    plain = chat_tokenizer.chat_template
    digests = set()
    for mark in ("<A>", "<B>"):
        chat_tokenizer.chat_template = {"default": plain, "tool_use": mark + plain}
        digests.add(chat.build_template(TemplateSettings("chat"), chat_tokenizer, None).digest)
        data = prepare(section, chat_tokenizer)
        assert data.report.num_from_cache == 0
        assert chat_tokenizer.decode(data.train.row(0)[0].tolist()).startswith(mark)
        assert prepare(section, chat_tokenizer).report.num_from_cache == 1
    assert len(digests) == 2
    dated = "{{ strftime_now('%Y') }}" + plain
    chat_tokenizer.chat_template = {"default": plain, "tool_use": dated}
    assert chat.build_template(TemplateSettings("chat"), chat_tokenizer, None).writes_date


def test_a_template_that_writes_the_day_is_not_kept_for_the_next_one(
    chat_tokenizer: PreTrainedTokenizerFast,
    talk_section: DataSection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat_tokenizer.chat_template = (
        "{{ strftime_now('%Y') }}\n" + chat_tokenizer.chat_template.replace("\n", "")
    )
    assert chat.build_template(TemplateSettings("chat"), chat_tokenizer, None).writes_date
    data = prepare(talk_section, chat_tokenizer)
    assert "writes today's date" in data.report.warnings[0]
    again = prepare(talk_section, chat_tokenizer).report
    assert (again.num_from_cache, again.warnings) == (1, data.report.warnings)

    class Tomorrow(cache.date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2999, 1, 1)

    monkeypatch.setattr(cache, "date", Tomorrow)
    assert prepare(talk_section, chat_tokenizer).report.num_from_cache == 0


def test_the_code_and_the_libraries_are_ingredients(
    tokenizer: PreTrainedTokenizerFast,
    section: DataSection,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    prepare(section, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "digest_code", lambda folder: "another version")
        assert prepare(section, tokenizer).report.num_from_cache == 0
    with monkeypatch.context() as patch:
        patch.setattr(cache.metadata, "version", lambda name: "0.0")
        assert prepare(section, tokenizer).report.num_from_cache == 0
    assert prepare(section, tokenizer).report.num_from_cache == 1
    code = tmp_path / "code"
    shutil.copytree(Path(cache.__file__).parents[1], code)
    digest = cache.digest_code(code)
    assert digest == cache.digest_code(Path(cache.__file__).parents[1])
    other = shutil.copytree(code, tmp_path / "other")
    turns = other / "text" / "chat_rendering.py"
    turns.write_text(turns.read_text() + "\n")
    assert cache.digest_code(other) != digest


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["a byte", "half", "gone"])
def test_a_damaged_entry_is_told_and_built_anew(
    tokenizer: PreTrainedTokenizerFast, section: DataSection, name: str, damage: str
) -> None:
    plain = prepare(section, tokenizer)
    file = entries(section)[0] / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "a byte" else content[: len(content) // 2])
    mended = prepare(section, tokenizer)
    assert mended.report.num_from_cache == 0
    assert "are damaged and are built anew" in mended.report.warnings[0]
    assert same(plain, mended)
    again = prepare(section, tokenizer)
    assert (again.report.num_from_cache, again.report.warnings) == (1, [])
    assert same(plain, again)
    assert len(entries(section)) == 1


def test_an_unfinished_entry_is_none(
    tokenizer: PreTrainedTokenizerFast, section: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(section, tokenizer)
    assert entries(section) == []
    assert prepare(section, tokenizer).report.num_from_cache == 0


def test_what_killed_processes_left_is_removed_and_what_is_written_is_not(tmp_path: Path) -> None:
    dataset = EncodedDataset(np.ones(3, np.int32), np.ones(3, np.bool_), np.array([0, 3]))
    dead = [tmp_path / ".tmp-one-a", tmp_path / ".trash-two-b"]
    alive = tmp_path / ".tmp-three-c"
    for folder in (*dead, alive):
        folder.mkdir()
        (folder / "ids.npy").write_bytes(b"x")
    holder = os.open(alive, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    cache.write_entry(tmp_path, "one", dataset, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-three-c", "one"]
    assert (alive / "ids.npy").exists()
    os.close(holder)
    cache.write_entry(tmp_path, "two", dataset, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_writers_wait_for_each_other_and_keep_the_first_entry(tmp_path: Path) -> None:
    first = EncodedDataset(np.ones(3, np.int32), np.ones(3, np.bool_), np.array([0, 3]))
    second = EncodedDataset(np.zeros(3, np.int32), np.ones(3, np.bool_), np.array([0, 3]))
    with hold_folder(tmp_path):
        writer = threading.Thread(target=cache.write_entry, args=(tmp_path, "one", first, {}))
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
        assert list(tmp_path.iterdir()) == []
    writer.join()
    cache.write_entry(tmp_path, "one", second, {})
    entry = cache.read_entry(tmp_path, "one")
    assert entry is not None
    assert entry.dataset.ids.tolist() == [1, 1, 1]


def test_a_file_system_without_locks_keeps_entries_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = EncodedDataset(np.ones(3, np.int32), np.ones(3, np.bool_), np.array([0, 3]))

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".tmp-two-a").mkdir()
    cache.write_entry(tmp_path, "one", dataset, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-two-a", "one"]


def test_a_cache_that_cannot_be_written_stops_nothing(
    tokenizer: PreTrainedTokenizerFast, section: DataSection
) -> None:
    Path(str(section.cache_dir)).write_text("a file")
    report = prepare(section, tokenizer).report
    assert report.num_rows == 8
    assert "not kept in data.cache_dir: " in report.warnings[0]


def test_what_cannot_be_told_apart_is_not_kept(
    section: DataSection, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = prepare(section, ByT5Tokenizer()).report
    assert "not kept in data.cache_dir: the tokenizer is no fast one" in report.warnings[0]

    table = datasets.Dataset.from_list(ROWS)
    table._fingerprint = None
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **options: table)
    hub = replace(section, train=[DataSource(path="owner/name")])
    report = prepare(hub, tokenizer).report
    assert "the hub names no version of it" in report.warnings[0]
    assert not Path(str(section.cache_dir)).exists()
    for version in ("one", "two"):
        table._fingerprint = version
        assert [prepare(hub, tokenizer).report.num_from_cache for _ in range(2)] == [0, 1]


def test_several_may_write_and_read_at_once(tmp_path: Path) -> None:
    arrays = [np.full(50_000, 7, np.int32), np.ones(50_000, np.bool_), np.array([0, 50_000])]
    dataset = EncodedDataset(*arrays)

    def write_often(number: int) -> None:
        for step in range(20):
            cache.write_entry(tmp_path, f"key {step}", dataset, {"by": number})

    def read_often() -> int:
        num_read = 0
        while num_read < 20:
            entry = cache.read_entry(tmp_path, f"key {num_read}")
            if entry is not None:
                assert (entry.dataset.ids == 7).all()
                num_read += 1
        return num_read

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write_often, number) for number in range(3)]
        assert pool.submit(read_often).result(timeout=60) == 20
        assert [writer.result() for writer in writers] == [None] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"key {step}" for step in range(20)
    )


def test_a_file_that_changes_under_the_reader_is_kept_as_what_was_read(
    tokenizer: PreTrainedTokenizerFast, section: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(section.train[0].path)
    old = file.read_text()
    real = parts.load_rows

    def load_rows(source: DataSource, *, recipe_dir: Path | None) -> Any:
        file.write_text(old.replace("7 + 1", "7 * 1"))
        return real(source, recipe_dir=recipe_dir)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "load_rows", load_rows)
        prepare(section, tokenizer)
    hit = prepare(section, tokenizer)
    assert hit.report.num_from_cache == 1
    file.write_text(old)
    miss = prepare(section, tokenizer)
    assert miss.report.num_from_cache == 0
    assert not same(hit, miss)
