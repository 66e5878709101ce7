"""`validate` needs neither weights nor data, and tells of each input whether it is here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.workflows.validate import validate_recipe


def test_missing_inputs_are_no_fault(write):
    report = validate_recipe(write("sequence_len: 64\n", sound=True))
    assert report.notes == ("`sequence_len` is read as `data.max_length`",)
    assert [(item.key, item.found) for item in report.inputs] == [
        ("model.name_or_path", False),
        ("data.train[0].path", False),
    ]
    assert "hub" in report.inputs[0].note
    assert "hub" not in report.inputs[1].note
    values = json.loads(json.dumps(report.to_json()))
    assert values["valid"] is True
    assert values["inputs"][0]["path"] == "some/model"


def test_inputs_that_are_here_are_found(write, tmp_path: Path, monkeypatch):
    model = write("{}", "model/config.json").parent
    write("[]", "rows.json")  # beside the recipe
    monkeypatch.chdir(write("[]", "elsewhere/other.json").parent)
    (tmp_path / "tests" / "gsm8k").mkdir(parents=True)
    path = write(
        f"model: {{name_or_path: {model}}}\n"
        "data: {train: [{path: rows.json}], validation: [{path: other.json}]}\n"
        f"eval: {{tasks: [gsm8k, svamp], data_dir: {tmp_path / 'tests'}}}\n"
    )
    found = {(item.key, item.path): item.found for item in validate_recipe(path).inputs}
    assert found == {
        ("model.name_or_path", str(model)): True,
        ("data.train[0].path", "rows.json"): True,
        ("data.validation[0].path", "other.json"): True,
        ("eval.data_dir", str(tmp_path / "tests" / "gsm8k")): True,
        ("eval.data_dir", str(tmp_path / "tests" / "SVAMP")): False,
    }
    (model / "config.json").unlink()
    assert validate_recipe(path).inputs[0].note == "a folder without config.json"


def test_names_of_other_rooms_are_checked_with_their_place(write):
    path = write("eval:\n  tasks: [gsm8k, gsm8]\n  protocol: gifft\n", sound=True)
    with pytest.raises(ExceptionGroup) as caught:
        validate_recipe(path, ["data.template=alpacca"])
    assert [(fault.file, fault.key) for fault in caught.value.exceptions] == [
        ("override `data.template=alpacca`", "data.template"),
        (f"{path}:7:3", "eval.protocol"),
        (f"{path}:6:18", "eval.tasks[1]"),
    ]


def test_faults_of_the_recipe_come_through(write):
    with pytest.raises(UserError, match="unknown key"):
        validate_recipe(write("sede: 1\n", sound=True))
