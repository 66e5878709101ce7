"""Architectures with a peculiarity: planned, trained and scored, or refused before the run."""

import json

import pytest
import torch
from classifiers import write_images, write_processor, write_recipe
from safetensors.torch import load_file
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
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MPNetConfig,
    MPNetForSequenceClassification,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
    ZambaConfig,
    ZambaForCausalLM,
)

from wegeft_cli.analysis.inspect import inspect
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.merging.merge import merge
from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.planning.plan import plan
from wegeft_cli.reporter import SilentReporter
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


TEXT_PART = {
    "vocab_size": 380, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
MULTIMODAL = {
    "gemma3": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=TEXT_PART,
            vision_config={**TOWER, "num_hidden_layers": 1},
            mm_tokens_per_image=4,
        )
    ),
    "qwen3_5": lambda: Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(
            text_config={
                **TEXT_PART,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"],
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "patch_size": 4,
                "out_hidden_size": 32,
            },
        )
    ),
}


@pytest.mark.parametrize("records_names", [True, False])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_a_multimodal_base_is_merged_over_its_files(
    family, records_names, tmp_path, write_recipe, build_tokenizer
):
    """Its files name the language model's layers otherwise, and hold a tower that no text runs."""
    torch.manual_seed(0)
    MULTIMODAL[family]().save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    recipe = write_recipe(
        model={"name_or_path": str(tmp_path / "base")},
        adapter={"target_modules": r"(?!.*vision).*layers\.\d+\.mlp\.down_proj"},
        train={"max_steps": 2, "learning_rate": 0.1},
    )
    run_dir = train(recipe).run_dir
    assert inspect(run_dir)["modules"]
    if not records_names:  # as adapters of earlier versions
        path = run_dir / "adapter" / "adapter_config.json"
        config = json.loads(path.read_text())
        config.pop("checkpoint_names", None)
        path.write_text(json.dumps(config))
    notes = []

    class Listener(SilentReporter):
        def note(self, text):
            notes.append(text)

    merged = merge(run_dir, reporter=Listener()).output_dir
    assert not any("in memory" in note for note in notes)
    base, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "base", merged)
    )
    assert base.keys() == after.keys()
    changed = [name for name in base if not torch.equal(base[name], after[name])]
    assert len(changed) == 2
    assert all(name.endswith("down_proj.weight") for name in changed)


def test_the_layers_that_zamba_does_not_share_are_trained(tmp_path, write_recipe, build_tokenizer):
    config = ZambaConfig(
        vocab_size=380, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=2, attention_hidden_size=64,
        attn_layer_offset=2, attn_layer_period=3, mamba_d_state=8, n_mamba_heads=2,
        mamba_dt_rank=2, use_mamba_kernels=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    ZambaForCausalLM(config).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    recipe = write_recipe(
        model={"name_or_path": str(tmp_path / "base")},
        adapter={"target_modules": "all-linear"},
        train={"max_steps": 1},
        rows=[{"prompt": f"Q{n}:", "completion": " a"} for n in range(4)],
    )
    with pytest.raises(UserError, match="is tied to") as caught:
        plan(recipe, ["adapter.target_modules=[q_proj,in_proj,linear]"])
    names = caught.value.hint.removeprefix("name the layers that are not tied: ")
    assert names == "[in_proj, linear]"
    assert [group.name for group in plan(recipe).groups] == ["in_proj", "out_proj", "linear"]
    assert train(recipe).status == "finished"
