"""A file, what it extends and overrides become one recipe, or all of their faults."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from wegeft_cli.recipe.keys import parse_key
from wegeft_cli.recipe.load import load_recipe, recipe_to_yaml
from wegeft_cli.recipe.schema import (
    AdapterSection,
    DataSection,
    DataSource,
    EvalSection,
    ModelSection,
    Recipe,
    TrainSection,
)
from wegeft_cli.recipe.schema_keys import ALIASES, POINTERS, kind_at


def test_file_becomes_typed_recipe(write):
    path = write(
        """\
seed: 7
adapter: {alpha: 128, target_modules: [q_proj, v_proj], peft: {}}
train:
  learning_rate: 1e-4
  num_train_epochs: 2
  save_total_limit: null
""",
        sound=True,
    )
    loaded = load_recipe(path)
    assert loaded.recipe == Recipe(
        seed=7,
        output_dir="runs/recipe",
        model=ModelSection(name_or_path="some/model"),
        adapter=AdapterSection(alpha=128.0, target_modules=["q_proj", "v_proj"]),
        data=DataSection(train=[DataSource(path="rows.json")]),
        train=TrainSection(learning_rate=1e-4, num_train_epochs=2.0, save_total_limit=None),
    )
    assert type(loaded.recipe.train.num_train_epochs) is float
    assert loaded.path == path
    assert loaded.notes == ()
    assert loaded.places["train.learning_rate"] == f"{path}:8:3"
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.recipe.seed = 1  # type: ignore[misc]


def test_every_fault_is_told_at_once(write, faults_of):
    path = write(
        """\
model:
  name_or_path: some/model
  revision: 12345
learning_rate: 1e-4
data:
  train:
    - path: a.json
    - paht: b.json
      limit: many
  max_length: 512
  max_length: 256
train:
  learning_rte: 2
  warmup_ratio: 1.5
  gradient_checkpointing: "yes"
adapter: lora
eval:
  tasks: gsm8k
