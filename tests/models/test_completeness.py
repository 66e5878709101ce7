"""What a base's files lack is an error that names it; what the model does not use is a warning."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from wegeft_cli.errors import BaseModelError, UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.models.heads import HeadSpec, finish_head
from wegeft_cli.models.loading import load_base, load_model
from wegeft_cli.recipe.schema import ModelSection
from wegeft_cli.runs.train import train

LOST = "model.layers.1.mlp.down_proj.weight"


def change_tensors(folder, change):
    """Rewrite a folder's tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def llama_copy(llama_dir, tmp_path):
    return shutil.copytree(llama_dir, tmp_path / "llama")


def test_a_missing_tensor_of_a_language_model_is_named(llama_copy):
    change_tensors(llama_copy, lambda tensors: tensors.pop(LOST))
    with pytest.raises(BaseModelError, match="would stay random") as caught:
        load_model(str(llama_copy))
    assert LOST in caught.value.message


def test_a_tensor_of_another_shape_is_named_with_both_shapes(llama_copy):
    change_tensors(llama_copy, lambda tensors: tensors.update({LOST: torch.zeros(3, 4)}))
    with pytest.raises(BaseModelError) as caught:
        load_model(str(llama_copy))
    assert f"{LOST} ([3, 4] in the files, [32, 48] in the model)" in caught.value.message


def test_a_run_on_an_incomplete_base_does_not_start(llama_copy, write_recipe):
    change_tensors(llama_copy, lambda tensors: tensors.pop(LOST))
    recipe = write_recipe(model={"name_or_path": str(llama_copy)})
    with pytest.raises(BaseModelError, match=r"down_proj\.weight"):
        train(recipe)


def test_a_classifier_as_language_model_lacks_the_output_layer(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"lm_head\.weight") as caught:
        load_model(str(tmp_path))
    assert "LlamaForSequenceClassification" in caught.value.hint


def test_unused_tensors_are_a_warning(llama_copy):
    extra = {"model.layers.2.mlp.down_proj.weight": torch.zeros(2, 2)}
    change_tensors(llama_copy, lambda tensors: tensors.update(extra))
    warnings = []
    load_base(ModelSection(str(llama_copy)), warn=warnings.append)
    assert len(warnings) == 1
    assert "model.layers.2.mlp.down_proj.weight" in warnings[0]


def test_a_complete_base_gives_no_warning(llama_dir):
    warnings = []
    load_base(ModelSection(str(llama_dir)), warn=warnings.append)
    assert warnings == []


def test_a_decoder_out_of_a_whole_bart_lacks_its_embedding(tmp_path):
    """The files hold the tied embedding as `shared`, which the decoder alone does not read."""
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=32,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"decoder\.embed_tokens\.weight") as caught:
        load_model(str(tmp_path))
    assert "BartForConditionalGeneration" in caught.value.hint


def write_classifier(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def head_spec(*labels):
    return HeadSpec("sequence_classification", labels)


def test_a_classifier_may_lack_its_head_alone(tmp_path):
    write_classifier(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop("score.weight"))
    model = load_model(str(tmp_path), head=head_spec("a", "b", "c"))
    finish_head(model, head_spec("a", "b", "c"), (), seed=1)
    assert model.score.weight.std() > 0


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"),
    lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}),
])  # fmt: skip
def test_a_classifier_lacks_no_part_of_its_backbone(tmp_path, change):
    write_classifier(tmp_path)
    change_tensors(tmp_path, change)
    model = load_model(str(tmp_path), head=head_spec("a", "b"))
    with pytest.raises(BaseModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        finish_head(model, head_spec("a", "b"), (), seed=1)


def test_a_classifier_without_its_head_is_not_evaluated(tmp_path, build_tokenizer):
    model, rows = write_classifier(tmp_path / "model"), tmp_path / "rows.jsonl"
    build_tokenizer(pad="<pad>").save_pretrained(model)
    change_tensors(model, lambda tensors: tensors.pop("score.weight"))
    rows.write_text("".join(json.dumps({"text": "true", "label": n % 2}) + "\n" for n in range(4)))
    with pytest.raises(UserError, match=r"score\.weight"):
        evaluate(model, data_dir=tmp_path)
