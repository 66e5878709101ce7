"""A LoRA adapter's files are read for looking, and what is more than plain LoRA is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.lora_files import load_lora_files
from wegeft_cli.errors import UserError

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def write_lora(tmp_path):
    """A function: a LoRA adapter's two files with other config values or tensors."""

    def write(config=None, tensors=None) -> Path:
        values = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "base_model_name_or_path": "base",
            **(config or {}),
        }
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        stored = {
            f"base_model.model.{MODULE}.lora_A.weight": torch.ones(4, 6),
            f"base_model.model.{MODULE}.lora_B.weight": torch.ones(5, 4),
        }
        save_file(stored if tensors is None else tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize(("config", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0)])
def test_pairs_are_scaled(write_lora, config, scale):
    pairs = load_lora_files(Adapter.open(write_lora(config)))
    assert list(pairs) == [MODULE]
    B, A = pairs[MODULE]
    assert torch.equal(B, torch.full((5, 4), scale))
    assert torch.equal(A, torch.ones(4, 6))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 0}, "above 0"),
        ({"lora_alpha": "8"}, "above 0"),
    ],
)
def test_more_than_plain_lora_is_refused(write_lora, config, told):
    with pytest.raises(UserError, match=told):
        load_lora_files(Adapter.open(write_lora(config)))


def test_halves_that_do_not_fit_are_told(write_lora):
    name = f"base_model.model.{MODULE}.lora_A.weight"
    with pytest.raises(UserError, match="no lora_B that fits"):
        load_lora_files(Adapter.open(write_lora(tensors={name: torch.ones(4, 6)})))
    with pytest.raises(UserError, match="no LoRA pairs"):
        load_lora_files(Adapter.open(write_lora(tensors={"other": torch.ones(2)})))
