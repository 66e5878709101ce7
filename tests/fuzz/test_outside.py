"""Folders from elsewhere: nothing is read outside of them or unpickled, none of their code runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import load_adapter_files
from wegeft_cli.artifacts.checkpoint import load_checkpoint
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.errors import UserError
from wegeft_cli.inference.generate import generate
from wegeft_cli.merging.merge import merge
from wegeft_cli.models.loading import load_config, load_model, load_tokenizer
from wegeft_cli.reporter import SilentReporter
from wegeft_cli.runs.train import train

INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(llama_dir, tmp_path) -> Path:
    return shutil.copytree(llama_dir, tmp_path / "base")


@pytest.fixture
def sharded(build_llama_dir, tmp_path) -> Path:
    return shutil.copytree(build_llama_dir(max_shard_size="30KB"), tmp_path / "sharded")


class Listener(SilentReporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_recipe_in) -> Path:
    """A finished run with a checkpoint. Only to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    train(write_recipe_in(folder, train={"max_steps": 1, "save_steps": 1}))
    return folder / "runs" / "tiny"


@pytest.mark.parametrize("name", ["../outside/s.safetensors", "absolute", "a/../../outside/s"])
@pytest.mark.parametrize("read", [fingerprint_base, merge, lambda folder: load_model(str(folder))])
def test_a_shard_s_name_leads_nowhere_else(sharded, trained, tmp_path, name, read):
    """The shard outside is the right one: only its name is at fault."""
    outside = tmp_path / "outside"
    outside.mkdir()
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shutil.move(shard, outside / "s.safetensors")
    shutil.copy(outside / "s.safetensors", outside / "s")
    index = json.loads((sharded / INDEX).read_text())
    told = str(outside / "s.safetensors") if name == "absolute" else name
    index["weight_map"] = {
        key: told if value == shard.name else value for key, value in index["weight_map"].items()
    }
    (sharded / INDEX).write_text(json.dumps(index))
    if read is merge:
        read = partial(merge, trained, output=tmp_path / "out", base=str(sharded))
        arguments = []
    else:
        arguments = [sharded]
    with pytest.raises(UserError) as caught:
        read(*arguments)
    assert "is no name of a safetensors file in this folder" in str(caught.value)
    assert not (tmp_path / "out").exists()


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "adapter config": ("adapter/adapter_config.json", load_adapter_files),
    "adapter weights": ("adapter/adapter_model.safetensors", load_adapter_files),
    "adapter type": ("adapter/adapter_config.json", Adapter.open),
    "checkpoint": ("checkpoints/step-00000001/state.json", load_checkpoint),
    "base fingerprint": ("base/model.safetensors", fingerprint_base),
    "base weights": ("base/model.safetensors", lambda folder: load_model(str(folder))),
    "base config": ("base/config.json", lambda folder: load_config(str(folder))),
    "tokenizer": ("base/tokenizer.json", lambda folder: load_tokenizer(str(folder))),
    "card": ("adapter/README.md", load_adapter_files),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_link_that_leads_out_of_its_folder_is_refused(trained, llama_dir, tmp_path, kind):
    name, read = READERS[kind]
    world = shutil.copytree(trained, tmp_path / "world")
    shutil.copytree(llama_dir, world / "base")
    file = world / name
    read(file.parent)
    secret = tmp_path / "secret"
    shutil.move(file, secret)
    file.symlink_to(secret)
    with pytest.raises(UserError, match="leads out of its folder") as caught:
        read(file.parent)
    assert caught.value.file == str(file)
    file.unlink()
    shutil.move(secret, file.parent / "beside")
    file.symlink_to("beside")
    if kind not in ("checkpoint",):  # a link within the folder is as good as the file
        read(file.parent)


def test_the_hub_s_cache_is_made_of_links_and_read(llama_dir, tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(llama_dir, cache / "blobs")
    for path in (cache / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert fingerprint_base(snapshot) == fingerprint_base(llama_dir)
    load_model(str(snapshot))
    load_tokenizer(str(snapshot))
    # Whoever made the cache may well lead out of it.
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(llama_dir / "config.json")
    with pytest.raises(UserError, match="leads out of its folder"):
        load_model(str(snapshot))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_model_in_pickles_alone_is_refused(base, tmp_path):
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "burst")))
    torch.save({"x": Bomb(tmp_path / "burst")}, base / "pytorch_model-00001-of-00001.bin")
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(str(base))
    assert not (tmp_path / "burst").exists()


@pytest.mark.parametrize("kind", ["wegeft", "lora"])
def test_an_adapter_in_a_pickle_is_refused(trained, write_recipe, tmp_path, kind):
    recipe = write_recipe(adapter={"type": kind}, train={"max_steps": 1})
    run = Path(train(recipe).run_dir)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "burst")}, run / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        generate(run, prompts=["x"])
    assert not (tmp_path / "burst").exists()


def give_code(base: Path, canary: Path) -> None:
    """Give a model folder code of its own, which leaves a mark."""
    (base / "own.py").write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (base / "config.json").write_text(json.dumps(config))


def test_code_of_a_model_runs_only_if_the_recipe_says_so(
    base, trained, tmp_path, monkeypatch, listener
):
    """The canary shows that the code would run, and that it does where the run's recipe allows."""
    modules = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(modules, str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    canary = tmp_path / "ran"
    give_code(base, canary)
    for read in (load_config, load_model):
        with pytest.raises(UserError) as caught:
            read(str(base))
        assert "model.trust_remote_code" in str(caught.value)
    run = shutil.copytree(trained, tmp_path / "run")
    for asked in (base, run):
        with pytest.raises(UserError, match="trust_remote_code"):
            generate(asked, prompts=["x"], base=str(base), reporter=listener)
    assert not canary.exists()
    assert not listener.warnings
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["trust_remote_code"] = True
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with suppress(UserError):  # what the code makes of it is its own matter
        generate(run, prompts=["x"], base=str(base), reporter=listener, max_new_tokens=1)
    assert canary.exists()
    assert "code that comes with the model runs" in listener.warnings[0]


@pytest.mark.parametrize("key", ["megatron_config", "tokenizer_kwargs"])
def test_a_module_that_an_adapter_names_is_not_imported(write_recipe, tmp_path, monkeypatch, key):
    recipe = write_recipe(adapter={"type": "lora"}, train={"max_steps": 1})
    run = Path(train(recipe).run_dir)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = run / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"megatron_core": "evil", key: {"x": 1}}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        generate(run, prompts=["x"])
    assert caught.value.key == key
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% for x in range(10**12) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(base, tmp_path, text):
    (base / "chat_template.jinja").write_text(text)
    with pytest.raises(UserError, match="chat template"):
        generate(base, prompts=["x"], max_new_tokens=1)


def test_a_recipe_s_yaml_makes_no_objects(write_recipe, tmp_path):
    recipe = write_recipe()
    mark = f"!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']"
    recipe.write_text(recipe.read_text().replace("seed: 7", f"seed: {mark}"))
    with pytest.raises((UserError, ExceptionGroup)):
        train(recipe)
    assert not (tmp_path / "made").exists()
