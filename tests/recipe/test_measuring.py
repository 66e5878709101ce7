"""What a recipe may ask to be measured, watched and told while it trains."""

from dataclasses import replace

import pytest

from wegeft_cli.recipe.rules import check_measuring, check_recipe
from wegeft_cli.recipe.schema import DataSource, Recipe

VALIDATED = {"data": {"validation": [DataSource(path="x.jsonl")]}, "train": {"eval_steps": 10}}
TASKS = {"train": {"eval_steps": 10, "eval_tasks": ["gsm8k", "boolq"]}}


def change(*parts, **sections):
    recipe = Recipe()
    for values in (*parts, sections):
        for name, section in values.items():
            recipe = replace(recipe, **{name: replace(getattr(recipe, name), **section)})
    return recipe


@pytest.mark.parametrize(
    "recipe",
    [
        change(),
        change(VALIDATED, train={"early_stopping_patience": 2, "load_best_model_at_end": True}),
        change(TASKS),
        change(TASKS, train={"metric_for_best_model": "eval_boolq"}),
        change(
            TASKS,
            train={"metric_for_best_model": "eval_gsm8k", "load_best_model_at_end": True},
        ),
        change(train={"eval_steps": 10}, logging={"sample_prompts": ["a"]}),
        change(logging={"report_to": "tensorboard"}),
        change(logging={"report_to": ["wandb", "trackio"]}),
        change(logging={"report_to": ["none"]}),
        change(logging={"report_to": []}),
    ],
)
def test_sound(recipe):
    assert list(check_measuring(recipe)) == []


@pytest.mark.parametrize(
    ("recipe", "key", "message", "hint"),
    [
        (change(train={"eval_steps": 5}), "train.eval_steps", "validation data", "eval_tasks"),
        (
            change(train={"eval_tasks": ["a", "b", "a"]}),
            "train.eval_tasks[2]",
            "twice",
            "remove",
        ),
        (
            change(train={"load_best_model_at_end": True}),
            "train.load_best_model_at_end",
            "requires validation data",
            "data.validation",
        ),
        (
            change(TASKS, train={"load_best_model_at_end": True}),
            "train.load_best_model_at_end",
            "requires validation data",
            "train.metric_for_best_model: eval_gsm8k",
        ),
        (
            change(VALIDATED, train={"load_best_model_at_end": True, "eval_steps": 0}),
            "train.load_best_model_at_end",
            "`train.eval_steps` is 0",
            "set `train.eval_steps`",
        ),
        (
            change(TASKS, train={"early_stopping_patience": 2, "eval_steps": 0,
                                 "metric_for_best_model": "eval_boolq"}),
            "train.early_stopping_patience",
            "`train.eval_steps` is 0",
            "set `train.eval_steps`",
        ),
        (
            change(VALIDATED, train={"metric_for_best_model": "eval_gsm8k"}),
            "train.metric_for_best_model",
            "measured: eval_loss",
            "train.eval_tasks",
        ),
        (
            change(train={"metric_for_best_model": "eval_gsm8k"}),
            "train.metric_for_best_model",
            "measured: nothing",
            "train.eval_tasks",
        ),
        (change(logging={"report_to": "wandbb"}), "logging.report_to", "'wandbb'", "`wandb`"),
        (change(logging={"report_to": ["mlflow", "tensorbord"]}), "logging.report_to",
         "'tensorbord'", "`tensorboard`"),
        (change(logging={"report_to": ["none", "wandb"]}), "logging.report_to", "'none'", None),
        (change(logging={"report_to": 3}), "logging.report_to", "3", None),
        (change(logging={"report_to": None}), "logging.report_to", "None", None),
        (change(logging={"sample_prompts": ["a", " "]}), "logging.sample_prompts[1]", "empty",
         "remove"),
    ],
)  # fmt: skip
def test_unsound(recipe, key, message, hint):
    (fault,) = check_measuring(recipe)
    assert fault[0] == key
    assert message in fault[1]
    assert hint is None or hint in fault[2]
    assert key in [found.key for found in check_recipe(recipe, where=lambda key: None)]
