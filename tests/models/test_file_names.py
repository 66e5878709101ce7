"""Adapters, recipes and checkpoints survive transformers' renaming of modules.

A ViT's files call a layer `vit.encoder.layer.0.attention.attention.query`, the model of today
`vit.layers.0.attention.q_proj`. Earlier versions of transformers called it as the files do, so an
adapter of theirs is one of today's with those names in the place of the model's.
"""

import json
import shutil

import pytest
import torch
from classifiers import write_images, write_recipe, write_vit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.inference.loaded_model import ModelTarget
from wegeft_cli.merging.merge import merge
from wegeft_cli.models.file_names import file_names, rename_checkpoint, with_current_names
from wegeft_cli.planning.plan import plan
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import AdapterSection
from wegeft_cli.runs.train import train

EARLIER = {
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "phi_q_proj": "phi_query",
    "psi_q_proj": "psi_query",
    '"q_proj"': '"query"',
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return write_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    splits = {"train": {"a": 4, "b": 4}, "test": {"a": 2, "b": 2}}
    return write_images(tmp_path_factory.mktemp("images"), splits)


@pytest.fixture
def recipe(tmp_path, base_dir, images_dir):
    def write(name="tiny", **sections):
        parts = {part: [{"path": str(images_dir), "split": part}] for part in ("train", "test")}
        return write_recipe(
            tmp_path, name, model={"name_or_path": str(base_dir)},
            data={**parts, "image_transform": "resize"}, **sections,
        )  # fmt: skip

    return write


def rename(text):
    for now, before in EARLIER.items():
        text = text.replace(now, before)
    return text


def write_as_earlier(adapter_dir):
    """Rewrite an adapter with the names of an earlier transformers, without a record of others."""
    config = json.loads(rename((adapter_dir / "adapter_config.json").read_text()))
    config.pop("checkpoint_names", None)
    (adapter_dir / "adapter_config.json").write_text(json.dumps(config))
    path = adapter_dir / "adapter_model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def read_logits(run_dir):
    recipe = load_recipe(run_dir / "recipe.yaml").recipe
    model = ModelTarget.resolve(run_dir, recipe).load().model
    torch.manual_seed(0)
    with torch.no_grad():
        return model(pixel_values=torch.randn(2, 1, 8, 8)).logits


@pytest.mark.parametrize("options", [
    ["adapter.target_modules=[q_proj]"],
    ["adapter.target_modules=[q_proj]", "adapter.share=none"],
    ["adapter.target_modules=[q_proj]", "adapter.modules_to_save=[o_proj]"],
    ["adapter.target_modules=[fc1]", "adapter.modules_to_save=[attention]"],
    ["adapter.type=lora", "adapter.target_modules=[q_proj]", "adapter.init=phi_zero"],
    ["adapter.type=bitfit"],
    ["adapter.type=full"],
], ids=["shared", "single", "saved", "container", "lora", "bitfit", "full"])  # fmt: skip
def test_an_adapter_of_an_earlier_transformers_is_the_same_adapter(recipe, options):
    sections = {}
    if options[0] in ("adapter.type=bitfit", "adapter.type=full"):
        sections = {"adapter": {"r": 64, "alpha": None, "target_modules": "all-linear"}}
        options = [*options, "adapter.init=phi_zero"]
    result = train(recipe(**sections), [*options, "train.max_steps=3"])
    before = read_logits(result.run_dir)
    (score,) = evaluate(result.run_dir)["results"]
    merged = load_file(merge(result.run_dir).output_dir / "model.safetensors")
    write_as_earlier(result.adapter_dir)
    assert "vit.layers" not in (result.adapter_dir / "adapter_config.json").read_text()
    assert torch.equal(read_logits(result.run_dir), before)
    assert evaluate(result.run_dir)["results"][0]["score"] == score["score"]
    shutil.rmtree(result.run_dir / "merged")
    again = load_file(merge(result.run_dir).output_dir / "model.safetensors")
    assert all(torch.equal(again[name], merged[name]) for name in merged)


def test_the_names_of_the_files_are_recorded_and_resolve_what_is_called_otherwise(recipe, base_dir):
    """Names that no version has: the record alone finds the layers."""
    options = ["adapter.target_modules=[q_proj]", "adapter.modules_to_save=[o_proj]"]
    result = train(recipe(), [*options, "train.max_steps=3"])
    before = read_logits(result.run_dir)
    path = result.adapter_dir / "adapter_config.json"
    config = json.loads(path.read_text())
    stored = load_file(base_dir / "model.safetensors")
    names = config["checkpoint_names"]
    assert set(names.values()) <= stored.keys()
    assert names["vit.layers.0.attention.q_proj.weight"] == (
        "vit.encoder.layer.0.attention.attention.query.weight"
    )
    path.write_text(path.read_text().replace("vit.layers.", "vit.blocks."))
    weights = result.adapter_dir / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors = {name.replace("vit.layers.", "vit.blocks."): t for name, t in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    assert torch.equal(read_logits(result.run_dir), before)


def test_names_of_the_files_are_targets_with_a_note(recipe, listener):
    asked = ["adapter.target_modules=[query,intermediate.dense]"]
    planned = plan(recipe(), asked)
    assert [group.name for group in planned.groups] == ["q_proj", "fc1", "modules_to_save"]
    train(recipe(), [*asked, "train.max_steps=1"], reporter=listener)
    notes = [note for note in listener.notes if "is read as" in note]
    assert notes == [
        "`query` is read as `q_proj`, its name in this version of transformers",
        "`intermediate.dense` is read as `fc1`, its name in this version of transformers",
    ]


@pytest.fixture
def listener():
    from contextlib import contextmanager

    class Listener:
        def __init__(self):
            self.notes = []

        def note(self, text):
            self.notes.append(text)

        def warn(self, text):
            pass

        @contextmanager
        def progress(self, title, total):
            yield lambda done, **figures: None

    return Listener()


def test_expressions_groups_and_saved_modules_take_the_names_of_the_files(base_dir):
    model = AutoModelForImageClassification.from_pretrained(base_dir)
    section = AdapterSection(
        target_modules=r"vit\.encoder\.layer\.\d\.attention\.attention\.(query|value)",
        groups={"one": ["attention.query"], "two": ["v_proj"]},
        modules_to_save=["output.dense", "classifier", "no_such"],
    )
    found, notes = with_current_names(section, model)
    assert found.target_modules == ["q_proj", "v_proj"]
    assert found.groups == {"one": ["q_proj"], "two": ["v_proj"]}
    assert found.modules_to_save == ["o_proj", "fc2", "classifier", "no_such"]
    assert len(notes) == 3
    same = AdapterSection(target_modules=["q_proj"])
    assert with_current_names(same, model) == (same, [])


def test_a_checkpoint_of_an_earlier_transformers_is_resumed(recipe):
    class StopAfter:
        left = 5

        def __call__(self):
            self.left -= 1
            return self.left == 0

    options = ["adapter.target_modules=[q_proj]", "adapter.modules_to_save=[o_proj]"]
    whole = train(recipe("whole"), options)
    stopped = train(recipe("cut"), options, should_stop=StopAfter())
    (folder,) = (stopped.run_dir / "checkpoints").iterdir()
    write_checkpoint_as_earlier(folder)
    resumed = train(recipe("cut"), options, resume="auto")
    one, two = (
        load_file(run.adapter_dir / "adapter_model.safetensors") for run in (whole, resumed)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def write_checkpoint_as_earlier(folder):
    import hashlib

    dashed = {now.replace(".", "-"): before.replace(".", "-") for now, before in EARLIER.items()}

    def earlier(name):
        name = name.replace(".q_proj.", ".query.")
        for now, before in dashed.items():
            name = name.replace(now, before)
        return name

    path = folder / "parameters.safetensors"
    tensors = {earlier(name): tensor for name, tensor in load_file(path).items()}
    assert any("query" in name for name in tensors)
    assert any("output-dense" in name for name in tensors)
    save_file(tensors, path)
    state = json.loads((folder / "state.json").read_text())
    state["names"] = [earlier(name) for name in state["names"]]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_in_another_order_is_left_to_be_refused(base_dir):
    """The optimizer knows its parameters by numbers alone."""
    model = AutoModelForImageClassification.from_pretrained(base_dir)
    own = ["vit.layers.0.attention.q_proj.weight", "vit.layers.0.attention.k_proj.weight"]
    files = file_names(model).layers
    saved = [f"{files[name.removesuffix('.weight')]}.weight" for name in own]
    tensors = {"parameters": dict.fromkeys(saved, 0)}
    assert rename_checkpoint(model, tensors, own, saved)["parameters"].keys() == set(own)
    assert rename_checkpoint(model, tensors, own, saved[::-1]) == tensors


def test_a_start_from_an_adapter_of_an_earlier_transformers(recipe):
    options = ["adapter.target_modules=[q_proj]", "train.max_steps=3"]
    first = train(recipe("first"), options)
    write_as_earlier(first.adapter_dir)
    started = train(
        recipe("second"),
        [*options, f"adapter.init_from={first.run_dir}", "train.learning_rate=1e-30"],
    )
    before, after = (
        load_file(run.adapter_dir / "adapter_model.safetensors") for run in (first, started)
    )
    assert torch.equal(after["base_model.wegeft_phi_q_proj"], before["base_model.wegeft_phi_query"])
