"""Families with inputs of their own work, or are refused before the run with one message."""

from __future__ import annotations

import pytest
import torch
from classifiers import EDGE, write_images, write_processor, write_recipe, write_texts
from families.checkpoints import build_config
from transformers import AutoModelForImageClassification, FunnelConfig, FunnelModel
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from wegeft_cli.errors import UserError
from wegeft_cli.models.heads import image_inputs
from wegeft_cli.planning.plan import plan
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.runs.train import train
from wegeft_cli.tasks.registry import inject_adapter

SPLITS = {"train": {"a": 2, "b": 2}, "validation": {"a": 1, "b": 1}}


@pytest.fixture
def image_recipe(tmp_path):
    def write(family, edge):
        torch.manual_seed(0)
        base = tmp_path / family
        AutoModelForImageClassification.from_config(build_config(family)).save_pretrained(base)
        write_processor(base, edge=edge)
        images = write_images(tmp_path / "images", SPLITS)
        return write_recipe(
            tmp_path,
            model={"name_or_path": str(base)},
            adapter={"target_modules": "all-linear"},
            data={part: [{"path": str(images), "split": part}] for part in SPLITS},
        )

    return write


def test_siglip2_reads_patches(image_recipe):
    config = build_config("siglip2")
    patch = config.vision_config.patch_size
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    pixels = torch.randn(2, 3, 2 * patch, 2 * patch)
    inputs = image_inputs(model, pixels)
    for image, rows in zip(pixels, inputs["pixel_values"], strict=True):
        assert torch.equal(rows, torch.as_tensor(convert_image_to_patches(image.numpy(), patch)))
    assert inputs["spatial_shapes"].tolist() == [[2, 2], [2, 2]]
    with pytest.raises(UserError, match="no whole number of patches"):
        image_inputs(model, torch.zeros(1, 3, patch + 1, patch + 1))
    result = train(image_recipe("siglip2", 2 * patch), ["train.max_steps=1"])
    assert result.status == "finished"


def test_pvt_gets_the_classes_of_the_rows(image_recipe):
    recipe = image_recipe("pvt", 64)
    assert train(recipe, ["train.max_steps=1"]).status == "finished"


def test_imagegpt_is_refused(image_recipe):
    with pytest.raises(UserError, match="ImageGPTForImageClassification reads no pixels"):
        plan(image_recipe("imagegpt", EDGE))


def test_gradients_of_cvt_do_not_depend_on_the_batch(image_recipe):
    recipe = load_recipe(image_recipe("cvt", 32)).recipe
    model = AutoModelForImageClassification.from_pretrained(recipe.model.name_or_path).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    model = inject_adapter(model, recipe).double().train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            model(pixel_values=batch).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(pixels.split(1)), gradients([pixels]))


@pytest.fixture
def funnel_recipe(tmp_path, build_tokenizer):
    tokenizer = build_tokenizer(pad="<pad>")
    config = FunnelConfig(
        vocab_size=len(tokenizer), block_sizes=[1, 1, 1], d_model=32, n_head=2, d_head=16,
        d_inner=48, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    FunnelModel(config).save_pretrained(tmp_path / "funnel")
    tokenizer.save_pretrained(tmp_path / "funnel")

    def write(texts):
        rows = [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(texts)]
        path = write_texts(tmp_path / "rows.jsonl", rows)
        return write_recipe(
            tmp_path,
            task="sequence_classification",
            model={"name_or_path": str(tmp_path / "funnel")},
            adapter={"target_modules": ["q_head"]},
            data={"train": [{"path": str(path)}], "max_length": 64},
        )

    return write


def test_rows_too_short_for_funnel_are_refused(funnel_recipe):
    with pytest.raises(UserError, match=r"3 tokens is too short .* reads 5 or more") as caught:
        plan(funnel_recipe(["ab", "the correct answer is true"]))
    assert caught.value.key == "data.train"
    texts = ["the correct answer is true", "the correct answer is false false"]
    assert train(funnel_recipe(texts), ["train.max_steps=1"]).status == "finished"
