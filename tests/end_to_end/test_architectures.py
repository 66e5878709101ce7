"""Architectures with a peculiarity: planned, trained and scored, or refused before the run."""

import pytest
import torch
from classifiers import write_images, write_processor, write_recipe
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    CTRLConfig,
    CTRLLMHeadModel,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.planning.plan import plan
from wegeft_cli.runs.train import train

TOWER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 8, "patch_size": 4, "use_relative_position_bias": True,
}  # fmt: skip
VISION = {
    "beit": lambda: BeitForImageClassification(BeitConfig(**TOWER)),
    "data2vec": lambda: Data2VecVisionForImageClassification(Data2VecVisionConfig(**TOWER)),
}
QUERY = {"beit": "q_proj", "data2vec": "query"}


@pytest.mark.parametrize("family", VISION)
def test_relative_positions_do_not_stay_fake_after_the_plan(family, tmp_path):
    torch.manual_seed(0)
    VISION[family]().save_pretrained(tmp_path / "base")
    write_processor(tmp_path / "base")
    write_images(tmp_path / "images", {"train": {"a": 4, "b": 4}, "test": {"a": 2, "b": 2}})
    parts = {
        part: [{"path": str(tmp_path / "images"), "split": part}] for part in ("train", "test")
    }
    recipe = write_recipe(
        tmp_path,
        model={"name_or_path": str(tmp_path / "base")},
        adapter={"target_modules": [QUERY[family]]},
        data={**parts, "image_transform": "resize"},
        train={"num_train_epochs": 2},
    )
    planned = plan(recipe)
    assert planned.memory_gib["total"] is not None
    assert planned.flops_per_step > 0
    result = train(recipe)
    assert result.status == "finished"
    (score,) = evaluate(result.run_dir)["results"]
    assert score["n"] == 4


TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
WITHOUT_CHECKPOINTING = {
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(**TEXT, embedding_size=16)),
    "mpnet": lambda: MPNetForSequenceClassification(MPNetConfig(**TEXT, num_hidden_layers=1)),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    ),
    "ctrl": lambda: CTRLLMHeadModel(CTRLConfig(vocab_size=64, n_embd=32, dff=48, n_layer=1)),
    "openai-gpt": lambda: OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    ),
}


@pytest.mark.parametrize("family", WITHOUT_CHECKPOINTING)
def test_checkpointing_is_refused_where_transformers_has_none(family):
    with pytest.raises(UserError, match="no activation checkpointing for") as caught:
        enable_checkpointing(WITHOUT_CHECKPOINTING[family]())
    assert caught.value.key == "train.gradient_checkpointing"


def test_checkpointing_is_refused_before_the_run(tmp_path, write_recipe, build_tokenizer):
    tokenizer = build_tokenizer()
    config = OpenAIGPTConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2)
    OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = write_recipe_of(write_recipe, tmp_path / "base")
    for command in (plan, train):
        with pytest.raises(UserError, match="no activation checkpointing for OpenAIGPT"):
            command(recipe)
    assert not (tmp_path / "runs").exists()


def write_recipe_of(write_recipe, base):
    return write_recipe(
        model={"name_or_path": str(base)},
        adapter={"target_modules": ["c_attn"]},
        train={"gradient_checkpointing": True},
    )


def test_a_roberta_is_trained_up_to_its_last_position(tmp_path, build_tokenizer):
    """512 of 514 rows of its position table are positions."""
    tokenizer = build_tokenizer(pad="<pad>")
    config = RobertaConfig(
        **{**TEXT, "vocab_size": len(tokenizer)}, num_hidden_layers=1, max_position_embeddings=34,
        pad_token_id=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{"ab " * 60}", "label": {n % 2}}}\n' for n in range(4)))
    recipe = write_recipe(
        tmp_path,
        task="sequence_classification",
        model={"name_or_path": str(tmp_path / "base")},
        adapter={"target_modules": ["query"]},
        data={"train": [{"path": str(rows)}], "max_length": 34},
        train={"num_train_epochs": 1},
    )
    for command in (plan, train):
        with pytest.raises(UserError, match="exceed the model's context of 32"):
            command(recipe)
    assert train(recipe, ["data.max_length=32"]).status == "finished"
