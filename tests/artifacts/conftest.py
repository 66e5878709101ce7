"""Small real objects on disk: Llama bases, an adapter."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli.artifacts.adapter_files import save_adapter_files
from wegeft_cli.artifacts.manifest import AdapterManifest, ModuleEntry

RANK = 2
WIDTH = 16


@pytest.fixture(scope="session")
def make_base(tmp_path_factory):
    """A function that writes a two-layer Llama and returns its folder."""

    def make(*, max_shard_size="5GB", tied=False, dtype=torch.float32):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        folder = tmp_path_factory.mktemp("base")
        model = LlamaForCausalLM(config).to(dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make


@pytest.fixture(scope="session")
def base_dir(make_base):
    return make_base()


@pytest.fixture(scope="session")
def sharded_dir(make_base):
    folder = make_base(max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def manifest():
    modules = {
        f"model.layers.{n}.self_attn.{kind}_proj": (ModuleEntry(f"{kind}_proj"),)
        for n in range(2)
        for kind in "qv"
    }
    modules["fused.qkv"] = (
        ModuleEntry("q_proj", ((0, 8), (24, 32))),
        ModuleEntry("v_proj", ((16, 24),)),
    )
    return AdapterManifest(
        task_type="CAUSAL_LM",
        base_model_name_or_path="some/base",
        revision=None,
        base_fingerprint="sha256:" + "0" * 64,
        r=RANK,
        alpha=4.0,
        scale=2.0,
        side="input",
        share="module_type",
        dropout=0.1,
        init="phi_zero",
        modules=modules,
        target_modules=("q_proj", "v_proj"),
        wegeft_version="0.1.0",
    )


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(1)
    return {
        group: (
            torch.randn(WIDTH, RANK, generator=generator),
            torch.randn(RANK, WIDTH, generator=generator),
        )
        for group in ("q_proj", "v_proj")
    }


@pytest.fixture
def saving_manifest(manifest):
    """The manifest of an adapter that trained a module whole too."""
    return replace(manifest, modules_to_save=("score",), init_from="runs/earlier")


@pytest.fixture
def adapter_dir(tmp_path, saving_manifest, factors):
    folder = tmp_path / "adapter"
    saved = {"score.weight": torch.ones(3, WIDTH)}
    save_adapter_files(folder, saving_manifest, factors, saved_modules=saved, card="# A card\n")
    return folder


@pytest.fixture
def hash_folder():
    """A function: every file of a folder -> the hash of its bytes."""

    def hash_all(folder: Path):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        }

    return hash_all


@pytest.fixture
def names_in():
    """A function: the names in a folder, hidden ones too."""
    return lambda folder: sorted(path.name for path in folder.iterdir())
