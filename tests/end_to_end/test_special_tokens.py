"""`model.special_tokens` holds in training, inference, merged models and exports."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from transformers import AutoTokenizer, GenerationConfig

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.data.text.dataset import build_datasets
from wegeft_cli.data.text.tokenizer import describe_tokenizer
from wegeft_cli.errors import UserError
from wegeft_cli.exporting.export import ExportOptions, export
from wegeft_cli.generation.stopping import stop_token_ids
from wegeft_cli.inference.defaults import GREEDY
from wegeft_cli.inference.loaded_model import ModelTarget
from wegeft_cli.merging.merge import merge
from wegeft_cli.models.base_folder import special_token_files
from wegeft_cli.models.loading import load_tokenizer, load_tokenizer_of
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.runs.train import train

TOKENS = {"eos_token": "<pad>", "pad_token": "<pad>"}
PAD, END = 3, 2
ROWS = [{"instruction": f"Say {n}", "output": f"{n}"} for n in range(4)]


@pytest.fixture(scope="module")
def trained(write_recipe_in, tmp_path_factory):
    """A function: the run of a method with these tokens."""
    runs = {}

    def run(method="wegeft", **model):
        key = (method, *model)
        if key not in runs:
            recipe = write_recipe_in(
                tmp_path_factory.mktemp("tokens"),
                rows=ROWS,
                model={"special_tokens": TOKENS, **model},
                adapter={"type": method},
                data={"max_length": 256},
                train={"max_steps": 1},
            )
            if method == "full":
                values = yaml.safe_load(recipe.read_text())
                recipe.write_text(yaml.safe_dump({**values, "adapter": {"type": method}}))
            runs[key] = train(recipe)
        return runs[key]

    return run


def test_rows_end_in_the_chosen_token_and_learn_it_although_it_pads(trained):
    recipe = load_recipe(trained().run_dir / "recipe.yaml").recipe
    tokenizer = load_tokenizer_of(recipe.model)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (PAD, PAD)
    ids, learned = build_datasets(recipe.data, tokenizer=tokenizer, recipe_dir=None).train.row(0)
    assert (ids[-1], bool(learned[-1])) == (PAD, True)


def test_texts_become_the_same_tokens(llama_dir):
    own = load_tokenizer(str(llama_dir))
    changed = load_tokenizer(str(llama_dir), special_tokens=TOKENS)
    assert describe_tokenizer(changed)["backend"] == describe_tokenizer(own)["backend"]
    assert changed("<s>a <pad>b</s>").input_ids == own("<s>a <pad>b</s>").input_ids


@pytest.mark.parametrize("method", ["wegeft", "lora", "full"])
def test_adapter_and_merged_model_have_them_without_the_recipe(trained, method, tmp_path):
    run_dir = trained(method).run_dir
    apart = shutil.copytree(run_dir / "adapter", tmp_path / "apart")
    assert Adapter.open(apart).special_tokens == TOKENS
    loaded = ModelTarget.resolve(apart, None).load()
    assert stop_token_ids(loaded.model, loaded.tokenizer, GREEDY) == [PAD, END]
    assert loaded.tokenizer.pad_token_id == PAD
    folder = merge(apart, output=tmp_path / "merged").output_dir
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert describe_tokenizer(tokenizer) == describe_tokenizer(loaded.tokenizer)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == ([PAD, END], PAD)
    config = json.loads((folder / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (PAD, PAD, 1)
    merged = ModelTarget.resolve(folder, None).load()
    assert stop_token_ids(merged.model, merged.tokenizer, GREEDY) == [PAD, END]


def test_without_a_generation_config_the_configs_end_tokens_stay(llama_dir, tmp_path):
    folder = shutil.copytree(llama_dir, tmp_path / "base")
    (folder / "generation_config.json").unlink()
    tokenizer = load_tokenizer(str(folder))
    for tokens, ends in (({"pad_token": "<pad>"}, END), ({"eos_token": "<pad>"}, [PAD, END])):
        files = special_token_files(folder, tokenizer, tokens)
        assert json.loads(files["generation_config.json"])["eos_token_id"] == ends


def test_merged_model_has_tokens_and_the_trained_form(trained, tmp_path):
    folder = merge(trained().run_dir, chat_template="trained", output=tmp_path / "m").output_dir
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<pad>"
    assert "### Response" in tokenizer.chat_template


def test_an_exported_lora_brings_tokenizer_and_stop_tokens(trained, tmp_path):
    options = ExportOptions(parity=False)
    folder = export(
        trained().run_dir, format="lora", output=tmp_path / "lora", options=options
    ).output_dir
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<pad>"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [PAD, END]
    assert Adapter.open(folder).special_tokens == TOKENS


def test_a_served_adapter_stops_at_them(trained):
    pytest.importorskip("uvicorn")
    pytest.importorskip("transformers.cli.serving")
    from wegeft_cli.inference.serving.targets import read_targets
    from wegeft_cli.inference.serving.transformers_server import load_models

    targets = read_targets(trained().run_dir, [], None)
    served = load_models(targets, as_trained=True, warn=lambda text: None)
    config = next(iter(served.values())).model.generation_config
    assert (config.eos_token_id, config.pad_token_id) == ([PAD, END], PAD)


def test_a_new_token_and_another_name_are_refused(write_recipe, trained, llama_dir, tmp_path):
    for tokens, message in (
        ({"eos_token": "<new>"}, "the tokenizer has no token '<new>'"),
        ({"eos_tokn": "</s>"}, "did you mean `eos_token`"),
        ({"pad_token": ""}, "is empty"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            train(write_recipe(model={"special_tokens": tokens}))
        assert caught.value.key.startswith("model.special_tokens")
    plain = train(
        write_recipe(name="plain", adapter={"target_modules": ["q_proj"], "r": 2}),
        ["train.max_steps=1"],
    )
    with pytest.raises(UserError, match="trained with different special tokens"):
        merge([trained().run_dir, plain.run_dir], output=tmp_path / "merged")


def test_a_begin_token_that_texts_would_not_begin_with_is_refused(llama_dir, tmp_path):
    folder = shutil.copytree(llama_dir, tmp_path / "base")
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    begin = values["added_tokens"][0]
    token = {"id": begin["content"], "ids": [begin["id"]], "tokens": [begin["content"]]}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": begin["content"], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {begin["content"]: token},
    }
    file.write_text(json.dumps(values))
    config = folder / "tokenizer_config.json"
    named = json.loads(config.read_text())
    config.write_text(json.dumps({**named, "bos_token": begin["content"]}))
    other = values["added_tokens"][1]["content"]
    assert load_tokenizer(str(folder))("a").input_ids[0] == begin["id"]
    with pytest.raises(UserError, match="in front of every text"):
        load_tokenizer(str(folder), special_tokens={"bos_token": other})
