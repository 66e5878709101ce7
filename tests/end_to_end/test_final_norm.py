"""`inspect` maps directions through the final norm that the base's own module computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from wegeft_cli.analysis.vocabulary import Vocabulary, open_vocabulary
from wegeft_cli.storage.safetensors_reader import list_tensors

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
MIXED = {"layer_types": ["linear_attention", "full_attention"], **LINEAR}
EXPERTS = {
    "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_experts_per_tok": 2,
}  # fmt: skip
GEMMA_3N = {
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2,
    "num_kv_shared_layers": 0, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0],
    "layer_types": ["full_attention"] * 2,
}  # fmt: skip
# Family -> its settings, and whether its final norm subtracts the mean.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "Gemma3": ({}, False),
    "Gemma3n": (GEMMA_3N, False),
    "Qwen3Next": ({**MIXED, **EXPERTS}, False),
    "Qwen3_5": (MIXED, False),
    "Nemotron": ({}, True),
    "Cohere": ({}, True),
    "Olmo": ({}, True),
    "Llama": ({}, False),
}
NAMES = {
    "Gemma3": "Gemma3TextConfig",
    "Gemma3n": "Gemma3nTextConfig",
    "Qwen3_5": "Qwen3_5TextConfig",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_direction_goes_through_the_norm_of_the_base(family, tmp_path):
    changes, is_centered = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, NAMES.get(family, f"{family}Config"))(**{**SMALL, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    norm = model.get_decoder().norm
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    vocabulary = open_vocabulary(tmp_path, list_tensors(tmp_path))
    assert isinstance(vocabulary, Vocabulary), vocabulary
    assert vocabulary.is_centered == is_centered
    directions = torch.randn(5, 32, dtype=torch.float64) + 1
    with torch.no_grad():
        norm = norm.double()
        expected = norm(1000 * directions[None])[0] - norm(torch.zeros(1, 1, 32).double())[0]
    found = vocabulary.to_logits(directions)
    cosines = torch.nn.functional.cosine_similarity(found, expected)
    torch.testing.assert_close(cosines, torch.ones(5).double(), rtol=0, atol=1e-9)
