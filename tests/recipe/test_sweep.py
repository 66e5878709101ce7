"""What a sweep tries is held against the schema, and every combination against the rules."""

from __future__ import annotations

import itertools

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.planning.validate import validate_recipe
from wegeft_cli.recipe.grid import MAX_RUNS, count_runs, name_run, name_value, short_names
from wegeft_cli.recipe.keys import format_key, parse_key
from wegeft_cli.recipe.load import load_recipe, recipe_to_yaml
from wegeft_cli.recipe.sweep import load_sweep

GRID = """\
adapter: {r: 8, alpha: "${adapter.r}"}
sweep:
  seed: [42, 43, 44]
  train.learning_rate: [1e-4, 2e-4]
  adapter.r: [4, 8]
"""


def test_every_combination_is_a_recipe_of_its_own(write):
    path = write(GRID, sound=True)
    loaded = load_sweep(path)
    assert len(loaded.runs) == 12
    tried = itertools.product([1e-4, 2e-4], [4, 8], [42, 43, 44])
    for run, (rate, rank, seed) in zip(loaded.runs, tried, strict=True):
        recipe = run.loaded.recipe
        found = (recipe.train.learning_rate, recipe.adapter.r, recipe.seed)
        assert found == tuple(run.values.values()) == (rate, rank, seed)
        assert recipe.adapter.alpha == rank  # what refers to a key follows it
        assert recipe.sweep == {}
        assert recipe.output_dir == f"runs/recipe/learning_rate={rate}_r={rank}_seed={seed}"
        assert run.loaded.find_place("train.learning_rate").startswith(f"{path}:8:")
    assert len({run.name for run in loaded.runs}) == 12


def test_other_commands_take_the_recipe_alone_and_say_so(write):
    loaded = load_recipe(write(GRID, sound=True))
    assert (loaded.recipe.adapter.r, count_runs(loaded.recipe.sweep)) == (8, 12)
    assert any("12 runs" in note and "wegeft sweep" in note for note in loaded.notes)
    assert count_runs({}) == 0
    assert load_recipe(write("seed: 1\n", sound=True)).notes == ()


def test_a_recipe_with_a_sweep_survives_being_written(write, tmp_path):
    recipe = load_recipe(write(GRID, sound=True)).recipe
    again = tmp_path / "again.yaml"
    again.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(again).recipe == recipe


def test_overrides_set_what_is_tried(write):
    path = write("sweep: {train.learning_rate: [1e-4]}\n", sound=True)
    overrides = [
        "sweep.lr=[1,2]",
        "sweep.seed=[3]",
        "sweep.data.train[0].limit=[5,null]",
        "sweep.adapter.target_modules=[[q_proj,v_proj], all-linear, 'x${y']",
    ]
    loaded = load_sweep(path, overrides[:3])
    assert [list(run.values.values()) for run in loaded.runs] == [
        [1.0, 5, 3], [1.0, None, 3], [2.0, 5, 3], [2.0, None, 3],
    ]  # fmt: skip
    assert loaded.runs[1].loaded.recipe.data.train[0].limit is None
    assert loaded.base.notes == ("`sweep.lr` is read as `sweep.train.learning_rate`",)
    whole = load_sweep(path, [overrides[3].replace(", 'x${y'", ""), "sweep.seed=[1]"])
    targets = [run.loaded.recipe.adapter.target_modules for run in whole.runs]
    assert targets == [["q_proj", "v_proj"], "all-linear"]


@pytest.mark.parametrize(
    ("line", "key", "message", "hint"),
    [
        ("train.learning_rte: [1]", "train.learning_rte", "no key", "`train.learning_rate`"),
        ("learning_rate: [1]", "learning_rate", "no key", "`train.learning_rate`"),
        ("data.train.limit: [1]", "data.train.limit", "no key", "`data.train[0].limit`"),
        ("output_dir: [a, b]", "output_dir", "cannot be swept", "its own folder"),
        ("extends: [a, b]", "extends", "cannot be swept", "its own folder"),
        ("sweep.seed: [1]", "sweep.seed", "cannot be swept", "its own folder"),
        ("train: [1]", "train", "is a section", "`train.per_device_train_batch_size`"),
        ("'a b': [1]", "a b", "not a dotted key", "train.learning_rate"),
        ("seed: 4", "seed", "expected a list", "[...]"),
        ("seed: []", "seed", "has no value", "remove it"),
        ("seed: [4, 5, 4]", "seed[2]", "4 is listed twice", "keep one"),
        ("seed: [4, x]", "seed[1]", "a whole number", ""),
        ("train.learning_rate: [1, on]", "train.learning_rate[1]", "got true", "bare `on`"),
        ("train.learning_rate: ['${seed}']", "train.learning_rate[0]", "literal values", "values"),
    ],
)
def test_what_cannot_be_tried_is_told_at_its_place(write, faults_of, line, key, message, hint):
    path = write(f"sweep:\n  {line}\n", sound=True)
    (fault,) = faults_of(path)
    assert (fault.file or "").startswith(f"{path}:6:")
    assert fault.key == f"sweep.{key}"
    assert message in fault.message
    assert hint in (fault.hint or "")
    if ": [" in line and "'a b'" not in line:
        name, _, values = line.partition(": ")
        (override,) = faults_of(write("", sound=True), f"sweep.{name}={values}")
        assert (override.key, override.message) == (fault.key, fault.message)


