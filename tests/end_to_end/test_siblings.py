"""RED, SSF, 1LoRA, tied LoRA and LoReFT from the recipe to the merged base."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from wegeft_cli.analysis.inspect import inspect
from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import UserError
from wegeft_cli.exporting.export import export
from wegeft_cli.inference.generate import generate
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.registry import load_onto
from wegeft_cli.planning.plan import plan
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import SIBLING_TYPES, ModelSection
from wegeft_cli.runs.train import train

FLOAT32 = 1e-5
FAST = ("tied_lora", "loreft")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in SIBLING_TYPES
    ],
)
def test_a_run_is_resumed_loaded_and_merged(
    write_recipe, stop_after, read_adapter, read_metrics, llama_dir, ids, name
):
    own = [f"adapter.type={name}"]
    settings = {"train": {"num_train_epochs": 1}, "adapter": {"modules_to_save": ["norm"]}}
    planned = plan(write_recipe("whole", **settings), own)
    result = train(write_recipe("whole", **settings), own)
    assert planned.trainable_parameters == result.trainable_parameters
    recipe = write_recipe("parts", **settings)
    assert train(recipe, own, should_stop=stop_after(1)).status == "interrupted"
    parts = train(recipe, own, resume="auto").run_dir
    assert read_adapter(parts) == read_adapter(result.run_dir)
    assert read_metrics(parts) == read_metrics(result.run_dir)

    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert (config["peft_type"], config["method"]) == ("WEGEFT_AFFINE", name)
    assert "wegeft merge" in (result.adapter_dir / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    section = ModelSection(name_or_path=str(llama_dir))
    with torch.no_grad():
        plain = base(ids).logits
        adapted = load_onto(base, Adapter.open(result.adapter_dir), section).eval()(ids).logits
        merged_dir = merge(result.run_dir).output_dir
        merged = AutoModelForCausalLM.from_pretrained(merged_dir)(ids).logits
    assert (adapted - plain).abs().max() > 100 * FLOAT32
    torch.testing.assert_close(merged, adapted, rtol=FLOAT32, atol=FLOAT32)
    (row,) = generate(result.run_dir, prompts=["ab"], max_new_tokens=2)["results"]
    assert isinstance(row["output"], str)
    for ask in (lambda: export(result.run_dir, format="lora"), lambda: inspect(result.run_dir)):
        with pytest.raises(UserError, match=r"affine edits .*; only "):
            ask()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"type": "red", "r": 4}, "adapter.r"),
        ({"type": "loreft", "alpha": 4}, "adapter.alpha"),
        ({"type": "1lora", "r": 64, "peft": {"bias": "all"}}, "adapter.peft"),
        ({"type": "tied_lora", "share": "none"}, "adapter.share"),
        ({"type": "ssf", "r": 64, "init_from": "runs/x"}, "adapter.init_from"),
    ],
)
def test_a_key_that_an_edit_does_not_read_is_told(write_recipe, settings, key):
    with pytest.raises(UserError) as caught:
        load_recipe(write_recipe(adapter=settings))
    assert caught.value.key == key


def test_a_damaged_record_names_the_key(write_recipe):
    result = train(write_recipe(train={"max_steps": 1}), ["adapter.type=1lora"])
    path = result.adapter_dir / "adapter_config.json"
    values = json.loads(path.read_text())
    for key, value, message in (
        ("method", "2lora", "must be one of red"),
        ("r", 0, "a whole number"),
        ("target_modules", [], "a list of names"),
    ):
        path.write_text(json.dumps({**values, key: value}))
        with pytest.raises(UserError, match=message) as caught:
            merge(result.run_dir)
        assert caught.value.key == key
