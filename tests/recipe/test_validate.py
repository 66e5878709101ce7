"""`validate` needs neither weights nor data, and tells of each input whether it is here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.planning.validate import validate_recipe


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


def test_inputs_that_are_here_are_found(write, tmp_path: Path, monkeypatch, llama_dir):
    config = (llama_dir / "config.json").read_text()
    model = write(config, "model/config.json").parent
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


def test_targets_are_checked_where_the_configuration_is_here(write, llama_dir):
    config = (llama_dir / "config.json").read_text()
    model = write(config, "model/config.json").parent
    path = write(f"model: {{name_or_path: {model}}}\ndata: {{train: [{{path: rows.json}}]}}\n")
    assert "trainable parameters" in validate_recipe(path).checked[-1]
    with pytest.raises(UserError) as caught:
        validate_recipe(path, ["adapter.target_modules=[q_proj, nosuch]"])
    assert caught.value.key == "adapter.target_modules"
    assert caught.value.file == "override `adapter.target_modules=[q_proj, nosuch]`"


def test_names_of_other_rooms_are_checked_with_their_place(write):
    path = write("eval:\n  tasks: [gsm8k, gsm8]\n  protocol: gifft\n", sound=True)
    with pytest.raises(ExceptionGroup) as caught:
        validate_recipe(path, ["data.template=alpacca"])
    assert [(fault.file, fault.key) for fault in caught.value.exceptions] == [
        ("override `data.template=alpacca`", "data.template"),
        (f"{path}:7:3", "eval.protocol"),
        (f"{path}:6:18", "eval.tasks[1]"),
    ]


def test_settings_of_optimizer_and_schedule_are_tried(write):
    names = "{optim: paged_adamw_8bit, lr_scheduler_type: warmup_stable_decay"
    bad = "optim_args: {bogus: 1}, lr_scheduler_kwargs: {min_lr: 1}}"
    path = write(f"train: {names}, {bad}\n", sound=True)
    with pytest.raises(ExceptionGroup) as caught:
        validate_recipe(path)
    told = {fault.key: fault for fault in caught.value.exceptions}
    assert set(told) == {"train.optim_args", "train.lr_scheduler_kwargs"}
    assert "does not know bogus" in told["train.optim_args"].message
    assert all(fault.file.startswith(f"{path}:") for fault in told.values())
    # Settings that are taken, though this machine has no GPU, and rows decide on the steps.
    good = "optim_args: {min_8bit_size: 50}, lr_scheduler_kwargs: {num_decay_steps: 5000}}"
    path = write(f"train: {names}, {good}\n", sound=True)
    assert any("schedule take" in x for x in validate_recipe(path).checked)
    assert validate_recipe(path, ["train.warmup_ratio=0.5"]).recipe == str(path)
    with pytest.raises(UserError, match="100 steps are too few"):
        validate_recipe(path, ["train.max_steps=100"])


def test_a_recipe_without_such_settings_needs_no_torch(write):
    code = "import sys; from wegeft_cli.planning.validate import validate_recipe as v; "
    code += "v(sys.argv[1]); sys.exit('torch' in sys.modules)"
    path = write("seed: 1\n", sound=True)
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0


def test_faults_of_the_recipe_come_through(write):
    with pytest.raises(UserError, match="unknown key"):
        validate_recipe(write("sede: 1\n", sound=True))
