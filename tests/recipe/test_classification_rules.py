"""What classification reads and what it does not; an override of the type makes a baseline."""

from dataclasses import replace

import pytest
import yaml

from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.rules import check_recipe
from wegeft_cli.recipe.schema import DataSource, ModelSection, Recipe

SOUND = Recipe(model=ModelSection(name_or_path="m"))


def find_keys(recipe):
    data = replace(recipe.data, train=recipe.data.train or [DataSource(path="x")])
    return [f.key for f in check_recipe(replace(recipe, data=data), where=lambda key: None)]


@pytest.mark.parametrize(
    ("task", "section", "key", "value"),
    [
        ("causal_lm", "data", "image_size", 8),
        ("causal_lm", "data", "test", [DataSource(path="x")]),
        ("causal_lm", "eval", "metric", "f1"),
        ("image_classification", "data", "packing", "bfd"),
        ("image_classification", "data", "problem_type", "regression"),
        ("image_classification", "data", "max_length", 9),
        ("image_classification", "eval", "metric", "pearson"),
        ("sequence_classification", "data", "image_transform", "crop"),
        ("sequence_classification", "model", "drop_path_rate", 0.1),
        ("sequence_classification", "logging", "sample_prompts", ["x"]),
        ("sequence_classification", "model", "load_in_8bit", True),
        ("image_classification", "train", "strategy", "fsdp2"),
        ("image_classification", "train", "compile", True),
    ],
)
def test_a_key_that_the_task_does_not_read_is_refused(task, section, key, value):
    recipe = replace(SOUND, task=task)
    assert find_keys(recipe) == []
    changed = replace(getattr(recipe, section), **{key: value})
    assert f"{section}.{key}" in find_keys(replace(recipe, **{section: changed}))


@pytest.mark.parametrize(
    ("task", "changes", "key"),
    [
        ("causal_lm", {"adapter": {"type": "linear_probe"}}, "adapter.type"),
        ("causal_lm", {"adapter": {"type": "full", "r": 8}}, "adapter.r"),
        ("causal_lm", {"adapter": {"type": "full", "init": "psi_zero"}}, "adapter.init"),
        (
            "causal_lm",
            {"adapter": {"type": "full"}, "model": {"dtype": "bfloat16"}},
            "model.dtype",
        ),
        (
            "image_classification",
            {"adapter": {"type": "full", "modules_to_save": ["a"]}},
            "adapter.modules_to_save",
        ),
    ],
)
def test_methods_in_place_refuse_what_they_do_not_read(task, changes, key):
    recipe = replace(SOUND, task=task)
    for section, values in changes.items():
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **values)})
    assert key in find_keys(recipe)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "r.yaml"
    values = {
        "task": "image_classification",
        "model": {"name_or_path": "m"},
        "adapter": {"r": 16, "init": "psi_zero", "share": "none", "target_modules": ["o_proj"]},
        "data": {"train": [{"path": "x"}]},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_an_override_of_the_type_makes_the_recipe_its_own_baseline(file):
    lora = load_recipe(file, ["adapter.type=lora"])
    assert (lora.recipe.adapter.init, lora.recipe.adapter.r) == ("phi_zero", 16)
    assert any("`adapter.init` is ignored" in note for note in lora.notes)
    full = load_recipe(file, ["adapter.type=full"]).recipe.adapter
    assert (full.r, full.target_modules) == (64, "all-linear")
    assert load_recipe(file, ["adapter.type=wegeft"]).recipe.adapter.init == "psi_zero"


def test_what_the_override_itself_says_is_judged(file):
    with pytest.raises(Exception, match="read by `wegeft` alone"):
        load_recipe(file, ["adapter.type=lora", "adapter.init=psi_zero"])
