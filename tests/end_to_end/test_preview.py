"""What a preview shows is what `train` learns from: tokens, mask, rows left out, padding."""

import json

import numpy as np
import pytest

from wegeft_cli.data.text.dataset import build_datasets
from wegeft_cli.errors import UserError
from wegeft_cli.models.loading import load_tokenizer
from wegeft_cli.planning.preview import preview
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.tasks.support.histogram import count_lengths

TURNS = [
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Five: 五."},
]
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def learned_text(row):
    return "".join(token.text for token in row.tokens if token.learned)


def test_rows_are_those_that_are_trained_on(write_recipe):
    path = write_recipe()
    told = preview(path, num_rows=100)
    recipe = load_recipe(path).recipe
    tokenizer = load_tokenizer(recipe.model.name_or_path)
    data = build_datasets(recipe.data, tokenizer=tokenizer, recipe_dir=None)
    assert len(told.rows) == len(data.train) == 10
    for row in told.rows:
        ids, mask = data.train.row(row.number)
        assert [token.id for token in row.tokens] == ids.tolist()
        assert [token.learned for token in row.tokens] == mask.tolist()
    first = told.rows[0]
    assert first.place.endswith("tiny.jsonl:1")
    assert first.tokens[0].text == "<s>"
    assert first.tokens[0].special
    assert learned_text(first) == " ab 1</s>"
    assert "".join(token.text for token in first.tokens) == "<s>Q1: again ab 1</s>"
    assert told.num_tokens == data.report.num_tokens
    assert told.template_hash == data.report.template_hash


def test_a_conversation_shows_the_turns_that_are_learned(write_recipe, tmp_path):
    (tmp_path / "talk.jinja").write_text(CHAT_TEMPLATE)
    path = write_recipe(
        rows=[{"messages": TURNS}],
        data={
            "template": str(tmp_path / "talk.jinja"),
            "loss_on": "assistant",
            "max_length": 200,
        },
    )
    (row,) = preview(path).rows
    assert learned_text(row) == "Four.</s>Five: 五.</s>"
    whole = "".join(token.text for token in row.tokens)
    assert whole == "".join(f"[{turn['role']}]{turn['content']}</s>" for turn in TURNS)
    # One character of several tokens is said once.
    assert sum(token.text == "五" for token in row.tokens) == 1
    assert any(token.text == "" and token.learned for token in row.tokens)
    (last,) = preview(path, ["data.loss_on=completion"]).rows
    assert learned_text(last) == "Five: 五.</s>"


def test_rows_left_out_cut_and_joined_are_told(write_recipe):
    rows = [
        {"prompt": "A:", "completion": " "},
        {"prompt": "below " * 30, "completion": " end"},
        {"prompt": "B:", "completion": " correct" * 30},
        {"prompt": "the correct an", "completion": "swer is true"},
        {"prompt": "C:", "completion": " true"},
    ]
    told = preview(write_recipe(rows=rows), ["data.max_length=20"], num_rows=9)
    assert [row.fate for row in told.rows] == ["empty", "cut_away", "kept", "kept", "kept"]
    assert [row.number for row in told.rows] == [None, None, 0, 1, 2]
    assert [row.is_truncated for row in told.rows] == [False, False, True, False, False]
    assert [row.is_merged for row in told.rows] == [False, False, False, True, False]
    assert told.rows[0].tokens == []
    assert len(told.rows[2].tokens) == 20 < told.rows[2].num_tokens
    (joined,) = [token for token in told.rows[3].tokens if token.merged]
    assert joined.learned
    assert joined.text.strip() == "answer"
    (source,) = told.sources
    counts = {name: value for name, value in source.items() if name.startswith("num_")}
    assert counts == {
        "num_rows": 5, "num_truncated": 1, "num_empty": 1, "num_unmarked": 0, "num_cut_away": 1,
        "num_filtered": 0, "num_boundary_merged": 1,
    }  # fmt: skip
    assert told.num_rows == 3
    # Before the cut the row that lies behind it counts too; only the empty one is no row.
    whole = preview(write_recipe(rows=rows), ["data.max_length=200"])
    assert told.lengths["max"] == 20 < told.uncut_lengths["max"]
    assert told.uncut_lengths == whole.lengths == whole.uncut_lengths
    assert told.uncut_histogram == whole.histogram == whole.uncut_histogram
    assert sum(bar["rows"] for bar in told.uncut_histogram) == 4


