"""A model that reads later tokens is no causal language model; a decoder that names its kind is."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    ElectraConfig,
    GPTNeoXConfig,
    LlamaConfig,
    RobertaConfig,
    XLMConfig,
    XLNetConfig,
)

from wegeft_cli.errors import BaseModelError
from wegeft_cli.models.context import find_context
from wegeft_cli.planning.plan import plan
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.runs.train import train
from wegeft_cli.tasks.support.causality_check import check_causality, check_decoder

SIZES = {"vocab_size": 380, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODERS = {
    "bert": lambda **more: BertConfig(**SIZES, intermediate_size=48, **more),
    "roberta": lambda **more: RobertaConfig(**SIZES, intermediate_size=48, **more),
    "electra": lambda **more: ElectraConfig(**SIZES, intermediate_size=48, **more),
}
OTHERS = {
    "xlnet": lambda: XLNetConfig(vocab_size=380, d_model=32, n_layer=2, n_head=2, d_inner=48),
    "xlm": lambda: XLMConfig(vocab_size=380, emb_dim=32, n_layers=2, n_heads=2),
}
DECODERS = {
    **{name: lambda build=build: build(is_decoder=True) for name, build in ENCODERS.items()},
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=48),
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=48),
}


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", [*ENCODERS, *OTHERS])
def test_an_encoder_is_refused_by_its_settings_and_by_its_logits(family):
    model = build({**ENCODERS, **OTHERS}[family]())
    with pytest.raises(BaseModelError, match="is an encoder here"):
        check_decoder(model)
    with pytest.raises(BaseModelError, match="with a token that comes later"):
        check_causality(model, Recipe())


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_passes(family):
    model = build(DECODERS[family]())
    check_decoder(model)
    check_causality(model, Recipe())


def test_plan_and_train_refuse_a_bert_as_language_model(tmp_path, write_recipe, build_tokenizer):
    build(ENCODERS["bert"]()).save_pretrained(tmp_path / "bert")
    build_tokenizer().save_pretrained(tmp_path / "bert")
    recipe = write_recipe(
        model={"name_or_path": str(tmp_path / "bert")}, adapter={"target_modules": ["query"]}
    )
    for command in (plan, train):
        with pytest.raises(BaseModelError, match="is_decoder: false") as caught:
            command(recipe)
        assert "sequence_classification" in caught.value.hint


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_the_context_is_what_the_position_table_allows(family):
    """A row as long as the context runs, one token more does not."""
    model = build(ENCODERS[family](is_decoder=True, max_position_embeddings=20))
    context = find_context(model)
    assert context == (18 if family == "roberta" else 20)
    model(input_ids=torch.full((1, context), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, context + 1), 5))


def test_an_unlimited_context_is_none():
    assert find_context(build(OTHERS["xlnet"]())) is None