def test_each_combination_must_keep_the_rules(write):
    path = write(
        "train: {warmup_ratio: 0.1}\n"
        "sweep:\n"
        "  train.warmup_steps: [0, 10]\n"
        "  train.optim: [adamw_torch, adamw_troch]\n"
        "  data.train[1].limit: [1]\n"
        "  seed: [1, 2, 3]\n",
        sound=True,
    )
    with pytest.raises(ExceptionGroup) as caught:
        load_sweep(path)
    told = {(fault.file, fault.key): str(fault) for fault in caught.value.exceptions}
    assert set(told) == {
        (f"{path}:7:27", "train.warmup_steps"),
        (f"{path}:8:30", "train.optim"),
        (f"{path}:9:25", "data.train[1]"),
    }
    assert len(caught.value.exceptions) == len(told)  # once, not once a seed
    assert "(in the run warmup_steps=10_" in told[f"{path}:7:27", "train.warmup_steps"]
    assert "`adamw_torch`" in told[f"{path}:8:30", "train.optim"]
    with pytest.raises(ExceptionGroup):
        validate_recipe(path)


def test_names_of_other_rooms_are_checked_in_each_combination(write):
    path = write("sweep: {data.template: [alpaca, alpacca], seed: [1, 2]}\n", sound=True)
    with pytest.raises(UserError, match="alpacca") as caught:
        validate_recipe(path)
    assert caught.value.file == f"{path}:5:33"
    sound = validate_recipe(path, ["sweep.data.template=[alpaca]"])
    assert "2 runs" in sound.checked[-1]


def test_no_sweep_and_too_much_of_it(write):
    with pytest.raises(UserError, match="has no sweep") as caught:
        load_sweep(write("seed: 1\n", sound=True))
    assert "sweep.seed=" in (caught.value.hint or "")
    many = list(range(MAX_RUNS + 1))
    with pytest.raises(UserError, match="1,001 combinations"):
        load_recipe(write(f"sweep: {{seed: {many}}}\n", sound=True))


VALUES = [
    1, 1.5, 2e-4, 1e-5, 1e16, -3, True, False, None, "a", "a/b", "a b", "1", "true", "null", "",
    ["q_proj", "v_proj"], ["q_proj"], "q_proj", "q_proj+v_proj", ["q_proj+v_proj"], [], [1, 2],
    {"a": 1}, {"a": 2}, "x" * 50, "x" * 51, "..",
]  # fmt: skip


def test_names_are_short_stable_and_their_own():
    names = [name_value(value) for value in VALUES]
    assert len(set(names)) == len(VALUES)
    assert all(name and "/" not in name and len(name) < 60 for name in names)
    assert names[2] == "0.0002"
    assert name_value(["q_proj", "v_proj"]) == "q_proj+v_proj"
    assert name_run({"train.learning_rate": 2e-4, "seed": 42}) == "learning_rate=0.0002_seed=42"
    both = {"data.train[0].limit": 5, "eval.limit": 6}
    assert name_run(both) == "data.train.0.limit=5_eval.limit=6"
    assert short_names({"data.train[0].limit": 5}) == {"data.train[0].limit": "limit"}
    long = {f"adapter.peft.key{n}": "y" * 39 for n in range(9)}
    assert len(name_run(long)) == 200
    assert name_run(long) != name_run({**long, "adapter.peft.key8": "z" * 39})


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("sweep", ("sweep",)),
        ("sweep.seed", ("sweep", "seed")),
        ("sweep.train.optim[1]", ("sweep", "train.optim", 1)),
        ("sweep.data.train[0].limit", ("sweep", "data.train[0].limit")),
        ("sweep.data.train[0].limit[2]", ("sweep", "data.train[0].limit", 2)),
    ],
)
def test_keys_of_a_sweep_are_whole_keys(text, path):
    assert parse_key(text) == path
    assert format_key(path) == text
