"""Small runs for every task, started as a user starts them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import VIT_OUTPUT, write_bert, write_images, write_texts, write_vit
from classifiers import write_recipe as write_class_recipe
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from wegeft_cli.cli.app import app

# A function of task, folder and name that writes a recipe; sections are merged over it.
Write = Callable[..., Path]


@pytest.fixture(autouse=True, scope="module")
def _on_one_cpu() -> Iterator[None]:
    """Run on the CPU with one thread everywhere: golden numbers hold for that."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    patch.undo()


@pytest.fixture(scope="session")
def wegeft() -> Callable[..., Any]:
    """A function: run a command with --json in this process; the object that it prints."""

    def run(*words: object) -> Any:
        result = CliRunner().invoke(app, [*map(str, words), "--json"], input="")
        assert result.exit_code == 0, (words, result.stderr, result.exception)
        return json.loads(result.stdout)

    return run


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory, build_tokenizer) -> Path:
    """A two-layer GPT-2, whose linears have biases. Only to be read."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**size, **tokens)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_dir(tmp_path_factory) -> Path:
    return write_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory, build_tokenizer) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"), build_tokenizer(pad="<pad>"))


@pytest.fixture(scope="session")
def images_dir(tmp_path_factory) -> Path:
    splits = {
        "train": {"a": 6, "b": 6, "c": 6},
        "validation": {"a": 2, "b": 2, "c": 2},
        "test": {"a": 3, "b": 3, "c": 3},
    }
    return write_images(tmp_path_factory.mktemp("images"), splits)


@pytest.fixture(scope="session")
def write_run(write_recipe_in, vit_dir, bert_dir, images_dir) -> dict[str, Write]:
    """By task: a function of folder and name that writes a recipe of six steps."""
    steps = {"max_steps": 6, "learning_rate": 0.01, "save_steps": 0}

    def causal_lm(folder: Path, name: str, **sections: Any) -> Path:
        sections["train"] = {**steps, **sections.get("train", {})}
        return write_recipe_in(folder, name, **sections)

    def classify(task: str, folder: Path, name: str, **sections: Any) -> Path:
        is_image = task == "image_classification"
        if is_image:
            data: dict[str, Any] = {"image_transform": "resize"}
            source = {"path": str(images_dir)}
            data |= {part: [{**source, "split": part}] for part in ("train", "validation", "test")}
        else:
            rows = [
                {"text": f"the answer {word} {n}", "label": label}
                for n in range(6)
                for word, label in (("true", "yes"), ("false", "no"))
            ]
            path = write_texts(folder / f"{name}.jsonl", rows)
            data = {"max_length": 64}
            data |= {part: [{"path": str(path)}] for part in ("train", "validation", "test")}
        base, targets = (vit_dir, [VIT_OUTPUT]) if is_image else (bert_dir, ["query", "value"])
        sections["task"] = task
        sections["model"] = {"name_or_path": str(base), **sections.get("model", {})}
        sections["data"] = {**data, **sections.get("data", {})}
        sections["train"] = {**steps, **sections.get("train", {})}
        sections["adapter"] = {"target_modules": targets, **sections.get("adapter", {})}
        return write_class_recipe(folder, name, **sections)

    return {
        "causal_lm": causal_lm,
        "image_classification": partial(classify, "image_classification"),
        "sequence_classification": partial(classify, "sequence_classification"),
    }
