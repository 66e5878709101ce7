"""Rows of one or two texts with a class or a number; a row without one is named."""

import json

import pytest

from wegeft_cli.data.labelled.texts import read_label, read_number, read_texts
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSource


def read(tmp_path, rows, *, is_regression=False, **source):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(file), **source)
    return read_texts(source, recipe_dir=None, is_regression=is_regression)


@pytest.mark.parametrize(
    ("row", "inputs"),
    [
        ({"sentence": "a", "label": 1}, ("a", None)),
        ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, ("a", "b")),
        ({"premise": "a", "hypothesis": "b", "label": 1}, ("a", "b")),
        ({"question": "a", "sentence": "b", "label": 1}, ("a", "b")),
        ({"question1": "a", "question2": "b", "label": 1}, ("a", "b")),
        ({"instruction": "a", "output": "it is b", "answer": 1}, ("a", None)),
    ],
)
def test_glue_and_its_kin_are_known_by_their_columns(tmp_path, row, inputs):
    rows = read(tmp_path, [row])
    assert (list(rows.inputs), list(rows.labels)) == ([inputs], ["1"])


def test_columns_rename_and_one_text_stays_one(tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "gold": "x"}
    rows = read(tmp_path, [row], columns={"text": "sentence2", "label": "gold"})
    assert (list(rows.inputs), list(rows.labels)) == ([("b", None)], ["x"])


def test_bad_rows_are_told_with_their_lines(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": 7, "label": 0}, {"text": "b", "label": None}]
    with pytest.raises(ExceptionGroup) as caught:
        read(tmp_path, rows)
    places = [fault.file.rpartition(":")[2] for fault in caught.value.exceptions]
    assert places == ["2", "3"]


def test_classes_as_they_come():
    assert [read_label(value) for value in (True, 3, 3.0, " x ")] == ["true", "3", "3", "x"]
    assert read_label(1, ["no", "yes"]) == "yes"
    for value in (None, "", 1.5, -1):
        with pytest.raises(UserError):
            read_label(value)
    with pytest.raises(UserError, match="none of the 2"):
        read_label(-1, ["no", "yes"])


def test_numbers_as_they_come():
    assert [read_number(value) for value in (2, "3.5", 4.0)] == [2.0, 3.5, 4.0]
    for value in (None, "x", True, float("nan")):
        with pytest.raises(UserError, match="is no number"):
            read_number(value)
