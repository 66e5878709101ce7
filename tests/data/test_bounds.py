"""Files from elsewhere that would need endless time or memory are refused with the reason."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from wegeft_cli.data.sources import files, loading
from wegeft_cli.data.sources.loading import load_rows, stream_rows
from wegeft_cli.data.text import chat_renderer
from wegeft_cli.data.text.chat_template import build_template
from wegeft_cli.data.text.template_settings import TemplateSettings
from wegeft_cli.errors import UserError
from wegeft_cli.models.config_check import check_tokenizer
from wegeft_cli.models.loading import load_tokenizer
from wegeft_cli.recipe.schema import DataSource

MIB = 2**20


def read(path):
    return load_rows(DataSource(path=str(path)), recipe_dir=None)


def test_blank_lines_of_a_small_archive_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * (40 * MIB), 1))
    with pytest.raises(UserError, match="4 MiB of blank lines") as caught:
        read(path)
    assert caught.value.file.startswith(f"{path}:41943")
    with pytest.raises(UserError, match="blank lines"):
        next(stream_rows(DataSource(path=str(path)), recipe_dir=None))


def test_blank_lines_between_rows_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((b'{"text": "a"}' + b"\n" * (3 * MIB)) * 2)
    assert len(read(path).rows) == 2


def test_rows_that_outgrow_a_small_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_LEAST_BYTES", 2 * MIB)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 20_000))
    with pytest.raises(UserError, match="hold rows of more than 2 MiB") as caught:
        read(path)
    assert caught.value.file == str(path)
    assert "data.streaming" in caught.value.hint
    source = DataSource(path=str(path))
    assert sum(1 for _ in stream_rows(source, recipe_dir=None)) == 20_000
    assert len(load_rows(DataSource(path=str(path), limit=100), recipe_dir=None).rows) == 100
    monkeypatch.setenv(loading.EXPANSION_VARIABLE, "100000")
    assert len(read(path).rows) == 20_000
    monkeypatch.setenv(loading.EXPANSION_VARIABLE, "much")
    with pytest.raises(UserError, match="must be a number") as caught:
        read(path)
    assert caught.value.key == loading.EXPANSION_VARIABLE


def test_one_long_text_in_many_rows_is_refused_before_all_are_there(tmp_path, monkeypatch):
    """A dictionary stores it once."""
    monkeypatch.setattr(loading, "_LEAST_BYTES", 8 * MIB)
    monkeypatch.setattr(files, "_PARQUET_BATCH_BYTES", 8 * MIB)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["long " * (MIB // 5)] * 200}), path, compression="zstd")
    assert path.stat().st_size < MIB / 10
    tracemalloc.start()
    with pytest.raises(UserError, match="hold rows of more than"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 50 * MIB
    tracemalloc.stop()


def test_rows_of_usual_sizes_are_within_the_bound(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}] * 4} for i in range(2000)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert read(path).rows == rows
    assert files.MAX_ROW_BYTES == 64 * MIB


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("where", ["file", "tokenizer"])
def test_a_template_that_loops_is_interrupted(build_tokenizer, tmp_path, monkeypatch, where):
    monkeypatch.setattr(chat_renderer, "_RENDER_SECONDS", 0.3)
    text = ENDLESS + "{{ messages }}{% generation %}{% endgeneration %}"
    tokenizer, name = build_tokenizer(), "chat"
    if where == "file":
        name = str(tmp_path / "own.jinja")
        (tmp_path / "own.jinja").write_text(text)
    else:
        tokenizer.chat_template, tokenizer.name_or_path = text, "the/tokenizer"
    renderer = build_template(TemplateSettings(name), tokenizer, None).apply
    asked = [{"role": "user", "content": "question"}]
    calls = {renderer: (asked, True), renderer.find_marks: (asked,), renderer.tool_form: (None,)}
    for call, arguments in calls.items():
        with pytest.raises(UserError, match="takes more than") as caught:
            call(*arguments)
        assert caught.value.file == (name if where == "file" else "the/tokenizer")
        assert caught.value.key == "data.template"


def test_a_range_without_end_is_refused(build_tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for i in range(10 ** 9) %}{% endfor %}{{ messages }}"
    template = build_template(TemplateSettings("chat"), tokenizer, None)
    with pytest.raises(UserError, match="refuses the conversation: Range too big"):
        template.apply([{"role": "user", "content": "question"}], True)


@pytest.mark.parametrize("kind", ["normalizer", "pre_tokenizer"])
def test_a_tokenizer_that_never_ends_is_refused(build_tokenizer, tmp_path, llama_dir, kind):
    tokenizer = build_tokenizer()
    check_tokenizer(tokenizer, "base")
    expression = Regex("(x+x+)+y")
    if kind == "normalizer":
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(expression, "")
    else:
        split = pre_tokenizers.Split(expression, "isolated")
        own = tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, own])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((llama_dir / "config.json").read_text())
    with pytest.raises(UserError, match="backtracks without end") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.file == str(tmp_path / "tokenizer.json")
    assert "(x+x+)+y" in caught.value.message
