"""BatchNorm's statistics: those of a frozen base stay, those that training moves are saved."""

import json

import pytest
import torch
from classifiers import write_images, write_processor, write_recipe
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification

from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.merging.merge import merge
from wegeft_cli.models.running_statistics import hold_statistics, trained_statistics
from wegeft_cli.runs.train import train

LABELS = ("dark", "grey", "light")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A ResNet whose statistics are far from those of the images."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        downsample_in_first_stage=False,
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    write_processor(folder)
    return folder


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    counts = dict.fromkeys(LABELS, 4)
    splits = {"train": counts, "validation": counts, "test": counts}
    return write_images(tmp_path_factory.mktemp("images"), splits)


@pytest.fixture
def recipe(tmp_path, base_dir, images_dir):
    def write(name="tiny", **sections):
        parts = ("train", "validation", "test")
        data = {part: [{"path": str(images_dir), "split": part}] for part in parts}
        return write_recipe(
            tmp_path,
            name,
            model={"name_or_path": str(base_dir)},
            data={**data, "image_transform": "resize", "image_size": 8},
            **sections,
        )

    return write


def read_statistics(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "running_" in name}


def last_validation(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


@pytest.mark.parametrize("method", ["linear_probe", "full"])
def test_a_run_and_its_saved_model_score_alike(recipe, base_dir, method):
    result = train(recipe(), [f"adapter.type={method}", "train.num_train_epochs=4"])
    seen = last_validation(result.run_dir)
    found = evaluate(result.run_dir, tasks=["validation"])
    (score,) = found["results"]
    assert score["score"] == seen["eval_accuracy"]
    assert score["metrics"]["f1_macro"] == pytest.approx(seen["eval_f1_macro"])
    merged = merge(result.run_dir).output_dir
    base, after = read_statistics(base_dir), read_statistics(merged)
    moved = [name for name in base if not torch.equal(base[name], after[name])]
    assert bool(moved) == (method == "full")


def test_statistics_of_a_frozen_base_stay_in_training(base_dir):
    model = ResNetForImageClassification.from_pretrained(base_dir)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    hold_statistics(model)
    model.train()
    pixels = torch.randn(4, 3, 8, 8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    in_training = model(pixel_values=pixels).logits
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    with torch.no_grad():
        assert torch.equal(in_training, model.eval()(pixel_values=pixels).logits)
    assert trained_statistics(model) == {}


def test_a_resumed_full_run_is_the_one_that_was_never_stopped(recipe):
    class StopAfter:
        left = 3

        def __call__(self):
            self.left -= 1
            return self.left == 0

    options = ["adapter.type=full", "train.num_train_epochs=3"]
    whole = train(recipe("whole"), options)
    assert train(recipe("cut"), options, should_stop=StopAfter()).status == "interrupted"
    resumed = train(recipe("cut"), options, resume="auto")
    one, two = (
        load_file(run.adapter_dir / "adapter_model.safetensors") for run in (whole, resumed)
    )
    assert any("running_mean" in name for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_best_step_has_its_own_statistics(recipe):
    """The best step is not the last one here: the rate grows until the model is of no use."""
    options = [
        "adapter.type=full",
        "train.num_train_epochs=6",
        "train.eval_steps=3",
        "train.save_steps=3",
        "train.load_best_model_at_end=true",
        "train.learning_rate=30",
        "train.warmup_ratio=0.95",
    ]
    result = train(recipe(), options)
    record = json.loads((result.run_dir / "run.json").read_text())
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    by_step = {line["step"]: line for line in map(json.loads, lines) if "eval_loss" in line}
    best = by_step[record["adapter_step"]]
    assert record["adapter_step"] < max(by_step)
    (score,) = evaluate(result.run_dir, tasks=["validation"])["results"]
    assert score["metrics"]["f1_macro"] == pytest.approx(best["eval_f1_macro"])
