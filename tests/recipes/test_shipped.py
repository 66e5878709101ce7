"""Every shipped recipe is valid, says where its numbers come from, and holds the published ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wegeft_cli.recipe.catalog import list_recipes, read_recipe_text
from wegeft_cli.recipe.load import load_recipe, recipe_to_yaml
from wegeft_cli.workflows.validate import validate_recipe

NAMES = [recipe.name for recipe in list_recipes()]
LANGUAGE = ["commonsense", "math10k", "metamath", "codefeedback", "wizardlm", "alpaca"]
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_all_are_there():
    pairs = [f"llama_{name}{twin}" for name in LANGUAGE for twin in ("", "_lora")]
    assert sorted(["quickstart", *pairs]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_is_valid_and_comes_back_from_its_run_folder(name, tmp_path: Path):
    report = validate_recipe(name)
    assert report.notes == ()
    loaded = load_recipe(name)
    assert loaded.recipe.output_dir == f"runs/{name}"
    saved = tmp_path / "recipe.yaml"
    saved.write_text(recipe_to_yaml(loaded.recipe), encoding="utf-8")
    assert load_recipe(saved).recipe == loaded.recipe


@pytest.mark.parametrize("name", NAMES)
def test_header_says_what_whence_how_and_on_what(name):
    text = read_recipe_text(name)
    header = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    for part in ("Reproduces", "Numbers", "Command", "Hardware"):
        assert re.search(rf"^# {part} +\S", header, re.MULTILINE), part
    assert re.search(rf"wegeft train {name}\b", header)
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("name", LANGUAGE)
def test_twin_differs_in_the_adapter_alone(name):
    recipe = load_recipe(f"llama_{name}").recipe
    twin = load_recipe(f"llama_{name}_lora").recipe
    assert twin.adapter.type == "lora"
    assert twin.adapter.target_modules == recipe.adapter.target_modules
    assert (twin.data, twin.train, twin.eval, twin.model, twin.seed) == (
        recipe.data,
        recipe.train,
        recipe.eval,
        recipe.model,
        recipe.seed,
    )


@pytest.mark.parametrize(
    ("name", "r", "alpha", "dropout", "targets"),
    [
        ("llama_commonsense", 64, 128, 0.1, FIVE),
        ("llama_math10k", 64, 128, 0.1, FIVE),
        ("llama_metamath", 64, 128, 0.0, SEVEN),
        ("llama_codefeedback", 64, 128, 0.0, SEVEN),
        ("llama_wizardlm", 64, 128, 0.0, SEVEN),
        ("llama_alpaca", 16, None, 0.0, ["q_proj", "v_proj"]),
        ("quickstart", 64, 32, 0.0, FIVE),
        ("llama_commonsense_lora", 16, 32, 0.0, FIVE),
        ("llama_math10k_lora", 16, 32, 0.0, FIVE),
        ("llama_metamath_lora", 8, 16, 0.0, SEVEN),
        ("llama_codefeedback_lora", 8, 16, 0.0, SEVEN),
        ("llama_wizardlm_lora", 8, 16, 0.0, SEVEN),
    ],
)
def test_published_adapter(name, r, alpha, dropout, targets):
    adapter = load_recipe(name).recipe.adapter
    assert (adapter.r, adapter.alpha, adapter.dropout) == (r, alpha, dropout)
    assert adapter.target_modules == targets
    assert adapter.share == "module_type"


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "rate", "schedule", "warmup", "length"),
    [
        ("llama_commonsense", 16, 3, 2e-4, "linear", 0.1, 512),
        ("llama_math10k", 16, 3, 4e-4, "linear", 0.1, 512),
        ("llama_metamath", 32, 1, 2e-5, "cosine", 0.03, 1024),
        ("llama_codefeedback", 32, 1, 2e-5, "cosine", 0.03, 1024),
        ("llama_wizardlm", 32, 1, 2e-5, "cosine", 0.03, 1024),
        ("llama_alpaca", 128, 12, 2e-4, "linear", 0.0, 768),
        ("quickstart", 16, 1.5, 3e-3, "linear", 0.1, 128),
    ],
)
def test_published_schedule(name, batch, epochs, rate, schedule, warmup, length):
    recipe = load_recipe(name).recipe
    train = recipe.train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == batch
    assert (train.num_train_epochs, train.learning_rate) == (epochs, rate)
    assert (train.lr_scheduler_type, train.warmup_ratio) == (schedule, warmup)
    assert (train.weight_decay, recipe.data.max_length) == (0.0, length)


def test_commonsense_sets_stand_in_the_published_order():
    sources = load_recipe("llama_commonsense").recipe.data.train
    assert [Path(source.path).parent.name for source in sources] == [
        "boolq",
        "piqa",
        "social_i_qa",
        "hellaswag",
        "winogrande",
        "ARC-Easy",
        "ARC-Challenge",
        "openbookqa",
    ]
