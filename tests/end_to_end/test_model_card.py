"""Model cards state what was trained and how to use it, with metadata that the hub accepts."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from wegeft_cli.publishing.model_card import write_card
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.training.loop_settings import LoopResult

LORA_USE = 'model = PeftModel.from_pretrained(model, "THIS_FOLDER")'


def make_recipe(adapter_type="wegeft", task="causal_lm"):
    recipe = Recipe()
    model = replace(recipe.model, name_or_path="org/base")
    adapter = replace(recipe.adapter, type=adapter_type, modules_to_save=["lm_head"])
    return replace(recipe, model=model, adapter=adapter, task=task, output_dir="runs/mine/")


@pytest.mark.parametrize(
    ("adapter_type", "task", "library", "pipeline", "lines"),
    [
        ("wegeft", "causal_lm", "wegeft-cli", "text-generation",
         ['load_adapter(model, "THIS_FOLDER")', LORA_USE, "wegeft merge THIS_FOLDER"]),
        ("lora", "causal_lm", "peft", "text-generation", [LORA_USE]),
        ("full", "causal_lm", "wegeft-cli", "text-generation", ["wegeft merge THIS_FOLDER"]),
        ("lora", "image_classification", "wegeft-cli", "image-classification",
         ["from transformers import AutoModelForImageClassification"]),
    ],
)  # fmt: skip
def test_the_card_fits_method_and_task(adapter_type, task, library, pipeline, lines):
    card = write_card(
        make_recipe(adapter_type, task),
        LoopResult("finished", 10, 0.5, {8: {"eval_loss": 0.25}, 10: {"eval_loss": 0.75}}),
        adapter_step=8,
        parameters=(1000, 50000),
    )
    data = ModelCard(card).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "org/base",
        library,
        pipeline,
    )
    assert data.tags == ["wegeft", "peft"]
    for line in [
        *lines,
        "# mine",
        "10 optimizer steps, final training loss 0.5000. The adapter is that of step 8",
        "`lm_head`",
        "1,000 (2.000% of the base's 50,000)",
        "| eval_loss | 0.2500 |",
        "```yaml\n# Resolved by wegeft-cli",
    ]:
        assert line in card
    assert ("arXiv 2312.00700" in card) == (adapter_type == "wegeft")
    assert "\n\n\n" not in card
