"""Names and shapes of tensors in adapter files, for every way to share factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden import check_golden, describe, read_golden
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from wegeft_cli import inject_generators, save_adapter

SETTINGS: dict[str, dict[str, Any]] = {
    "share module_type": {},
    "share input_dim": {"share": "input_dim"},
    "share none": {"share": "none"},
    "side output": {"side": "output"},
    "groups": {
        "target_modules": ["q_proj", "o_proj"],
        "groups": {"first": [".*layers.0.*"], "second": [".*layers.1.*"]},
    },
    "all-linear": {"target_modules": "all-linear"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
# Differ by PEFT's version, and with whether PEFT or the command line writes.
PEFTS = ("peft_version", "auto_mapping")


def read_adapter(folder: Path) -> dict[str, Any]:
    """Return tensor names with shapes, the groups of modules, and the kinds of the other keys."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {
            name: f"{file.get_slice(name).get_dtype()} {file.get_slice(name).get_shape()}"
            for name in file.keys()  # noqa: SIM118
        }
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    modules = config.pop("modules")
    keys = describe({key: value for key, value in config.items() if key not in PEFTS})
    return {"tensors": tensors, "modules": modules, "adapter_config.json": keys}


@pytest.mark.parametrize("name", SETTINGS)
def test_wegeft(name, llama_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    options = {"target_modules": TARGETS, "rank": 4, **SETTINGS[name]}
    generators = inject_generators(model, **options)
    save_adapter(model, tmp_path, base_model_name_or_path=str(llama_dir))
    found = read_adapter(tmp_path)
    assert model.wegeft is generators
    learned = {id(parameter) for parameter in generators.trainable()}
    found["trainable"] = sorted(n for n, p in model.named_parameters() if id(p) in learned)
    check_golden("tensor_names", found, part=name)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
def test_peft(name, llama_dir, tmp_path):
    """The same adapters by PEFT's own road."""
    peft = pytest.importorskip("peft")
    from wegeft_cli.interop.peft import WegeftConfig

    options = {"target_modules": TARGETS, "r": 4, "task_type": "CAUSAL_LM", **SETTINGS[name]}
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama_dir), WegeftConfig(**options)
    )
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path)
    found["trainable"] = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    check_golden("tensor_names_peft", found, part=name)


def test_both_write_the_same_names():
    ours, pefts = read_golden("tensor_names"), read_golden("tensor_names_peft")
    for name in SETTINGS:
        assert ours[name]["tensors"] == pefts[name]["tensors"], name
        assert ours[name]["modules"] == pefts[name]["modules"], name
