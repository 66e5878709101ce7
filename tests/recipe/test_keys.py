"""Dotted keys are read and written alike, and a stray one is led to the right one."""

from __future__ import annotations

import pytest

from wegeft_cli.recipe.keys import format_key, parse_key
from wegeft_cli.recipe.schema_keys import find_nearest_key, kind_at


@pytest.mark.parametrize("key", ["seed", "a.b", "data.train[0].path", "a[0][12]", "adapter.peft.x"])
def test_key_is_written_as_it_was_read(key):
    assert format_key(parse_key(key)) == key


@pytest.mark.parametrize("key", ["", ".", "a.", ".a", "a[b]", "a[0", "[0]", "a b", "a..b"])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match="not a dotted key"):
        parse_key(key)


def test_kinds_are_found_through_sections_lists_and_maps():
    assert kind_at(("train", "learning_rate")) is float
    assert kind_at(("data", "train", 3, "path")) is str
    assert kind_at(("data", "train", 0, "columns", "prompt")) is str
    assert kind_at(("adapter", "groups", "early", 0)) is str
    assert kind_at(("data", "train", "path")) is None
    assert kind_at(("seed", "x")) is None
    assert kind_at(("nope",)) is None


@pytest.mark.parametrize(
    ("stray", "right"),
    [
        ("learning_rate", "train.learning_rate"),
        ("learning-rate", "train.learning_rate"),
        ("train.learnin_rate", "train.learning_rate"),
        ("train.max_length", "data.max_length"),
        ("modle", "model"),
        ("trian", "train"),
        ("data.trian", "data.train"),
        ("train.train", "data.train"),
        ("data.train[2].formt", "data.train[2].format"),
        ("data.validation[1].paht", "data.validation[1].path"),
        ("target_modules", "adapter.target_modules"),
        ("report_to", "logging.report_to"),
        ("eval.lr", "train.learning_rate"),
        ("completely_different", None),
    ],
)
def test_nearest_key(stray, right):
    assert find_nearest_key(parse_key(stray)) == right
