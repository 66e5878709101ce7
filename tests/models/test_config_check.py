"""A damaged config.json, and a tokenizer of another base, each raise one clear error."""

import json
import shutil

import pytest
from transformers import MambaConfig, SwinConfig, T5Config, ViTConfig

from wegeft_cli.errors import UserError
from wegeft_cli.inference.generate import generate
from wegeft_cli.inference.loaded_model import task_of_path
from wegeft_cli.models.config_check import check_config
from wegeft_cli.models.loading import load_config, load_model, load_tokenizer
from wegeft_cli.planning.plan import plan
from wegeft_cli.runs.train import train

DAMAGED = [
    ("architectures", -1),
    ("architectures", [1, "a"]),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", -1),
    ("hidden_size", 10**9),
    ("hidden_size", 0),
    ("vocab_size", 10**9),
    ("pad_token_id", 10**9),
    ("eos_token_id", "x"),
    ("sliding_window", "x"),
    ("sliding_window", []),
    ("num_labels", 10**9),
]


@pytest.fixture
def copy_of(llama_dir, tmp_path):
    def copy(**changes):
        folder = shutil.copytree(llama_dir, tmp_path / "base")
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return copy


@pytest.mark.parametrize(("key", "value"), DAMAGED)
def test_a_damaged_value_is_one_message(copy_of, write_recipe, key, value):
    folder = copy_of(**{key: value})
    recipe = write_recipe(model={"name_or_path": str(folder)})
    task_of_path(folder, None)
    for use in (
        lambda: load_model(str(folder)),
        lambda: plan(recipe),
        lambda: generate(str(folder), prompts=["a"], max_new_tokens=2),
    ):
        # `plan` also reports what the tokenizer cannot read of the file.
        with pytest.raises((UserError, ExceptionGroup)) as caught:
            use()
        found = getattr(caught.value, "exceptions", (caught.value,))
        assert all(isinstance(fault, UserError) for fault in found)


def test_the_value_and_the_file_are_named(copy_of):
    folder = copy_of(num_hidden_layers=10**9)
    with pytest.raises(UserError, match=r"`num_hidden_layers` is 1000000000; .* at most 10,000"
    ) as caught:  # fmt: skip
        load_config(str(folder))
    assert caught.value.file == str(folder / "config.json")


@pytest.mark.parametrize("config", [MambaConfig(), T5Config(), ViTConfig()])
def test_configurations_of_other_kinds_are_fine(config, tmp_path):
    check_config(config, None)
    config.save_pretrained(tmp_path)
    load_config(str(tmp_path))


@pytest.fixture
def enlarged(copy_of):
    """A base whose tokenizer has one token more than the base has embeddings."""

    def build(**options):
        folder = copy_of()
        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_special_tokens(options)
        tokenizer.save_pretrained(folder)
        return folder, len(tokenizer) - 1

    return build


ROWS = [{"prompt": f"Q{n}:{' again' * n}", "completion": f" {'ab' * n}x"} for n in range(4)]


def test_a_token_beyond_the_embeddings_is_named(enlarged, write_recipe):
    folder, last = enlarged(additional_special_tokens=["<|turn|>"])
    recipe = write_recipe(
        model={"name_or_path": str(folder)},
        rows=[*ROWS, {"prompt": "<|turn|>a", "completion": " b"}],
        train={"max_steps": 1},
    )
    message = f"token id {last}, and the model has {last} embeddings"
    for use in (
        lambda: plan(recipe),
        lambda: train(recipe),
        lambda: generate(str(folder), prompts=["<|turn|>a"], max_new_tokens=2),
    ):
        with pytest.raises(UserError, match=message) as caught:
            use()
        assert "resize_token_embeddings" in caught.value.hint


def test_a_padding_token_beyond_the_embeddings_is_of_no_matter(enlarged, write_recipe):
    folder, last = enlarged(pad_token="<|pad|>")
    assert load_tokenizer(str(folder)).pad_token_id == last
    recipe = write_recipe(model={"name_or_path": str(folder)}, rows=ROWS, train={"max_steps": 2})
    assert train(recipe).status == "finished"
    generate(str(folder), prompts=["a", "a b a b a b"], max_new_tokens=2)


def test_a_stage_of_endless_layers_is_refused():
    config = SwinConfig(depths=[1, 10**9])
    with pytest.raises(UserError, match=r"`depths` is \[1, 1000000000\]"):
        check_config(config, None)
    check_config(SwinConfig(), None)
