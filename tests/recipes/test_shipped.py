"""Every shipped recipe is valid, says where its numbers come from, and holds the published ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast, RobertaConfig, ViTConfig

from wegeft_cli.data.text.encode import encode_rows
from wegeft_cli.data.text.templates import render_row
from wegeft_cli.data.text.tokenizer import build_encoder
from wegeft_cli.planning.plan import plan
from wegeft_cli.planning.validate import validate_recipe
from wegeft_cli.recipe.catalog import list_recipes, read_recipe_text
from wegeft_cli.recipe.load import load_recipe, recipe_to_yaml

NAMES = [recipe.name for recipe in list_recipes()]
LANGUAGE = ["commonsense", "math10k", "metamath", "codefeedback", "wizardlm", "alpaca"]
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_all_are_there():
    pairs = [f"llama_{name}{twin}" for name in LANGUAGE for twin in ("", "_lora")]
    others = ["quickstart", "roberta_glue", "vit_digits", "vit_fgvc", "vit_vtab"]
    assert sorted([*others, *pairs]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_is_valid_and_comes_back_from_its_run_folder(name, tmp_path: Path):
    report = validate_recipe(name)
    loaded = load_recipe(name)
    # A recipe with a search grid says so, and nothing else is to be said.
    assert all(note.startswith("`sweep` has") for note in report.notes)
    assert len(report.notes) == bool(loaded.recipe.sweep)
    assert loaded.recipe.output_dir == f"runs/{name}"
    saved = tmp_path / "recipe.yaml"
    saved.write_text(recipe_to_yaml(loaded.recipe), encoding="utf-8")
    assert load_recipe(saved).recipe == loaded.recipe


@pytest.mark.parametrize("name", NAMES)
def test_header_says_what_whence_how_and_on_what(name):
    text = read_recipe_text(name)
    header = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    for part in ("Reproduces", "Numbers", "Command", "Hardware"):
        assert re.search(rf"^# {part} +\S", header, re.MULTILINE), part
    assert re.search(rf"wegeft train {name}\b", header)
    assert max(map(len, text.splitlines())) <= 110


@pytest.fixture(scope="module")
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that splits spaces, line breaks and first letters as Llama-2's does.

    No token holds a line break and another character, a space and a letter are one token while a
    space and a digit are two, and two spaces are one where no letter follows.
    """
    merges = [*(("▁", letter) for letter in "asTx#-`"), ("▁", "▁"), ("▁▁", "▁▁")]
    characters = [chr(code) for code in range(33, 127)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    tokens += ["".join(pair) for pair in merges]
    model = models.BPE(
        {token: number for number, token in enumerate(tokens)},
        merges,
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", LANGUAGE)
def test_masks_differ_where_the_header_says_so(name, llama_tokenizer):
    """The authors count the tokens of the prompt; decision 7 learns a token that it shares."""
    answers = ["The answer is 4.", "42", " so", "\n\nIt is.", "`x`", "- one", "  x"]
    template = load_recipe(f"llama_{name}").recipe.data.template
    differing = []
    for answer in answers:
        texts = {"instruction": "What is 1 + 1?", "output": answer}
        row = render_row(texts, template=template, loss_on="completion")
        dataset, report = encode_rows([row], encoder=build_encoder(llama_tokenizer), max_length=512)
        ids, mask = dataset.row(0)
        prompt = llama_tokenizer(row.segments[0].text, add_special_tokens=False)["input_ids"]
        first = int(mask.argmax()) - (ids[0] == llama_tokenizer.bos_token_id)
        assert (first != len(prompt)) == (report.num_boundary_merged == 1)
        assert first in (len(prompt), len(prompt) - 1)
        if first != len(prompt):
            differing.append(answer)
    assert differing == (["42", " so", "\n\nIt is.", "  x"] if name == "metamath" else [])
    assert ("(decision 7)" in read_recipe_text(f"llama_{name}")) == bool(differing)


@pytest.mark.parametrize("name", LANGUAGE)
def test_twin_differs_in_the_adapter_alone(name):
    recipe = load_recipe(f"llama_{name}").recipe
    twin = load_recipe(f"llama_{name}_lora").recipe
    assert twin.adapter.type == "lora"
    assert twin.adapter.target_modules == recipe.adapter.target_modules
    assert (twin.data, twin.train, twin.eval, twin.model, twin.seed) == (
        recipe.data,
        recipe.train,
        recipe.eval,
        recipe.model,
        recipe.seed,
    )


@pytest.mark.parametrize(
    ("name", "r", "alpha", "dropout", "targets"),
    [
        ("llama_commonsense", 64, 128, 0.1, FIVE),
        ("llama_math10k", 64, 128, 0.1, FIVE),
        ("llama_metamath", 64, 128, 0.0, SEVEN),
        ("llama_codefeedback", 64, 128, 0.0, SEVEN),
        ("llama_wizardlm", 64, 128, 0.0, SEVEN),
        ("llama_alpaca", 16, 16, 0.0, ["q_proj", "v_proj"]),
        ("quickstart", 64, 32, 0.0, FIVE),
        ("llama_commonsense_lora", 16, 32, 0.0, FIVE),
        ("llama_math10k_lora", 16, 32, 0.0, FIVE),
        ("llama_metamath_lora", 8, 16, 0.0, SEVEN),
        ("llama_codefeedback_lora", 8, 16, 0.0, SEVEN),
        ("llama_wizardlm_lora", 8, 16, 0.0, SEVEN),
    ],
)
def test_published_adapter(name, r, alpha, dropout, targets):
    adapter = load_recipe(name).recipe.adapter
    assert (adapter.r, adapter.alpha, adapter.dropout) == (r, alpha, dropout)
    assert adapter.target_modules == targets
    assert adapter.share == "module_type"


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "rate", "schedule", "warmup", "length"),
    [
        ("llama_commonsense", 16, 3, 2e-4, "linear", 0.1, 512),
        ("llama_math10k", 16, 3, 4e-4, "linear", 0.1, 512),
        ("llama_metamath", 32, 1, 2e-5, "cosine", 0.03, 1024),
        ("llama_codefeedback", 32, 1, 2e-5, "cosine", 0.03, 1024),
        ("llama_wizardlm", 32, 1, 2e-5, "cosine", 0.03, 1024),
        ("llama_alpaca", 128, 12, 2e-4, "linear", 0.0, 768),
        ("quickstart", 16, 1.5, 3e-3, "linear", 0.1, 128),
    ],
)
def test_published_schedule(name, batch, epochs, rate, schedule, warmup, length):
    recipe = load_recipe(name).recipe
    train = recipe.train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == batch
    assert (train.num_train_epochs, train.learning_rate) == (epochs, rate)
    assert (train.lr_scheduler_type, train.warmup_ratio) == (schedule, warmup)
    assert (train.weight_decay, recipe.data.max_length) == (0.0, length)


