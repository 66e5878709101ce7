"""Images become a classifier: train, resume, evaluate, merge, plan, by every method."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from classifiers import VIT_GROUP, write_images, write_processor, write_recipe, write_vit
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    HieraConfig,
    HieraForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from wegeft_cli.analysis.edit import edit
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.exporting.export import export
from wegeft_cli.inference.generate import generate
from wegeft_cli.merging.merge import merge
from wegeft_cli.planning.plan import plan
from wegeft_cli.runs.train import train
from wegeft_cli.training.trainer import Trainer

FLOAT32 = 1e-4
METHODS = ("wegeft", "lora", "adalora", "bitfit", "linear_probe", "full")


@pytest.fixture(scope="session")
def vit_dir(tmp_path_factory) -> Path:
    return write_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def images_dir(tmp_path_factory) -> Path:
    """Classes 9, 10 and 11; the validation split lacks the middle one."""
    splits = {
        "train": {"9": 6, "10": 6, "11": 6},
        "validation": {"9": 2, "11": 4},
        "test": {"9": 3, "10": 3, "11": 3},
    }
    return write_images(tmp_path_factory.mktemp("images"), splits)


@pytest.fixture
def recipe(tmp_path, vit_dir, images_dir):
    def write(name="tiny", **sections):
        data = {
            part: [{"path": str(images_dir), "split": part}]
            for part in ("train", "validation", "test")
        }
        sections["data"] = {**data, "image_transform": "resize", **sections.get("data", {})}
        sections["model"] = {"name_or_path": str(vit_dir), **sections.get("model", {})}
        return write_recipe(tmp_path, name, **sections)

    return write


@pytest.mark.parametrize(
    "method",
    [METHODS[0], *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:])],
)
def test_train_evaluate_and_merge_agree(recipe, method, images_dir, vit_dir):
    result = train(recipe(), [f"adapter.type={method}"])
    planned = plan(recipe("planned"), [f"adapter.type={method}"])
    assert planned.trainable_parameters == result.trainable_parameters
    assert planned.flops_per_step > 0
    assert planned.memory_gib["total"] is not None
    found = evaluate(result.run_dir)
    (score,) = found["results"]
    assert (score["task"], score["n"], score["metric"]) == ("test", 9, "accuracy")
    merged = merge(result.run_dir).output_dir
    (after,) = evaluate(merged, data_dir=images_dir)["results"]
    assert (after["score"], after["per_class"]) == (score["score"], score["per_class"])
    model = AutoModelForImageClassification.from_pretrained(merged)
    assert model.config.id2label == {0: "9", 1: "10", 2: "11"}
    # The folder is enough by itself, without the run.
    lines = [json.loads(line) for line in Path(found["samples_path"]).read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["10"] * 3 + ["11"] * 3 + ["9"] * 3
    assert sum(line["correct"] for line in lines) == score["num_correct"]
    base = load_file(vit_dir / "model.safetensors")
    changed = [
        name
        for name, tensor in load_file(merged / "model.safetensors").items()
        if not name.startswith("classifier") and not torch.equal(tensor, base[name])
    ]
    assert bool(changed) == (method != "linear_probe")
    if method == "bitfit":
        assert all(name.endswith("bias") for name in changed)


def test_it_learns_and_a_class_missing_in_validation_shifts_nothing(recipe):
    result = train(recipe(), ["train.num_train_epochs=20"])
    validation = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert validation["eval_accuracy"] == 1.0
    (score,) = evaluate(result.run_dir, tasks=["validation"])["results"]
    assert score["score"] == 1.0
    assert [(each["label"], each["n"]) for each in score["per_class"]] == [
        ("9", 2),
        ("10", 0),
        ("11", 4),
    ]


def test_resumed_is_the_run_that_was_never_stopped(recipe, read_metrics, read_adapter, stop_after):
    options = ["data.image_transform=crop_flip", "model.drop_path_rate=0.3", "data.image_size=8"]
    whole = train(recipe("whole"), options)
    stopped = train(recipe("cut"), options, should_stop=stop_after(7))
    assert stopped.status == "interrupted"
    resumed = train(recipe("cut"), options, resume="auto")
    assert resumed.status == "finished"
    assert read_adapter(resumed.run_dir) == read_adapter(whole.run_dir)
    assert read_metrics(resumed.run_dir) == read_metrics(whole.run_dir)


def test_the_adapter_holds_pair_head_and_classes_alone(recipe, vit_dir):
    adapter_dir = train(recipe()).adapter_dir
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        f"base_model.wegeft_phi_{VIT_GROUP}": [32, 4],
        f"base_model.wegeft_psi_{VIT_GROUP}": [4, 32],
        "base_model.model.classifier.weight": [3, 32],
        "base_model.model.classifier.bias": [3],
    }
    head = json.loads((adapter_dir / "head.json").read_text())
    assert head["labels"] == ["9", "10", "11"]
    # The base's head is as wide, but tells other classes apart: it is no start.
    old = load_file(vit_dir / "model.safetensors")["classifier.weight"]
    assert (tensors["base_model.model.classifier.weight"] - old).abs().max() > 0.1


def test_step_0_is_the_base_with_a_head_that_hangs_on_the_seed(recipe):
    still = ["train.learning_rate=1e-30", "train.max_steps=1"]
    heads = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        adapter_dir = train(recipe(name), [*still, f"seed={seed}"]).adapter_dir
        tensors = load_file(adapter_dir / "adapter_model.safetensors")
        heads.append(tensors["base_model.model.classifier.weight"])
        assert not tensors[f"base_model.wegeft_psi_{VIT_GROUP}"].abs().max() > 1e-20
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_base_that_knows_the_classes_keeps_its_head_and_can_be_compared(
    recipe, tmp_path, listener
):
    names = {0: "11", 1: "9", 2: "10"}
    base = write_vit(
        tmp_path / "knows", id2label=names, label2id={name: i for i, name in names.items()}
    )
    still = [f"model.name_or_path={base}", "train.learning_rate=1e-30", "train.max_steps=1"]
    result = train(recipe(), still, reporter=listener)
    assert any("the base's head" in note for note in listener.notes)
    found = evaluate(result.run_dir, compare_base=True)
    assert found["results"][0]["per_class"] == found["base_results"][0]["per_class"]
    assert [each["label"] for each in found["results"][0]["per_class"]] == ["11", "9", "10"]


def test_compare_base_is_refused_where_the_base_knows_other_classes(recipe):
    run_dir = train(recipe(), ["train.max_steps=1"]).run_dir
    with pytest.raises(UserError, match="no head for these classes"):
        evaluate(run_dir, compare_base=True)


def test_a_class_that_was_never_numbered_is_refused_when_scored(recipe, tmp_path):
    run_dir = train(recipe(), ["train.max_steps=1"]).run_dir
    other = write_images(tmp_path / "other", {"test": {"9": 1, "12": 1}})
    with pytest.raises(UserError, match="the class '12' is none of the 3"):
        evaluate(run_dir, data_dir=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["boolq"]}, "'boolq' is no split of a classifier"),
        ({"protocol": "wegeft"}, "is for language models"),
        ({"data_dir": Path("nowhere")}, "no such folder"),
    ],
)
def test_bad_ways_to_ask(recipe, options, message):
    run_dir = train(recipe(), ["train.max_steps=1"]).run_dir
    with pytest.raises(UserError, match=message):
        evaluate(run_dir, **options)


@pytest.mark.parametrize("split", ["last", "random"])
def test_held_out_rows_are_of_every_class(recipe, split):
    path = recipe(data={"validation": [], "validation_fraction": 0.34, "validation_split": split})
    run = json.loads((train(path, ["train.max_steps=1"]).run_dir / "run.json").read_text())
    assert run["data"]["num_validation_rows"] == 6
    assert run["data"]["rows_per_class"] == [4, 4, 4]


def test_validation_loss_of_each_source(recipe, images_dir):
    """Rows of both sources count once in the metrics, and each source has its loss."""
    sources = [{"path": str(images_dir), "split": part} for part in ("validation", "test")]
    path = recipe(data={"validation": sources})
    run = json.loads((train(path, ["train.max_steps=1"]).run_dir / "run.json").read_text())
    metrics = run["validation"]["1"]
    name = images_dir.name
    losses = metrics[f"eval_loss_{name}"], metrics[f"eval_loss_{name}_2"]
    assert metrics["eval_loss"] == pytest.approx((6 * losses[0] + 9 * losses[1]) / 15)
    assert (metrics["eval_accuracy"] * 15) == pytest.approx(round(metrics["eval_accuracy"] * 15))


def test_fgvc_splits_with_gaps_are_numbered_together(recipe, tmp_path, images_dir):
    ids = {"9": "295", "10": "627", "11": "1010"}
    paths = {}
    for part in ("train", "validation"):
        names = sorted((images_dir / part).rglob("*.png"))
        values = {str(p.relative_to(images_dir)): ids[p.parent.name] for p in names}
        paths[part] = tmp_path / f"{part}.json"
        paths[part].write_text(json.dumps(values))
    sources = {
        part: [{"path": str(path), "image_dir": str(images_dir)}] for part, path in paths.items()
    }
    run_dir = train(recipe(data={**sources, "test": []}), ["train.num_train_epochs=20"]).run_dir
    (score,) = evaluate(run_dir)["results"]  # there is no test split: validation
    assert (score["task"], score["score"]) == ("validation", 1.0)
    assert [each["label"] for each in score["per_class"]] == ["295", "627", "1010"]


def test_an_image_that_cannot_be_read_is_found_before_training(recipe, tmp_path):
    folder = write_images(tmp_path / "damaged", {"train": {"a": 2, "b": 2}})
    (folder / "train" / "a" / "01.png").write_bytes(b"nothing")
    path = recipe(data={"train": [{"path": str(folder)}], "validation": [], "test": []})
    with pytest.raises(UserError, match="no image that can be read"):
        train(path)
    assert not (path.parent / "runs" / "tiny" / "metrics.jsonl").exists()


def test_a_base_without_its_processor_is_told_what_to_add(recipe, tmp_path):
    base = write_vit(tmp_path / "bare")
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"holds no preprocessor_config\.json"):
        train(recipe(), [f"model.name_or_path={base}"])


FAMILIES = {
    "deit": (DeiTForImageClassification, DeiTConfig, ["o_proj"], "none"),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, ["o_proj", "fc1"], "input_dim"),
    "swin": (SwinForImageClassification, SwinConfig, ["o_proj"], "input_dim"),
    "hiera": (HieraForImageClassification, HieraConfig, ["qkv:q", "qkv:v"], "input_dim"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_merges(recipe, tmp_path, name):
    model_class, config_class, targets, share = FAMILIES[name]
    edge = 64 if name == "hiera" else 16
    sizes = {
        "deit": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
        "hiera": {
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "masked_unit_size": [8, 8],
        },
    }[name]
    torch.manual_seed(0)
    size = [edge, edge] if name == "hiera" else edge
    patch = {} if name == "hiera" else {"patch_size": 4}
    model = model_class(config_class(image_size=size, **patch, **sizes, num_labels=2))
    model.save_pretrained(tmp_path / name)
    write_processor(tmp_path / name, edge=edge)
    path = recipe(
        model={"name_or_path": str(tmp_path / name), "drop_path_rate": 0.1 * (name != "hiera")},
        adapter={"target_modules": targets, "share": share},
    )
    result = train(path, ["train.max_steps=2"])
    (score,) = evaluate(result.run_dir)["results"]
    merged = merge(result.run_dir).output_dir
    (after,) = evaluate(merged)["results"]
    assert after["per_class"] == score["per_class"]
    adapted = load_file(result.adapter_dir / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for key, tensor in adapted.items() if "psi" in key)


def test_python_sees_what_the_command_scores(recipe, images_dir):
    run_dir = train(recipe()).run_dir
    model = AutoModelForImageClassification.from_pretrained(merge(run_dir).output_dir).eval()
    from PIL import Image

    files = sorted((images_dir / "test").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file), dtype=np.float32) for file in files])
    with torch.no_grad():
        logits = model(pixel_values=torch.from_numpy(pixels / 255 * 2 - 1)[:, None]).logits
    found = evaluate(run_dir)
    lines = [json.loads(line) for line in Path(found["samples_path"]).read_text().splitlines()]
    assert [model.config.id2label[i] for i in logits.argmax(-1).tolist()] == [
        line["prediction"] for line in lines
    ]
    assert np.allclose(
        logits.softmax(-1).amax(-1), [line["confidence"] for line in lines], atol=FLOAT32
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    ["model.drop_path_rate=0.9", "data.image_transform=crop_flip", "data.image_size=16"],
)
def test_keys_of_images_change_what_is_learned(recipe, read_adapter, override):
    few = ["train.max_steps=2"]
    before = read_adapter(train(recipe("before"), few).run_dir)
    assert read_adapter(train(recipe("after"), [*few, override]).run_dir) != before


def test_commands_for_texts_name_what_serves_a_classifier(recipe, tmp_path):
    run_dir = train(recipe(), ["train.max_steps=1"]).run_dir
    for ask in (
        lambda: generate(run_dir, prompts=["hello"]),
        lambda: export(run_dir, format="lora", output=tmp_path / "twin"),
    ):
        with pytest.raises(UserError, match="this is a classifier") as caught:
            ask()
        assert "wegeft" in caught.value.hint
    assert not (tmp_path / "twin").exists()


def test_an_edited_adapter_keeps_its_classes(recipe, tmp_path, images_dir):
    run_dir = train(recipe()).run_dir
    (before,) = evaluate(run_dir)["results"]
    edit(run_dir, output=tmp_path / "same", scale={f"group:{VIT_GROUP}": 1.0})
    (same,) = evaluate(tmp_path / "same", data_dir=images_dir)["results"]
    assert same["per_class"] == before["per_class"]
    restored = edit(tmp_path / "same", output=tmp_path / "back", restore=True).output_dir
    assert (restored / "head.json").is_file()


def test_a_start_from_an_adapter_of_another_base_is_refused(recipe, tmp_path):
    adapter_dir = train(recipe("first"), ["train.max_steps=1"]).adapter_dir
    start = [f"adapter.init_from={adapter_dir}", "train.max_steps=1"]
    assert train(recipe("same"), start).status == "finished"
    other = write_vit(tmp_path / "other", intermediate_size=40)
    with pytest.raises(UserError, match="base"):
        train(recipe("other"), [*start, f"model.name_or_path={other}"])


def test_a_batch_of_images_is_not_cut_when_memory_runs_out(recipe, monkeypatch):
    run_pass = Trainer._run_pass

    def fail(self, number, batch):
        if len(batch.labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_pass(self, number, batch)

    monkeypatch.setattr(Trainer, "_run_pass", fail)
    with pytest.raises(MachineError, match="out of memory") as caught:
        train(recipe())
    assert "max_tokens_per_pass" not in str(caught.value)