def test_one_row_is_found_by_its_number_over_all_sources(write_recipe, tmp_path, unequal_rows):
    other = tmp_path / "other.jsonl"
    rows = [{"prompt": "A:", "completion": ""}, *unequal_rows[:3]]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_recipe()
    both = [f"data.train=[{{path: {other}}}, {{path: {tmp_path / 'tiny.jsonl'}}}]"]
    shown = preview(path, both, num_rows=2).rows
    assert [(row.place.rpartition("/")[2], row.number) for row in shown] == [
        ("other.jsonl:1", None), ("other.jsonl:2", 0), ("tiny.jsonl:1", 3), ("tiny.jsonl:2", 4),
    ]  # fmt: skip
    (row,) = preview(path, both, row=4).rows
    assert row == shown[3]
    (row,) = preview(path, both, row=12).rows
    assert row.place.endswith("tiny.jsonl:10")
    with pytest.raises(UserError, match="no row 13: the training set has 13 rows"):
        preview(path, both, row=13)
    assert preview(path, both, num_rows=0).rows == []


def test_padding_is_that_of_the_planned_batches(write_recipe):
    path = write_recipe()
    assert {each["padding_share"] for each in preview(path).waste.values()} == {0}
    path = write_recipe(model={"attn_implementation": "eager"})
    told = preview(path)
    assert told.setting == "none"
    assert list(told.waste) == ["none", "group_by_length", "packing"]
    assert told.waste["packing"]["packed_sequences"] < 10
    assert 0 < told.waste["none"]["padding_share"] < 1
    packed = preview(path, ["data.packing=bfd"])
    assert packed.setting == "packing"
    assert packed.waste == told.waste
    grouped = preview(path, ["train.group_by_length=true"])
    assert grouped.setting == "group_by_length"


def test_a_stream_shows_its_first_rows(write_recipe):
    told = preview(write_recipe(), ["data.streaming=true", "train.max_steps=3"], num_rows=3)
    assert [row.place.rpartition(":")[2] for row in told.rows] == ["1", "2", "3"]
    assert list(told.waste) == ["none"]


def test_bars_hold_every_row_once():
    draw = np.random.default_rng(0)
    cases = [draw.integers(low, high, 200) for low, high in [(1, 3), (5, 90), (300, 2048), (7, 8)]]
    assert len(cases) == 4
    for lengths in cases:
        bars = count_lengths(lengths)
        assert sum(bar["rows"] for bar in bars) == 200
        assert bars[0]["start"] <= lengths.min()
        assert bars[-1]["start"] <= lengths.max() < bars[-1]["stop"]
        assert len(bars) <= 13
        widths = {bar["stop"] - bar["start"] for bar in bars}
        assert len(widths) == 1


def test_it_reads_no_weights_and_leaves_nothing(write_recipe, build_llama_dir, tmp_path):
    folder = build_llama_dir(weights=False)
    cache = tmp_path / "cache"
    path = write_recipe(model={"name_or_path": str(folder)}, data={"cache_dir": str(cache)})
    before = sorted(tmp_path.iterdir())
    assert preview(path).num_rows == 10
    assert sorted(tmp_path.iterdir()) == before


def test_slow_tokenizers_show_their_pieces(write_recipe, monkeypatch):
    from wegeft_cli.data.text.chat_rendering import RenderedText, Segment
    from wegeft_cli.data.text.encode import EncodedRow
    from wegeft_cli.tasks.support.row_viewer import RowSplitter

    tokenizer = load_tokenizer(load_recipe(write_recipe()).recipe.model.name_or_path)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    ids = tokenizer("Q: true")["input_ids"]
    rendered = RenderedText((Segment("Q: true", True),))
    row = EncodedRow("kept", ids, b"\1" * len(ids), len(ids))
    pieces = RowSplitter(tokenizer).split(row, rendered)
    assert "".join(piece.text for piece in pieces) == "<s>Q: true"
    assert [piece.special for piece in pieces][:2] == [True, False]
