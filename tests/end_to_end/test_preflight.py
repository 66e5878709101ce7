"""`plan`, `train --dry-run` and `validate` look at a recipe with the same checks."""

import json

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.planning.plan import plan
from wegeft_cli.planning.validate import validate_recipe
from wegeft_cli.runs.train import train


@pytest.fixture(autouse=True)
def steady_process(monkeypatch):
    """This process grows between two estimates."""
    monkeypatch.setattr("wegeft_cli.planning.memory._measure_resident", lambda: 2.0**29)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.validation_fraction=0.3"],
        ["data.validation_fraction=0.3", "train.per_device_eval_batch_size=64"],
        [],
    ],
    ids=str,
)
def test_plan_and_dry_run_estimate_the_same_memory(write_recipe, overrides):
    recipe = write_recipe(
        train={"per_device_train_batch_size": 1}, model={"attn_implementation": "eager"}
    )
    planned = plan(recipe, overrides)
    checked = train(recipe, overrides, dry_run=True)
    assert checked.estimated_memory_gib == planned.memory_gib["total"]
    assert (checked.num_steps, checked.trainable_parameters) == (
        planned.num_steps,
        planned.trainable_parameters,
    )
    assert (planned.memory_gib["validation"] > 0) == bool(overrides)


def test_validation_rows_that_train_refuses_are_refused_by_plan(write_recipe, tmp_path):
    rows = tmp_path / "nothing.jsonl"
    rows.write_text(json.dumps({"instruction": "Say.", "output": ""}) + "\n")
    recipe = write_recipe(data={"validation": [{"path": str(rows)}]})
    errors = []
    for check in (lambda: plan(recipe), lambda: train(recipe, dry_run=True)):
        with pytest.raises(UserError, match="nothing") as caught:
            check()
        errors.append((caught.value.message, caught.value.key))
    assert errors[0] == errors[1]


def test_validate_lists_the_test_files_of_a_classifier(tmp_path):
    from classifiers import write_recipe

    (tmp_path / "train.jsonl").write_text('{"text": "one", "label": "a"}\n')
    recipe = write_recipe(
        tmp_path,
        task="sequence_classification",
        model={"name_or_path": "somewhere"},
        data={
            "train": [{"path": str(tmp_path / "train.jsonl")}],
            "test": [{"path": str(tmp_path / "test.jsonl")}],
        },
    )
    found = {each.key: each.found for each in validate_recipe(recipe).inputs}
    assert found["data.train[0].path"]
    assert not found["data.test[0].path"]
