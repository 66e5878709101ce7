"""Methods are found by folder: one new file adds a method to recipes, runs and adapters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from wegeft_cli import methods
from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import UserError
from wegeft_cli.inference.loaded_model import LoadedModel
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.registry import find_method, method_names, method_of
from wegeft_cli.models.loading import load_model
from wegeft_cli.runs.train import train

NORMS = '''
"""Train the weights of the normalization layers."""

import json

from wegeft_cli.methods.base import Method, ParameterGroup


def _norms(model):
    return {name: p for name, p in model.named_parameters() if "norm" in name}


class NormMethod(Method):
    names = ("norms",)
    peft_types = ("NORMS",)
    trains_in_place = True
    needs_package = True

    def count(self, skeleton, section, task_type):
        norms = _norms(skeleton)
        return [ParameterGroup("norms", len(norms), None, sum(p.numel() for p in norms.values()))]

    def inject(self, model, section, *, task_type, seed):
        model.requires_grad_(False)
        for parameter in _norms(model).values():
            parameter.requires_grad_(True)
        return model

    def save(self, model, folder, record):
        from safetensors.torch import save_file

        from wegeft_cli.storage.atomic import atomic_folder

        config = {
            "peft_type": "NORMS",
            "base_model_name_or_path": record.recipe.model.name_or_path,
        }
        with atomic_folder(folder) as temporary:
            (temporary / "adapter_config.json").write_text(json.dumps(config))
            (temporary / "README.md").write_text(record.card)
            save_file(_norms(model), temporary / "adapter_model.safetensors")

    def load(self, model, adapter, *, base_dir, warn):
        from safetensors.torch import load_file

        model.load_state_dict(load_file(adapter.weights_path), strict=False)
        return model

    def fold(self, model, adapter):
        return model, len(_norms(model))


METHOD = NormMethod()
'''


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with one more method on the registry's path."""
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "norms.py").write_text(NORMS)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    yield
    sys.modules.pop("wegeft_cli.methods.norms", None)
    if hasattr(methods, "norms"):
        delattr(methods, "norms")


def test_one_new_file_adds_a_method(norms, write_recipe, llama_dir):
    recipe = write_recipe()
    values = yaml.safe_load(recipe.read_text())
    values["adapter"] = {"type": "norms"}
    recipe.write_text(yaml.safe_dump(values))
    result = train(recipe)
    adapter = Adapter.open(result.adapter_dir)
    assert method_of(adapter) is find_method("norms")
    before = load_model(str(llama_dir)).state_dict()
    ids = torch.tensor([[1, 2, 3]])
    opened = LoadedModel.open(result.run_dir, None, base=None)
    trained = opened.model.state_dict()
    changed = {name for name, tensor in before.items() if not tensor.equal(trained[name])}
    assert changed
    assert all("norm" in name for name in changed)
    merged = load_model(str(merge(result.run_dir).output_dir))
    assert torch.equal(merged(ids).logits, opened.model(ids).logits)


def test_a_method_that_no_file_adds_is_refused(write_recipe):
    with pytest.raises(UserError, match=r"adapter\.type"):
        train(write_recipe(), overrides=["adapter.type=norms"])
    assert "norms" not in method_names()


def test_the_registry_imports_no_torch():
    code = (
        "import sys; from wegeft_cli.methods.registry import method_names; method_names(); "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
