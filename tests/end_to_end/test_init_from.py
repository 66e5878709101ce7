"""A run that starts where an earlier adapter ended, or is told why it cannot."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from wegeft_cli.errors import UserError
from wegeft_cli.methods.init_from import init_from_adapter
from wegeft_cli.methods.layers.owner import get_generators
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import load_adapter
from wegeft_cli.models.loading import load_model
from wegeft_cli.planning.plan import plan
from wegeft_cli.planning.validate import validate_recipe
from wegeft_cli.recipe.schema import AdapterSection
from wegeft_cli.runs.train import train

WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj", "down_proj"]
# So small a rate that one step leaves every float32 factor where it was, to this much.
STILL, STANDS_STILL = 1e-12, 1e-10


@pytest.fixture(scope="module")
def first(write_recipe_in, tmp_path_factory):
    """A finished run with a module trained whole. Only to be read."""
    folder = tmp_path_factory.mktemp("first")
    return train(write_recipe_in(folder, "first", adapter={"modules_to_save": ["lm_head"]}))


@pytest.fixture(scope="module")
def lora(write_recipe_in, tmp_path_factory):
    """The same of a LoRA baseline. Only to be read."""
    settings = {"type": "lora", "modules_to_save": ["lm_head"]}
    return train(write_recipe_in(tmp_path_factory.mktemp("lora"), adapter=settings))


def write_second(write_recipe, first, **adapter):
    settings = {"modules_to_save": ["lm_head"], "init_from": str(first.run_dir), **adapter}
    sections = {"train": {"learning_rate": STILL, "max_steps": 1}}
    return write_recipe("second", adapter=settings, **sections)


def test_the_first_step_begins_where_the_adapter_ended(
    write_recipe, first, llama_dir, ids, read_run
):
    result = train(write_second(write_recipe, first))
    before, after = (load_file(r.adapter_dir / WEIGHTS) for r in (first, result))
    assert before.keys() == after.keys()
    assert len(before) == 2 * len(TARGETS) + 1
    for name, tensor in before.items():
        assert (after[name] - tensor).abs().max() < STANDS_STILL, name
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert config["init_from"] == str(first.run_dir)
    assert read_run(result.run_dir)["init_from"] == str(first.run_dir)
    assert "init_from" not in json.loads((first.adapter_dir / "adapter_config.json").read_text())


def test_every_factor_is_the_adapters_to_the_bit(first, llama_dir, ids):
    section = AdapterSection(r=4, target_modules=TARGETS, modules_to_save=["lm_head"])
    fresh = load_model(str(llama_dir))
    settings = {"rank": 4, "target_modules": TARGETS, "modules_to_save": ["lm_head"]}
    generators = inject_generators(fresh, **settings)
    told = []
    init_from_adapter(fresh, first.adapter_dir, section, warn=told.append)
    assert len(told) == 1  # nothing says which base this is
    loaded = load_model(str(llama_dir))
    load_adapter(loaded, first.adapter_dir)
    assert torch.equal(fresh(ids).logits, loaded(ids).logits)
    pairs = list(zip(generators.parameters(), get_generators(loaded).parameters(), strict=True))
    assert len(pairs) == 2 * len(TARGETS) + 1
    assert all(torch.equal(a, b) and a.requires_grad for a, b in pairs)


def test_the_scale_of_a_rule_is_compared(write_recipe, first):
    recipe = write_second(write_recipe, first, scale_rule="rank_width")
    with pytest.raises(UserError, match=r"in the adapter of adapter\.init_from 8\.0"):
        plan(recipe)


def test_training_on_learns_from_there(write_recipe, first, read_metrics):
    """The loss of the first step is that of the earlier run's end, not of its start."""
    lines = read_metrics(first.run_dir)
    sections = {"adapter": {"modules_to_save": ["lm_head"]}, "train": {"learning_rate": 0.01}}
    fresh = train(write_recipe("fresh", **sections))
    sections["adapter"]["init_from"] = str(first.adapter_dir)
    onward = train(write_recipe("onward", **sections))
    starts = [read_metrics(r.run_dir)[0]["loss"] for r in (fresh, onward)]
    assert starts[0] == lines[0]["loss"]
    assert starts[1] < starts[0]


