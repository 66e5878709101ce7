"""The preview of a classifier's rows is what training reads: classes, lengths, sizes."""

from __future__ import annotations

import json

import pytest
from classifiers import write_bert, write_images, write_recipe, write_texts, write_vit
from typer.testing import CliRunner

from wegeft_cli.cli.app import app
from wegeft_cli.errors import UserError
from wegeft_cli.models.loading import load_tokenizer
from wegeft_cli.planning.preview import preview
from wegeft_cli.runs.train import train


@pytest.fixture
def image_recipe(tmp_path):
    images = write_images(
        tmp_path / "images", {"train": {"9": 3, "10": 5, "11": 2}, "validation": {"10": 1}}
    )
    data = {part: [{"path": str(images), "split": part}] for part in ("train", "validation")}
    return write_recipe(
        tmp_path,
        model={"name_or_path": str(write_vit(tmp_path / "vit"))},
        data={**data, "image_transform": "resize"},
    )


@pytest.fixture
def text_recipe(tmp_path, build_tokenizer):
    rows = [
        {"text": "a [b] one", "label": "yes"},
        {"text": "two " * 40, "label": "no"},
        {"text": "three", "label": "yes"},
    ]
    path = write_texts(tmp_path / "rows.jsonl", rows)
    return write_recipe(
        tmp_path,
        task="sequence_classification",
        model={"name_or_path": str(write_bert(tmp_path / "bert", build_tokenizer(pad="<pad>")))},
        adapter={"target_modules": ["query"]},
        data={"train": [{"path": str(path)}], "max_length": 16},
    )


def test_classes_are_counted_as_training_numbers_them(image_recipe):
    told = preview(image_recipe, num_rows=1)
    assert told.classes == [
        {"label": "9", "train": 3, "validation": 0, "test": 0},
        {"label": "10", "train": 5, "validation": 1, "test": 0},
        {"label": "11", "train": 2, "validation": 0, "test": 0},
    ]
    assert sorted(row["label"] for row in told.rows) == ["10", "11", "9"]
    assert {(tuple(row["size"]), row["mode"]) for row in told.rows} == {((8, 8), "L")}
    assert told.sizes == [{"size": [8, 8], "images": 10}]
    assert (told.edge, told.image_transform, told.lengths["max"]) == (8, "resize", 4)
    run = json.loads((train(image_recipe, ["train.max_steps=1"]).run_dir / "run.json").read_text())
    assert run["data"]["labels"] == [each["label"] for each in told.classes]
    assert run["data"]["rows_per_class"] == [each["train"] for each in told.classes]


def test_texts_are_shown_as_the_model_reads_them(text_recipe):
    told = preview(text_recipe)
    assert [row["label"] for row in told.rows] == ["yes", "no", "yes"]
    assert told.num_truncated == 1
    assert told.lengths["max"] == told.rows[1]["length"] == 16
    tokenizer = load_tokenizer(str(text_recipe.parent / "bert"))
    assert told.rows[2]["read"] == tokenizer.decode(tokenizer("three")["input_ids"])
    assert sum(bar["rows"] for bar in told.histogram) == 3
    assert [row["number"] for row in preview(text_recipe, row=2).rows] == [2]
    with pytest.raises(UserError, match="the training set has 3 rows"):
        preview(text_recipe, row=3)


def test_a_regression_tells_its_values(text_recipe, tmp_path):
    rows = [{"text": "a", "label": value} for value in (0.5, 4.0, 1.0)]
    path = write_texts(tmp_path / "numbers.jsonl", rows)
    options = [f"data.train[0].path={path}", "data.problem_type=regression"]
    told = preview(text_recipe, options)
    assert told.values == {"min": 0.5, "median": 1.0, "max": 4.0}
    assert (told.classes, [row["label"] for row in told.rows]) == ([], [0.5, 4.0])


def test_an_image_that_cannot_be_read_is_told(image_recipe, tmp_path):
    (tmp_path / "images" / "train" / "9" / "01.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no image that can be read"):
        preview(image_recipe)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_the_terminal_shows_all_in_80_columns(request, monkeypatch, kind):
    monkeypatch.setenv("COLUMNS", "80")
    name = "image_recipe" if kind == "images" else "text_recipe"
    result = CliRunner().invoke(app, ["preview", str(request.getfixturevalue(name))])
    assert result.exit_code == 0, result.output
    assert "training rows" in result.stdout
    if kind == "images":
        assert "50.0% of the rows" in " ".join(result.stdout.split())
        assert "the model sees 8 x 8 pixels" in result.stdout
    else:
        assert "a [b] one" in result.stdout  # no markup of rich
        assert "data.max_length is 16" in " ".join(result.stdout.split())
