"""Each rule of a recipe lets the sound value through and refuses the other by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

import pytest

from wegeft_cli.recipe.keys import format_pattern, parse_key
from wegeft_cli.recipe.rules import check_recipe
from wegeft_cli.recipe.schema import DataSection, DataSource, ModelSection, Optimizer, Recipe
from wegeft_cli.recipe.schema_keys import kind_at, list_keys

CHOICES = {
    format_pattern(path): get_args(kind_at(path))
    for path in list_keys()
    if get_origin(kind_at(path)) is Literal
}

SOUND = Recipe(
    model=ModelSection(name_or_path="a/b"), data=DataSection(train=[DataSource(path="x.json")])
)


def change(**sections: dict[str, Any]) -> Recipe:
    recipe = SOUND
    for name, values in sections.items():
        recipe = replace(recipe, **{name: replace(getattr(recipe, name), **values)})
    return recipe


def find_faults(recipe: Recipe, **options: bool) -> list[tuple[str, str]]:
    faults = check_recipe(recipe, where=lambda key: f"place of {key}", **options)
    assert all(fault.file == f"place of {fault.key}" for fault in faults)
    return [(fault.key or "", fault.message) for fault in faults]


def test_sound_recipe_has_no_faults():
    assert find_faults(SOUND) == []
    assert find_faults(replace(SOUND, data=DataSection()), need_data=False) == []


def test_required_keys():
    assert [key for key, _ in find_faults(Recipe())] == ["model.name_or_path", "data.train"]
    recipe = change(data={"train": [DataSource(path="x"), DataSource()]})
    assert [key for key, _ in find_faults(recipe)] == ["data.train[1].path"]


@pytest.mark.parametrize("pattern", CHOICES)
def test_closed_choices(pattern):
    section, _, name = pattern.partition(".")
    if pattern == "task":
        recipe = replace(SOUND, task="causal_ml")
    elif "[]" in name:
        source = DataSource(path="x", format="instrction")
        recipe = change(data={name.partition("[")[0]: [source]})
    else:
        recipe = change(**{section: {name: "nonsense"}})
    faults = find_faults(recipe)
    key = pattern.replace("[]", "[0]")
    assert key in [k for k, _ in faults]
    message = next(m for k, m in faults if k == key)
    if pattern != "adapter.type":  # too many to list
        assert ", ".join(CHOICES[pattern]) in message
    assert set(CHOICES[pattern]) == set(get_args(kind_at(parse_key(key))))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lorra", "did you mean `lora`, `glora` or `1lora`? docs/methods.md lists the methods"),
        ("WeGeFT", "did you mean `wegeft`, `waveft` or `deft`? docs/methods.md lists the methods"),
        ("nonsense", "docs/methods.md lists the methods"),
        ("qlora", "write lora, and set `model.load_in_4bit: true`"),
        ("bone", "use `miss`"),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest_names(name, hint):
    (fault,) = check_recipe(change(adapter={"type": name}), where=lambda key: None)
    assert fault.hint == hint
    assert name in fault.message
    assert len(fault.message) < 100


def test_nearest_choice_is_the_hint():
    (fault,) = check_recipe(change(train={"optim": "adam_torch"}), where=lambda key: None)
    assert fault.hint == "did you mean `adamw_torch`?"


@pytest.mark.parametrize(
    ("section", "name", "refused", "accepted"),
    [
        ("adapter", "r", [0, -1], [1]),
        ("adapter", "alpha", [0.0, -1.0], [0.5, None]),
        ("adapter", "dropout", [-0.1, 1.0], [0.0, 0.99]),
        ("data", "validation_fraction", [-0.1, 1.0], [0.5]),
        ("data", "max_length", [0], [1]),
        ("train", "per_device_train_batch_size", [0], [1]),
        ("train", "per_device_eval_batch_size", [0], [1]),
        ("train", "gradient_accumulation_steps", [0], [1]),
        ("train", "num_train_epochs", [0.0, -1.0], [0.1]),
        ("train", "max_steps", [0, -2], [-1, 1]),
        ("train", "learning_rate", [0.0, -1e-4, float("nan")], [1e-9]),
        ("train", "warmup_ratio", [-0.1, 1.1], [0.0, 1.0]),
        ("train", "warmup_steps", [-1], [0, 5]),
        ("train", "weight_decay", [-0.1], [0.0]),
        ("train", "max_grad_norm", [-1.0], [0.0]),
        ("train", "adam_beta1", [-0.1, 1.0], [0.0]),
        ("train", "adam_beta2", [-0.1, 1.0], [0.5]),
        ("train", "adam_epsilon", [0.0], [1e-12]),
        ("train", "save_steps", [-1.0, 1.5, float("nan")], [0.0, 0.5, 1.0, 20.0]),
        ("train", "save_total_limit", [0], [1, None]),
        ("train", "logging_steps", [0], [1]),
        ("eval", "batch_size", [0], [1]),
        ("eval", "max_new_tokens", [0], [1, None]),
        ("eval", "limit", [0], [1, None]),
    ],
)
def test_ranges(section, name, refused, accepted):
    for value in refused:
        faults = find_faults(change(**{section: {name: value}}))
        assert [key for key, _ in faults] == [f"{section}.{name}"]
        assert str(value) in faults[0][1]
    for value in accepted:
        assert find_faults(change(**{section: {name: value}})) == []


def test_seed_and_limits_of_sources():
    assert [key for key, _ in find_faults(replace(SOUND, seed=-1))] == ["seed"]
    assert [key for key, _ in find_faults(replace(SOUND, seed=2**32))] == ["seed"]
    recipe = change(data={"train": [DataSource(path="x", limit=0)]})
    assert [key for key, _ in find_faults(recipe)] == ["data.train[0].limit"]


@pytest.mark.parametrize(
    ("sections", "key", "words"),
    [
        ({"adapter": {"dropout": 0.1, "view": "activation"}}, "adapter.view", "dropout"),
        ({"adapter": {"groups": {"a": ["x"]}, "share": "none"}}, "adapter.groups", "share"),
        ({"adapter": {"groups": {}}}, "adapter.groups", "no group"),
        ({"adapter": {"groups": {"a": []}}}, "adapter.groups", "has no pattern"),
        ({"adapter": {"groups": {"a.b": ["x"]}}}, "adapter.groups", "'a.b'"),
        ({"adapter": {"type": "lora", "dropout": 0.1}}, "adapter.dropout", "lora"),
        ({"adapter": {"type": "lora", "share": "none"}}, "adapter.share", "wegeft"),
        ({"adapter": {"type": "lora", "groups": {"a": ["x"]}}}, "adapter.groups", "wegeft"),
        ({"adapter": {"type": "ia3", "side": "output"}}, "adapter.side", "wegeft"),
        ({"adapter": {"type": "lora", "peft": {"r": 4}}}, "adapter.peft.r", "adapter.r"),
        ({"adapter": {"peft": {"lora_dropout": 0.1}}}, "adapter.peft", "wegeft"),
        ({"adapter": {"target_modules": []}}, "adapter.target_modules", "selects no module"),
        ({"adapter": {"target_modules": ""}}, "adapter.target_modules", "selects no module"),
        ({"adapter": {"target_modules": ["q", ""]}}, "adapter.target_modules", "selects no module"),
        ({"adapter": {"target_modules": "(q"}}, "adapter.target_modules", "regular expression"),
        ({"adapter": {"target_modules": 5}}, "adapter.target_modules", "5"),
        ({"adapter": {"target_modules": [5]}}, "adapter.target_modules", "5"),
        ({"train": {"warmup_ratio": 0.1, "warmup_steps": 5}}, "train.warmup_steps", "0.1"),
        (
            {"data": {"validation": [DataSource(path="v")], "validation_fraction": 0.1}},
            "data.validation_fraction",
            "data.validation",
        ),
        (
            {"train": {"lr_ratio": 2.0}, "adapter": {"type": "lora"}},
            "train.lr_ratio",
            "only `wegeft` has",
        ),
        (
            {"adapter": {"scale_rule": "rank_width", "alpha": 8.0}},
            "adapter.scale_rule",
            "adapter.alpha",
        ),
        (
            {"adapter": {"scale_rule": "rank_width", "type": "lora"}},
            "adapter.scale_rule",
            "read by `wegeft` alone",
        ),
        (
            {"data": {"packing": "bfd"}, "model": {"attn_implementation": "flex_attention"}},
            "data.packing",
            "flex_attention",
        ),
        (
            {"data": {"packing": "bfd"}, "train": {"group_by_length": True}},
            "train.group_by_length",
            "data.packing",
        ),
        (
            {"data": {"shuffle": False}, "train": {"group_by_length": True}},
            "train.group_by_length",
            "data.shuffle",
        ),
        ({"train": {"eval_steps": 0.1}}, "train.eval_steps", "requires validation data"),
        (
            {"train": {"early_stopping_patience": 2}},
            "train.early_stopping_patience",
            "requires validation data",
        ),
        (
            {"train": {"early_stopping_patience": 2}, "data": {"validation_fraction": 0.1}},
            "train.early_stopping_patience",
            "eval_steps",
        ),
        ({"adapter": {"modules_to_save": ["lm_head", ""]}}, "adapter.modules_to_save", "empty"),
        ({"adapter": {"init_from": " "}}, "adapter.init_from", "empty"),
    ],
)
def test_contradictions(sections, key, words):
    faults = find_faults(change(**sections))
    assert [found for found, _ in faults] == [key]
    assert words in faults[0][1]


def test_what_belongs_together_is_accepted():
    validated = {"validation_fraction": 0.1}
    stopping = {"early_stopping_patience": 2, "eval_steps": 0.5}
    for recipe in (
        change(adapter={"dropout": 0.1, "view": "weight"}),
        change(adapter={"groups": {"a-b_1": ["x"]}}),
        change(adapter={"type": "dora", "r": 8, "peft": {"lora_dropout": 0.1}}),
        change(adapter={"target_modules": "all-linear", "scale_rule": "rank_width"}),
        change(adapter={"modules_to_save": ["lm_head"], "init_from": "runs/first"}),
        change(adapter={"type": "lora", "modules_to_save": ["lm_head"], "init_from": "runs/a"}),
        change(adapter={"target_modules": ["qkv_proj:q", "c_attn:0-768"]}),
        change(train={"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}),
        change(train={"lr_ratio": 2.0}),
        change(train={"lr_ratio": 1.0}, adapter={"type": "lora"}),
        change(train={"lr_scheduler_type": "constant", "warmup_ratio": 0.1}),
        change(data=validated, train=stopping),
        change(data={"packing": "bfd"}, model={"attn_implementation": "flash_attention_2"}),
        change(data={"packing": "bfd", "shuffle": False}),
        change(train={"group_by_length": True}),
        change(data={"validation": [DataSource(path="v")]}, train=stopping),
    ):
        assert find_faults(recipe) == []


@pytest.mark.parametrize(
    ("adapter", "train", "key", "words"),
    [
        ({"peft": {"total_step": 9}}, {}, "adapter.peft.total_step", "the run's number of steps"),
        ({"peft": {"target_r": 9}}, {}, "adapter.peft.target_r", "`adapter.r`"),
        ({"peft": {"rank_pattern": {}}}, {}, "adapter.peft.rank_pattern", "is a result of the run"),
        ({"r": 8, "peft": {"init_r": 8}}, {}, "adapter.peft.init_r", "at least 9; got 8"),
        ({"peft": {"tinit": 0.1}}, {}, "adapter.peft.tinit", "at least 0; got 0.1"),
        ({"peft": {"tfinal": -1}}, {}, "adapter.peft.tfinal", "at least 0; got -1"),
        ({"peft": {"deltaT": 0}}, {}, "adapter.peft.deltaT", "at least 1; got 0"),
        ({"peft": {"beta1": 1}}, {}, "adapter.peft.beta1", "above 0 and below 1"),
        ({"init_from": "runs/x"}, {}, "adapter.init_from", "already chosen"),
        ({}, {"ema_decay": 0.9}, "train.ema_decay", "removes in between"),
        ({}, {"strategy": "fsdp2"}, "train.strategy", "'adalora'"),
    ],
)
def test_what_adalora_does_not_go_with(adapter, train, key, words):
    recipe = change(adapter={"type": "adalora", **adapter}, train=train)
    (fault,) = check_recipe(recipe, where=lambda key: None)
    assert fault.key == key
    assert words in str(fault)


def test_adalora_takes_its_own_settings():
    settings = {"init_r": 96, "tinit": 5, "tfinal": 7, "deltaT": 2, "orth_reg_weight": 0.1}
    assert find_faults(change(adapter={"type": "adalora", "peft": settings})) == []


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"load_in_4bit": True, "quant_method": "torchao"}}, "model.quant_method"),
        ({"model": {"quant_method": "torchao"}}, "model.quant_method"),
        ({"model": {"load_in_4bit": True, "name_or_path": "x.gguf"}}, "model.load_in_4bit"),
        ({"model": {"load_in_8bit": True}, "adapter": {"dropout": 0.1}}, "adapter.dropout"),
        ({"model": {"load_in_8bit": True}, "adapter": {"view": "weight"}}, "adapter.view"),
        ({"train": {"fsdp_size": 2}}, "train.fsdp_size"),
        ({"train": {"strategy": "fsdp2"}, "model": {"load_in_4bit": True}}, "train.strategy"),
        ({"train": {"strategy": "hsdp"}, "adapter": {"type": "lora"}}, "train.strategy"),
        (
            {"train": {"strategy": "fsdp2"}, "adapter": {"modules_to_save": ["lm_head"]}},
            "adapter.modules_to_save",
        ),
        (
            {"train": {"strategy": "fsdp2"}, "model": {"name_or_path": "x.gguf"}},
            "model.name_or_path",
        ),
        ({"train": {"strategy": "fsdp2", "compile": True}}, "train.compile"),
        ({"train": {"compile": True, "gradient_checkpointing": True}}, "train.compile"),
        (
            {"train": {"strategy": "fsdp2", "activation_offload": True}},
            "train.activation_offload",
        ),
        (
            {"train": {"activation_offload": True, "gradient_checkpointing": True}},
            "train.activation_offload",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_way_out(sections, key):
    (fault,) = check_recipe(change(**sections), where=lambda key: None)
    assert fault.key == key
    assert fault.hint


def test_both_quantised_loads_contradict():
    faults = find_faults(change(model={"load_in_4bit": True, "load_in_8bit": True}))
    assert ("model.load_in_8bit", "contradicts `model.load_in_4bit`") in faults


WEIGHTED = [DataSource(path="x.jsonl", weight=2), DataSource(path="y.jsonl", weight=1)]
LINES = [DataSource(path="x.jsonl")]
STREAM: dict[str, Any] = {"data": {"streaming": True, "train": LINES}, "train": {"max_steps": 5}}


def test_all_training_sources_have_a_weight_or_none():
    assert find_faults(change(data={"train": WEIGHTED})) == []
    half = [WEIGHTED[0], DataSource(path="y.jsonl")]
    for train, key in ((half, "data.train[1].weight"), (half[::-1], "data.train[0].weight")):
        (fault,) = find_faults(change(data={"train": train}))
        assert fault == (key, "is missing: another training source has one")
    packed = change(data={"train": WEIGHTED, "packing": "bfd"})
    assert "data.train[0].weight" in [key for key, _ in find_faults(packed)]


def test_validation_has_no_weights():
    recipe = change(data={"train": WEIGHTED, "validation": WEIGHTED})
    assert [key for key, _ in find_faults(recipe)] == [
        "data.validation[0].weight",
        "data.validation[1].weight",
    ]


def test_a_stream_is_sound():
    assert find_faults(change(**STREAM)) == []
    assert find_faults(change(**{**STREAM, "data": {**STREAM["data"], "train": WEIGHTED}})) == []


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("train", {"max_steps": -1}, "train.max_steps"),
        ("train", {"group_by_length": True}, "train.group_by_length"),
        ("data", {"validation_fraction": 0.1}, "data.validation_fraction"),
        ("data", {"packing": "bfd"}, "data.packing"),
        ("data", {"train": [DataSource(path="x.json")]}, "data.train[0].path"),
        ("data", {"train": [DataSource(path="a/b", format="metamath")]}, "data.train[0].format"),
    ],
)
def test_what_needs_all_rows_does_not_stream(section, values, key):
    recipe = change(**{**STREAM, section: {**STREAM[section], **values}})
    assert key in [key for key, _ in find_faults(recipe)]
    without = replace(recipe, data=replace(recipe.data, streaming=False))
    assert key not in [key for key, _ in find_faults(without)]


def test_every_other_optimizer_of_transformers_is_refused_with_the_choices() -> None:
    from transformers.training_args import OptimizerNames

    names = {name.value for name in OptimizerNames}
    assert len(names) > 30
    refused = names - {*get_args(Optimizer)}
    assert len(refused) > 15
    for name in refused:
        (fault,) = check_recipe(change(train={"optim": name}), where=lambda key: None)
        assert f"got '{name}'" in fault.message
        assert ", ".join(get_args(Optimizer)) in fault.message