def test_commonsense_sets_stand_in_the_published_order():
    sources = load_recipe("llama_commonsense").recipe.data.train
    assert [Path(source.path).parent.name for source in sources] == [
        "boolq",
        "piqa",
        "social_i_qa",
        "hellaswag",
        "winogrande",
        "ARC-Easy",
        "ARC-Challenge",
        "openbookqa",
    ]


@pytest.mark.parametrize("name", ["vit_fgvc", "vit_vtab"])
def test_published_vision_setting(name):
    recipe = load_recipe(name).recipe
    adapter, train = recipe.adapter, recipe.train
    assert (adapter.r, adapter.alpha, adapter.init) == (16, 16, "psi_zero")  # scale 1
    assert adapter.target_modules == ["attention.output.dense"]  # in every version of transformers
    assert (train.per_device_train_batch_size, train.num_train_epochs) == (64, 100)
    assert train.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert train.warmup_ratio * train.num_train_epochs == 10
    assert recipe.model.drop_path_rate == 0.1
    assert recipe.sweep == {
        "train.learning_rate": [1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3],
        "train.weight_decay": [0.01, 0.001, 0.0001, 0],
    }
    assert recipe.data.image_transform == {"vit_fgvc": "crop_flip", "vit_vtab": "resize"}[name]


def test_published_glue_setting():
    recipe = load_recipe("roberta_glue").recipe
    assert (recipe.adapter.r, recipe.adapter.target_modules) == (32, ["query", "value"])
    assert (recipe.data.max_length, recipe.train.per_device_train_batch_size) == (512, 64)
    assert recipe.train.warmup_ratio == 0.06
    assert (recipe.adapter.alpha, recipe.adapter.init) == (32, "psi_zero")
    assert (recipe.train.max_grad_norm, recipe.train.load_best_model_at_end) == (0, True)
    assert recipe.sweep == {"seed": [42, 43, 44, 45, 46]}


# RoBERTa's positions begin after its padding id: 514 of them make a context of 512.
ROBERTA = RobertaConfig(num_labels=2, max_position_embeddings=514)


@pytest.mark.parametrize(
    ("name", "config", "head", "expected"),
    [
        ("vit_fgvc", ViTConfig(num_labels=200), 768 * 200 + 200, 24_576),
        ("roberta_glue", ROBERTA, 768 * 768 + 768 + 768 * 2 + 2, 98_304),
    ],
)
def test_published_counts_beside_the_head(tmp_path, name, config, head, expected):
    config.save_pretrained(tmp_path)
    found = plan(name, [f"model.name_or_path={tmp_path}"])
    assert found.groups[-1].num_parameters == head
    assert found.trainable_parameters - head == expected
    assert found.num_rows is None  # the data are not here, and the reason is told
    assert any("rows and steps" in reason for reason in found.unknown)
