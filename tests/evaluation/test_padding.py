"""Models whose answers depend on padding get batches of equal lengths, or of one prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RoFormerConfig,
    RoFormerForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import generate_texts

PROMPTS = ["a", "a rather long prompt", "two words", "b", "c d", "seven"]
VOCABULARY = 259
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}


def build_bart() -> Any:
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return BartForCausalLM(config)


def build_roformer() -> Any:
    config = RoFormerConfig(
        **SMALL, num_attention_heads=4, intermediate_size=32, max_position_embeddings=64,
        is_decoder=True,
    )  # fmt: skip
    return RoFormerForCausalLM(config)


FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "bart": (build_bart, "equal"),
    "roformer": (build_roformer, "equal"),
    "rwkv": (
        lambda: RwkvForCausalLM(
            RwkvConfig(**SMALL, attention_hidden_size=32, intermediate_size=32, context_length=64)
        ),
        "single",  # its state mixes the rows of a batch
    ),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**SMALL)), "left"),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, str]:
    build, batching = FAMILIES[request.param]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    return model, batching


def test_a_batch_gives_the_answers_of_single_prompts(
    family: tuple[Any, str], make_tokenizer: Callable[..., Any]
) -> None:
    model, batching = family
    side = "left" if batching == "left" else "none"
    tokenizer = make_tokenizer("</s>")
    single, batched = (
        generate_texts(model, tokenizer, PROMPTS, Decoding(8), batch_size=size) for size in (1, 4)
    )
    assert batched.settings["padding_side"] == side
    assert batched.settings["batch_size"] == (1 if batching == "single" else 4)
    assert (batched.note is None) == (batching == "left")
    assert batched.new_ids == single.new_ids