def test_it_is_found_beside_the_recipe_too(write_recipe, first, monkeypatch, tmp_path):
    beside = tmp_path / "earlier"
    shutil.copytree(first.adapter_dir, beside)
    recipe = write_second(write_recipe, first, init_from="earlier")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (found,) = [i for i in validate_recipe(recipe).inputs if i.key == "adapter.init_from"]
    assert found.found
    result = train(recipe)
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert config["init_from"] == str(beside)
    # The run's own recipe repeats it from anywhere.
    again = train(result.run_dir / "recipe.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert (again.adapter_dir / WEIGHTS).read_bytes() == (result.adapter_dir / WEIGHTS).read_bytes()


def test_a_resumed_run_needs_it_no_more(write_recipe, first, stop_after, read_adapter, tmp_path):
    earlier = tmp_path / "earlier"
    shutil.copytree(first.adapter_dir, earlier)
    shared = {"modules_to_save": ["lm_head"], "init_from": str(earlier)}
    whole = train(write_recipe("whole", adapter=shared))
    recipe = write_recipe("parts", adapter=shared)
    assert train(recipe, should_stop=stop_after(3)).status == "interrupted"
    shutil.rmtree(earlier)
    parts = train(recipe, resume="auto")
    assert read_adapter(parts.run_dir) == read_adapter(whole.run_dir)


def faults_of(recipe, **options):
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        train(recipe, **options)
    error = caught.value
    return list(error.exceptions) if isinstance(error, ExceptionGroup) else [error]


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ({"r": 8, "alpha": 8}, "adapter.r", "is 8, in the adapter of adapter.init_from 4"),
        ({"alpha": 3}, "adapter.alpha", r"is 3.0, in the adapter of adapter.init_from 8.0"),
        ({"side": "output", "target_modules": ["q_proj"]}, "adapter.side", "'output'"),
        ({"target_modules": ["q_proj"]}, "adapter.target_modules", "q_proj, the adapter"),
        ({"share": "none"}, "adapter.target_modules", "and 3 more"),
        (
            {"target_modules": ".*(layers[.]0[.].*v|q|down)_proj"},
            "adapter.target_modules",
            "'v_proj' adapts none here alone, and model.layers.1.self_attn.v_proj",
        ),
        ({"modules_to_save": []}, "adapter.modules_to_save", "names none, .* holds lm_head"),
        ({"modules_to_save": ["norm"]}, "adapter.modules_to_save", "names model.norm"),
        ({"init_from": "runs/nothing"}, "adapter.init_from", "no such path"),
        ({"type": "lora"}, "adapter.init_from", "is a WEGEFT adapter"),
    ],
)
def test_what_differs_is_told_before_the_weights(write_recipe, first, change, key, words):
    recipe = write_second(write_recipe, first, **change)
    faults = faults_of(recipe, dry_run=True)
    told = {fault.key: fault for fault in faults}
    assert key in told
    assert re.search(words, told[key].message), told[key].message
    assert not (recipe.parent / "runs" / "second").exists()


def test_all_differences_come_at_once(write_recipe, first):
    faults = faults_of(write_second(write_recipe, first, r=2, modules_to_save=[]), dry_run=True)
    # The alpha that follows from the rank is not told besides.
    assert {fault.key for fault in faults} == {"adapter.r", "adapter.modules_to_save"}
    assert all("second.yaml" in fault.file for fault in faults)


def test_another_base_is_refused(write_recipe, first, build_llama_dir):
    recipe = write_second(write_recipe, first)
    other = build_llama_dir(seed=1)
    with pytest.raises(
        UserError, match="is not the one that this adapter was trained on"
    ) as caught:
        train(recipe, [f"model.name_or_path={other}"], dry_run=True)
    assert caught.value.key == "base_fingerprint"
    wide = build_llama_dir(hidden_size=64)
    faults = faults_of(recipe, overrides=[f"model.name_or_path={wide}"], dry_run=True)
    assert any("64 wide" in fault.message for fault in faults)


def test_what_is_free_may_differ(write_recipe, first):
    free = {"dropout": 0.1, "view": "weight", "init": "psi_zero", "alpha": 8}
    assert train(write_second(write_recipe, first, **free), dry_run=True).status == "checked"
    groups = {name: [name] for name in TARGETS}
    recipe = write_second(write_recipe, first, groups=groups)
    assert train(recipe).status == "finished"


class TestLora:
    def second(self, write_recipe, lora, **change):
        settings = {"type": "lora", "peft": {"lora_dropout": 0.1}, **change}
        return write_second(write_recipe, lora, **settings)

    def test_begins_where_the_adapter_ended(self, write_recipe, lora):
        result = train(self.second(write_recipe, lora))
        before, after = (load_file(r.adapter_dir / WEIGHTS) for r in (lora, result))
        assert before.keys() == after.keys()
        assert len(before) == 2 * 6 + 1
        for name, tensor in before.items():
            assert (after[name] - tensor).abs().max() < STANDS_STILL, name

    @pytest.mark.parametrize(
        ("change", "key"),
        [
            ({"r": 2, "alpha": 8}, "adapter.r"),
            ({"alpha": 3}, "adapter.alpha"),
            ({"type": "rslora"}, "adapter.peft.use_rslora"),
            ({"type": "ia3", "peft": {"feedforward_modules": ["down_proj"]}}, "adapter.init_from"),
            ({"type": "wegeft", "peft": {}}, "adapter.init_from"),
        ],
    )
    def test_what_differs_is_told_before_the_weights(self, write_recipe, lora, change, key):
        faults = faults_of(self.second(write_recipe, lora, **change), dry_run=True)
        assert key in {fault.key for fault in faults}

    @pytest.mark.parametrize(
        "change", [{"target_modules": ["q_proj"]}, {"modules_to_save": ["norm"]}]
    )
    def test_other_layers_are_told(self, write_recipe, lora, change):
        (fault,) = faults_of(self.second(write_recipe, lora, **change))
        assert fault.key == "adapter.init_from"
        assert "tensors differ" in fault.message
