"""The base comes from a folder, a GGUF file or a hub; what is missing or unsafe is told."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig

from wegeft_cli.errors import UserError
from wegeft_cli.models.base_folder import find_base_folder
from wegeft_cli.models.loading import (
    build_meta_model,
    fetch_base_folder,
    load_config,
    load_model,
    load_tokenizer,
    pad_token_id,
)

LOADERS = [load_config, load_model, load_tokenizer]


@pytest.mark.parametrize("load", LOADERS)
def test_a_missing_folder_is_told(tmp_path, load):
    for path in (tmp_path / "gone", "./gone", "~/no-such-model-here/x"):
        with pytest.raises(UserError, match="no folder") as caught:
            load(str(path))
        assert caught.value.key == "model.name_or_path"


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_without_config_is_told(tmp_path, load):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", LOADERS)
def test_a_file_that_is_no_gguf_is_told(tmp_path, load):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="neither a model folder nor a GGUF file"):
        load(str(file))


def test_a_gguf_file_that_is_none_is_told(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not one" * 10)
    with pytest.raises(UserError, match="cannot load the model"):
        load_config(str(file))


def test_a_gguf_file_has_no_folder_to_merge_into(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x")
    assert find_base_folder(str(file)) is None
    with pytest.raises(UserError, match="is a single file") as caught:
        fetch_base_folder(str(file))
    assert "save_pretrained" in caught.value.hint


@pytest.mark.parametrize("load", LOADERS)
def test_a_hub_id_out_of_reach_is_told(load):
    """Tests are offline (tests/conftest.py), and no cache holds this."""
    with pytest.raises(UserError, match="cannot load the") as caught:
        load("no-such-org/no-such-model")
    assert "network" in caught.value.hint
    assert find_base_folder("no-such-org/no-such-model") is None


def test_a_folder_is_its_own(llama_dir):
    assert find_base_folder(str(llama_dir)) == llama_dir
    assert fetch_base_folder(str(llama_dir)) == llama_dir


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma", "roberta"])
def test_a_folder_without_tokenizer_is_told(tmp_path, family):
    """For most of these transformers would make one that knows its special tokens alone."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


class Bomb:
    """Unpickling one makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_are_refused_unread(llama_dir, tmp_path):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(tmp_path / "went-off")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(str(folder))
    assert not (tmp_path / "went-off").exists()


def test_damaged_weights_are_told(llama_dir, tmp_path):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(str(folder))


def write_custom_code(folder, mark):
    """A model folder whose own code, if it ran, would leave a mark."""
    (folder / "configuration_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_models_own_code_does_not_run(llama_dir, tmp_path):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    write_custom_code(folder, tmp_path / "ran")
    for load in (load_config, load_model):
        with pytest.raises(UserError) as caught:
            load(str(folder))
        assert "model.trust_remote_code" in caught.value.hint
    assert not (tmp_path / "ran").exists()


def test_config_alone_is_enough_for_a_model_without_weights(build_llama_dir):
    folder = build_llama_dir(weights=False)
    model = build_meta_model(load_config(str(folder)))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(str(folder))


def test_what_is_no_language_model_is_told():
    with pytest.raises(UserError, match="no causal language model"):
        build_meta_model(AutoConfig.for_model("vit"))


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_type_of_the_weights(build_llama_dir, stored, asked, expected):
    model = load_model(str(build_llama_dir(dtype=stored)), dtype=asked)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert not model.training


def test_attention_kernel_is_as_asked(llama_dir):
    for name in ("eager", "sdpa"):
        model = load_model(str(llama_dir), attn_implementation=name)
        assert model.config._attn_implementation == name
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(str(llama_dir), attn_implementation="no_such_kernel")


@pytest.mark.parametrize(("pad", "expected"), [(None, 2), ("<pad>", 3), ("</s>", 2)])
def test_there_is_always_something_to_pad_with(build_llama_dir, pad, expected):
    assert pad_token_id(load_tokenizer(str(build_llama_dir(pad=pad)))) == expected


def test_loading_says_nothing(llama_dir, capfd):
    load_model(str(llama_dir))
    load_tokenizer(str(llama_dir))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_partly_filled_hub_cache_is_not_taken_for_the_model(tmp_path, monkeypatch):
    """The whole model is asked for, whatever `plan` left in the cache."""
    import huggingface_hub

    asked = []

    def fake(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert fetch_base_folder("owner/name", "v1") == tmp_path
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("owner/name", "v1")
    assert "*.safetensors" in patterns