"""
    )
    faults = faults_of(path, "train.optim=adam", "trian.seed=1")
    told = {(fault.file, fault.key): fault for fault in faults}
    assert list(told) == [
        (f"{path}:11:3", "data.max_length"),
        (f"{path}:3:3", "model.revision"),
        (f"{path}:4:1", "learning_rate"),
        (f"{path}:8:7", "data.train[1].paht"),
        (f"{path}:9:7", "data.train[1].limit"),
        (f"{path}:13:3", "train.learning_rte"),
        (f"{path}:15:3", "train.gradient_checkpointing"),
        (f"{path}:16:1", "adapter"),
        (f"{path}:18:3", "eval.tasks"),
        ("override `trian.seed=1`", "trian"),
        (f"{path}:14:3", "train.warmup_ratio"),
        ("override `train.optim=adam`", "train.optim"),
    ]
    hints = {key: fault.hint for (_, key), fault in told.items()}
    assert hints["model.revision"] == 'quote it: "12345"'
    assert hints["learning_rate"] == "did you mean `train.learning_rate`?"
    assert hints["data.train[1].paht"] == "did you mean `data.train[1].path`?"
    assert hints["train.learning_rte"] == "did you mean `train.learning_rate`?"
    assert hints["adapter"] == "write {type: lora}"
    assert hints["eval.tasks"] == "write [gsm8k]"
    assert hints["trian"] == "did you mean `train`?"
    assert "the text 'many'" in told[f"{path}:9:7", "data.train[1].limit"].message
    assert "1.5" in told[f"{path}:14:3", "train.warmup_ratio"].message


@pytest.mark.parametrize(
    ("line", "key", "message", "hint"),
    [
        ("seed: true", "seed", "a whole number, got true", "YAML reads a bare `true` as true"),
        ("seed: '5'", "seed", "got the text '5'", "write 5 without quotes"),
        ("seed: 5.0", "seed", "got the number 5.0", "write 5"),
        ("seed: 012", "seed", "got the number 10", "bare `012` as 10"),
        ("seed: 1:30", "seed", "got the number 90", "bare `1:30` as 90"),
        ("seed: null", "seed", "got nothing (null)", "remove the key"),
        ("seed: [1]", "seed", "got a list", None),
        ("train: {learning_rate: no}", "train.learning_rate", "got false", "bare `no` as false"),
        ("train: {learning_rate: .inf}", "train.learning_rate", "a finite number", None),
        ("adapter: {alpha: 1" + "0" * 400 + "}", "adapter.alpha", "the number 1000", None),
        ("train: {compile: 1}", "train.compile", "expected true or false, got the number 1", None),
        ("train: {mixed_precision: no}", "train.mixed_precision", "got false", "write none"),
        ("train:", "train", "expected a map, got nothing", "remove the key"),
        ("train: [a]", "train", "expected a map, got a list", "its keys: per_device_train"),
        ("eval: {tasks: {a: b}}", "eval.tasks", "expected a list, got a map", "write a list"),
        ("eval: {tasks: [1]}", "eval.tasks[0]", "expected text, got the number 1", 'quote it: "1"'),
        ("adapter: {groups: {a: b}}", "adapter.groups.a", "expected a list", "write [b]"),
        ("adapter: {peft: [a]}", "adapter.peft", "expected a map, got a list", None),
        ("output_dir: no", "output_dir", "expected text, got false", 'quote it: "no"'),
        ("output_dir: ???", "output_dir", "`???` stands for a missing value", None),
        ("output_dir: !!binary aGk=", "output_dir", "binary` is not supported", None),
        ("output_dir: !run rm", "output_dir", "the YAML tag `!run` is not supported", None),
        ("train: !map {a: 1}", "train", "the YAML tag `!map` is not supported", None),
        ("eval: {tasks: !!set {a}}", "eval.tasks", "set` is not supported", None),
        ("1: 2", None, "a key must be text, got 1", 'quote it: "1"'),
        ("[a, b]: 2", None, "a key must be text, got a list or map", None),
        ("train: {use_reentrant: true}", "train.use_reentrant", "wrong gradients", "remove it"),
        (
            "train: {gradient_checkpointing_kwargs: {use_reentrant: false}}",
            "train.gradient_checkpointing_kwargs",
            "never reentrant here",
            "`train.gradient_checkpointing: true` is the only",
        ),
        ("static_graph: true", "static_graph", "fails with accumulation", "nothing to set"),
        (
            "train: {ddp_find_unused_parameters: false}",
            "train.ddp_find_unused_parameters",
            "never wrapped in DDP",
            "remove it",
        ),
        ("train: {deepspeed: zero3.json}", "train.deepspeed", "ZeRO", "`train.strategy: fsdp2`"),
        (
            "train: {fsdp: full_shard}",
            "train.fsdp",
            "shards the factors",
            "`train.strategy: fsdp2`",
        ),
        (
            "fsdp_activation_checkpointing: true",
            "fsdp_activation_checkpointing",
            "does not restore the random state",
            "gradient_checkpointing",
        ),
        ("train: {tp_size: 2}", "train.tp_size", "the factors need all of it", "fsdp2"),
        ("zzz: 1", "zzz", "unknown key, with the number 1", "keys at the top level: seed"),
    ],
)
def test_wrong_value_says_what_was_got_and_what_to_write(
    write, faults_of, line, key, message, hint
):
    path = write(line + "\n", sound=True)
    (fault,) = faults_of(path)
    assert fault.key == key
    assert message in fault.message
    assert hint is None or hint in (fault.hint or "")
    assert (fault.file or "").startswith(f"{path}:5:")


def test_source_given_as_text_says_how_to_write_it(write, faults_of):
    path = write("model: {name_or_path: a/b}\ndata:\n  train: rows.json\n")
    (fault,) = faults_of(path)
    assert (fault.key, fault.hint) == ("data.train", "write [{path: rows.json}]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a map of keys, got nothing"),
        (b"# only a comment\n", "expected a map of keys, got nothing"),
        (b"- a\n- b\n", "expected a map of keys, got a list"),
        (b"just text\n", "expected a map of keys, got 'just text'"),
        (b"seed: [1, 2\n", "not valid YAML"),
        (b"train:\n\tseed: 1\n", "not valid YAML"),
        (b"seed: 1\n---\nseed: 2\n", "not valid YAML"),
        (b"seed: \xff\xfe\n", "is not UTF-8 text"),
        (b"a: &x [*x]\n", "not valid YAML"),
        (b"seed: " + b"9" * 5000 + b"\n", "not valid YAML"),
        (b"[" * 5000, "nested too deeply"),
    ],
)
def test_file_that_is_no_recipe_is_one_clear_fault(tmp_path: Path, faults_of, content, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    (fault,) = faults_of(path)
    assert message in fault.message
    assert (fault.file or "").startswith(str(path))


def test_missing_file_and_folder_say_what_to_do(tmp_path: Path, write, faults_of):
    (missing,) = faults_of(tmp_path / "none.yaml")
    assert "no such file" in missing.message
    (near,) = faults_of("quickstrat")
    assert near.hint == "did you mean `quickstart`?"
    write("seed: 1\n", "run/recipe.yaml")
    (folder,) = faults_of(tmp_path / "run")
    assert "is a folder" in folder.message
    assert str(tmp_path / "run" / "recipe.yaml") in (folder.hint or "")


def test_duplicate_keys_are_told_with_the_other_faults(write, faults_of):
    path = write("model:\n  dtype: auto\n  dtype: float32\nsede: 1\ndata: {train: [{path: x}]}\n")
    faults = faults_of(path)
    assert [(fault.file, fault.key) for fault in faults[:2]] == [
        (f"{path}:3:3", "model.dtype"),
        (f"{path}:4:1", "sede"),
    ]
    assert f"{path}:2:3" in faults[0].message


def test_required_keys(write, faults_of):
    path = write("seed: 1\n")
    assert [fault.key for fault in faults_of(path)] == ["model.name_or_path", "data.train"]
    assert [fault.key for fault in faults_of(path, need_data=False)] == ["model.name_or_path"]
    write("model: {name_or_path: a}\n")
    assert load_recipe(path, need_data=False).recipe.data.train == []


def test_misspelt_required_key_is_not_also_called_missing(write, faults_of):
    path = write("model: {name_or_pth: a/b}\ndata: {train: [{path: x}]}\n")
    (fault,) = faults_of(path)
    assert (fault.key, fault.hint) == ("model.name_or_pth", "did you mean `model.name_or_path`?")


class TestExtends:
    def test_child_wins_maps_merge_lists_replace(self, write):
        write(
            "seed: 1\nmodel: {name_or_path: a/b, dtype: float32}\n"
            "adapter: {type: lora, peft: {lora_dropout: 0.1, bias: none}}\n"
            "data:\n  train: [{path: x, limit: 5}, {path: y}]\n",
            "base/parent.yaml",
        )
        write("extends: parent.yaml\nseed: 2\nadapter: {r: 8}\n", "base/middle.yaml")
        child = write(
            "extends: base/middle.yaml\nmodel: {dtype: bfloat16}\n"
            "adapter: {peft: {bias: all}}\ndata: {train: [{path: z}]}\n",
            "child.yaml",
        )
        loaded = load_recipe(child)
        recipe = loaded.recipe
        assert recipe.seed == 2
        assert recipe.model == ModelSection(name_or_path="a/b", dtype="bfloat16")
        assert recipe.adapter.r == 8
        assert recipe.adapter.peft == {"lora_dropout": 0.1, "bias": "all"}
        assert recipe.data.train == [DataSource(path="z")]
        assert recipe.output_dir == "runs/child"
        assert loaded.places["seed"].endswith("middle.yaml:2:1")
        assert "data.train[1].path" not in loaded.places

    def test_shipped_recipe_by_name(self, write):
        path = write("extends: quickstart\ntrain: {max_steps: 3}\n")
        recipe = load_recipe(path).recipe
        assert recipe.train.max_steps == 3
        assert recipe.adapter.r == load_recipe("quickstart").recipe.adapter.r

    def test_faults_of_parent_name_its_file(self, write, faults_of):
        parent = write("seed: x\nadapter: {dropout: 2}\n", "parent.yaml", sound=True)
        child = write("extends: parent.yaml\nsede: 1\n", "child.yaml")
        assert [fault.file for fault in faults_of(child)] == [
            f"{parent}:5:1",
            f"{child}:2:1",
            f"{parent}:6:11",
        ]

    def test_circle_missing_and_wrong_kind(self, write, faults_of):
        write("extends: b.yaml\n", "a.yaml")
        circle = write("extends: a.yaml\n", "b.yaml")
        (fault,) = faults_of(circle)
        assert "is circular" in fault.message
        (fault,) = faults_of(write("extends: llama_comonsense\n"))
        assert fault.hint == "did you mean `llama_commonsense`?"
        assert fault.key == "extends"
        faults = faults_of(write("extends: [a]\n", sound=True))
        assert [fault.message for fault in faults] == [
            "expected the name or path of a recipe, got a list"
        ]

    def test_unreadable_parent_does_not_hide_the_childs_faults(self, write, faults_of):
        write("seed: [\n", "parent.yaml")
        child = write("extends: parent.yaml\nsede: 1\n", "child.yaml")
        messages = [fault.message for fault in faults_of(child, "seed=x")]
        assert len(messages) == 3
        assert messages[0].startswith("not valid YAML")


class TestOverrides:
    def test_values_are_yaml(self, write):
        path = write("adapter: {type: lora, peft: {a: 1}}\n", sound=True)
        recipe = load_recipe(
            path,
            [
                "train.learning_rate=1e-3",
                "adapter.target_modules=[q_proj, v_proj]",
                "data.train[0].limit=5",
                "data.train[0].columns.prompt=question",
                "adapter.peft.lora_dropout=0.5",
                "train={max_steps: 4}",
                "output_dir=runs/a=b",
                "model.revision=null",
                "seed=1",
                "seed=2",
            ],
        ).recipe
        assert recipe.train.learning_rate == 1e-3
        assert recipe.train.max_steps == 4
        assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
        expected = DataSource(path="rows.json", limit=5, columns={"prompt": "question"})
        assert recipe.data.train == [expected]
        assert recipe.adapter.peft == {"a": 1, "lora_dropout": 0.5}
        assert recipe.output_dir == "runs/a=b"
        assert recipe.seed == 2

    @pytest.mark.parametrize(
        ("override", "hint"),
        [
            ("data.train.limit=1", "write `data.train[0].limit`"),
            ("data.train.0.limit=1", "write `data.train[0].limit`"),
            ("data.train.columns.prompt=q", "write `data.train[0].columns.prompt`"),
        ],
    )
    def test_an_entry_of_a_list_is_named_in_the_hint(self, write, faults_of, override, hint):
        (fault,) = faults_of(write("", sound=True), override)
        assert fault.hint == hint

    @pytest.mark.parametrize(
        ("override", "key", "message"),
        [
            ("train.learning_rate", None, "is not key=value"),
            ("=5", None, "is not key=value"),
            ("a..b=5", None, "is not key=value"),
            ("train.learning_rate=", "train.learning_rate", "got nothing (null)"),
            ("train.learning_rate=fast", "train.learning_rate", "got the text 'fast'"),
            ("train.learning_rte=1", "train.learning_rte", "unknown key"),
            ("train.optim.name=sgd", "train.optim.name", "has no keys"),
            ("seed[0]=1", "seed[0]", "is not a list"),
            ("data.train.limit=1", "data.train.limit", "is a list: an entry is needed"),
            ("data.train[1].limit=1", "data.train[1]", "has no entry 1: it has 1"),
            ("data.validation[0].limit=1", "data.validation[0]", "it has 0"),
            ("data.train[0].limt=1", "data.train[0].limt", "unknown key"),
            ("extends=quickstart", "extends", "only a file can set"),
            ("seed=[1", None, "not valid YAML"),
            ("output_dir=a\n- b", "output_dir", "more than one value"),
            ("train={max_steps: 1, max_steps: 2}", "train.max_steps", "set twice"),
            ("output_dir=${oc.env:HOME}", "output_dir", "only the recipe's own keys"),
            ("adapter.r=0", "adapter.r", "at least 1; got 0"),
        ],
    )
    def test_fault_names_the_override(self, write, faults_of, override, key, message):
        (fault,) = faults_of(write("", sound=True), override)
        assert fault.file == f"override `{override}`"
        assert fault.key == key
        assert message in fault.message

    def test_what_is_taken_from_another_key_cannot_be_set_in_part(self, write, faults_of):
        path = write("adapter: {type: lora, peft: '${model}'}\n", sound=True)
        (fault,) = faults_of(path, "adapter.peft.bias=all")
        assert (fault.key, fault.file) == ("adapter.peft", "override `adapter.peft.bias=all`")
        assert "has no keys" in fault.message

    def test_entry_of_a_faulty_list_is_not_also_called_missing(self, write, faults_of):
        path = write("model: {name_or_path: a}\ndata: {train: x.json}\n")
        assert [fault.key for fault in faults_of(path, "data.train[0].limit=5")] == ["data.train"]


class TestAliases:
    @pytest.mark.parametrize(("spelling", "key"), ALIASES.items())
    def test_foreign_spelling_is_read_and_announced(self, write, spelling, key):
        values = {"adapter.target_modules": "[q_proj]", "adapter.dropout": "0.5"}
        values |= {"model.dtype": "float32", "train.optim": "sgd", "adapter.r": "3"}
        values |= {"train.lr_scheduler_type": "cosine", "model.name_or_path": "x/y"}
        values |= {"train.learning_rate": "1e-3"}
        value = values.get(key, "abc" if kind_at(parse_key(key)) in (str, str | None) else "4")
        text = f"{spelling}: {value}\n"
        if key != "model.name_or_path":
            text += "model: {name_or_path: some/model}\n"
        foreign = load_recipe(write(text), need_data=False)
        own = load_recipe(
            write("seed: 42\n"),
            ["model.name_or_path=some/model", f"{key}={value}"],
            need_data=False,
        )
        assert foreign.recipe == own.recipe
        assert foreign.notes == (f"`{spelling}` is read as `{key}`",)

    def test_in_sections_and_overrides(self, write):
        path = write("train: {max_seq_length: 64, micro_batch_size: 2}\n", sound=True)
        loaded = load_recipe(path, ["adapter.lora_r=4", "num_epochs=9"])
        assert loaded.recipe.data.max_length == 64
        assert loaded.recipe.train.per_device_train_batch_size == 2
        assert loaded.recipe.adapter.r == 4
        assert loaded.recipe.train.num_train_epochs == 9
        assert loaded.notes == (
            "`train.max_seq_length` is read as `data.max_length`",
            "`train.micro_batch_size` is read as `train.per_device_train_batch_size`",
            "`adapter.lora_r` is read as `adapter.r`",
            "`num_epochs` is read as `train.num_train_epochs`",
        )

    def test_both_spellings_in_one_file_are_a_fault(self, write, faults_of):
        path = write("lora_r: 4\nlora_rank: 4\nadapter: {r: 4}\n", sound=True)
        faults = faults_of(path)
        assert {fault.key for fault in faults} == {"lora_r", "lora_rank"}
        assert all("sets the same key as" in fault.message for fault in faults)

    def test_child_and_override_win_over_another_spelling(self, write):
        write("sequence_len: 128\n", "parent.yaml", sound=True)
        child = write("extends: parent.yaml\ndata: {max_length: 256}\n", "child.yaml")
        assert load_recipe(child).recipe.data.max_length == 256
        assert load_recipe(child, ["cutoff_len=32"]).recipe.data.max_length == 32

    def test_wrong_value_names_the_right_key_at_the_foreign_place(self, write, faults_of):
        path = write("lora_r: big\n", sound=True)
        (fault,) = faults_of(path)
        assert (fault.key, fault.file) == ("adapter.r", f"{path}:5:1")

    def test_out_of_place_spelling_is_pointed_to_its_key(self, write, faults_of):
        (fault,) = faults_of(write("eval: {lora_r: 4}\n", sound=True))
        assert (fault.key, fault.hint) == ("eval.lora_r", "did you mean `adapter.r`?")

    @pytest.mark.parametrize("spelling", POINTERS)
    def test_spelling_of_another_meaning_is_refused_with_the_key_to_use(
        self, write, faults_of, spelling
    ):
        (fault,) = faults_of(write(f"{spelling}: 1\n", sound=True))
        assert (fault.key, fault.hint) == (spelling, f"did you mean `{POINTERS[spelling]}`?")

    def test_every_spelling_leads_to_a_key_and_is_none(self):
        for spelling, key in (ALIASES | POINTERS).items():
            assert kind_at(parse_key(key)) is not None
            assert kind_at((spelling,)) is None


class TestInterpolation:
    def test_own_keys_are_resolved(self, write):
        path = write(
            "seed: 3\noutput_dir: runs/${task}-${seed}\n"
            "train: {save_steps: '${train.eval_steps}', eval_steps: 0}\n"
            "eval: {tasks: ['${model.dtype}'], data_dir: '${output_dir}/x'}\n",
            sound=True,
        )
        recipe = load_recipe(path, ["seed=4"]).recipe
        assert recipe.output_dir == "runs/causal_lm-4"
        assert recipe.train.save_steps == 0.0
        assert recipe.eval == EvalSection(tasks=["auto"], data_dir="runs/causal_lm-4/x")

    def test_default_output_dir_can_be_referred_to(self, write):
        path = write("eval: {data_dir: '${output_dir}/d'}\n", "mine.yaml", sound=True)
        assert load_recipe(path).recipe.eval.data_dir == "runs/mine/d"

    @pytest.mark.parametrize(
        "value",
        [
            "${oc.env:WEGEFT_TEST_SECRET}",
            "a ${oc.env:WEGEFT_TEST_SECRET,none} b",
            "${oc.decode:${oc.env:WEGEFT_TEST_SECRET}}",
            "${oc.${task}:WEGEFT_TEST_SECRET}",
            "\\\\\\\\${oc.env:WEGEFT_TEST_SECRET}",
            "${oc.coerce:os.path,1}",
            "${",
        ],
    )
    def test_resolvers_are_refused(self, write, faults_of, monkeypatch, value):
        monkeypatch.setenv("WEGEFT_TEST_SECRET", "hidden")
        for text in (f'output_dir: "{value}"\n', f'adapter: {{target_modules: ["{value}"]}}\n'):
            (fault,) = faults_of(write(text, sound=True))
            assert "only the recipe's own keys" in fault.message
            assert "hidden" not in str(fault)

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("output_dir: ${nope}", "not found"),
            ("output_dir: ${output_dir}", "Recursive"),
            ("seed: ${model.dtype}", "could not be converted"),
            ("seed: ${train.compile}", "could not be converted"),
            ("eval: {tasks: ['${train.nope}', b]}", "not found"),
        ],
    )
    def test_what_cannot_be_resolved_is_told_with_the_rules(self, write, faults_of, line, reason):
        path = write(line + "\n", sound=True)
        faults = faults_of(path, "adapter.r=0")
        assert [fault.key for fault in faults][1:] == ["adapter.r"]
        assert reason in faults[0].message
        assert (faults[0].file or "").startswith(f"{path}:5:")

    def test_escaped_stays_as_it_is(self, write):
        path = write("output_dir: 'runs/\\${seed}'\n", sound=True)
        assert load_recipe(path).recipe.output_dir == "runs/${seed}"


def test_merge_keys_of_yaml_work(write, faults_of):
    path = write(
        "model: {name_or_path: a}\n"
        "data:\n  train:\n    - &first {path: x, limit: 3}\n    - {<<: *first, path: y}\n"
    )
    assert load_recipe(path).recipe.data.train == [
        DataSource(path="x", limit=3),
        DataSource(path="y", limit=3),
    ]
    path.write_text(path.read_text().replace("limit", "limt"))
    assert [fault.key for fault in faults_of(path)] == ["data.train[0].limt", "data.train[1].limt"]


def test_alias_bomb_ends_quickly(write, faults_of):
    names = [f"a{i}" for i in range(12)]
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for old, new in itertools.pairwise(names):
        lines.append(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]")
    (fault,) = faults_of(write("\n".join(lines)))
    assert "not valid YAML" in fault.message


FULL = Recipe(
    seed=1,
    output_dir="runs/ä b: #1",
    model=ModelSection(name_or_path="5", revision="1e5", attn_implementation="no"),
    adapter=AdapterSection(
        type="lora",
        alpha=0.1,
        target_modules=r".*\.(q|v)_proj$",
        peft={"lora_dropout": 0.05, "rank_pattern": {"a.b": 4}, "flags": [True, None, "null"]},
    ),
    data=DataSection(
        train=[DataSource(path="2020-01-01", name="~", columns={"prompt": "1:30"}, limit=2)],
        template="a\nb",
    ),
    train=TrainSection(learning_rate=1e-5, adam_epsilon=1e-12, save_total_limit=None),
    eval=EvalSection(tasks=["gsm8k", "true"], data_dir=""),
)
GROUPED = Recipe(
    output_dir=r"\\${seed} \${x} ${model.dtype} ${ \n",
    model=ModelSection(name_or_path="a"),
    adapter=AdapterSection(groups={"early": [r"layers\.[0-9]\..*"]}),
    data=DataSection(train=[DataSource(path="x")]),
)


@pytest.mark.parametrize("recipe", [FULL, GROUPED], ids=["odd-texts", "braces"])
def test_written_recipe_loads_back_equal(tmp_path: Path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert path.read_text(encoding="utf-8").startswith("# Resolved by wegeft-cli ")
    assert load_recipe(path).recipe == recipe
    # Once more from the loaded one: nothing is escaped twice.
    assert recipe_to_yaml(load_recipe(path).recipe) == recipe_to_yaml(recipe)


def test_byte_order_mark_is_no_fault(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: {name_or_path: a}\n")
    assert load_recipe(path, need_data=False).recipe.model.name_or_path == "a"


def test_loading_a_recipe_loads_no_heavy_package():
    code = (
        "import sys; from wegeft_cli.recipe.load import load_recipe; load_recipe('quickstart');"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_valid_value_that_is_probably_a_mistake_is_noted(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(
        "model: {name_or_path: base}\n"
        "data: {train: [{path: rows.jsonl}]}\n"
        "train: {learning_rate: 1e4}\n"
        f"logging: {{run_name: first-hf_{'a1' * 17}, sample_prompts: [fine, sk-{'b2' * 16}]}}\n"
    )
    notes = load_recipe(path).notes
    assert [note.split()[0] for note in notes] == [
        "train.learning_rate",
        "logging.run_name",
        "logging.sample_prompts[1]",
    ]
    assert "10000" in notes[0]
    assert not any("hf_a1" in note or "sk-b2" in note for note in notes)
    usual = ["train.learning_rate=1.0", "logging.run_name=first", "logging.sample_prompts=[sky]"]
    assert load_recipe(path, usual).notes == ()
