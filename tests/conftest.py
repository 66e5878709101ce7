"""Small real objects that several rooms need: a Llama's folder, a recipe, rows of a test set."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub, which reads it once: no test asks a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell ignores Ctrl-C for what it puts in the background, nohup a closed terminal; children
# inherit both.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import preloaded
import pytest
import torch
import yaml
from kept_traces import keep_traces
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TINY_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large enough that the model's outputs, and so a test's differences, are far from noise.
    "initializer_range": 0.3,
}
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]


@pytest.fixture(scope="session", autouse=True)
def _without_waste() -> Iterator[None]:
    """Let equal runs share their passes without values, and do not wait for the disk.

    No power fails during these tests, and a run calls fsync some forty times.
    """
    with pytest.MonkeyPatch.context() as patch:
        keep_traces(patch.setattr)
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One CPU thread here and in processes started from here: sums of the same bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A function: a byte-level BPE that adds BOS; `pad` is its padding token, eos too, or None."""

    def build(pad: str | None = "</s>") -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(
            [
                "Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request. ### Instruction: ### Response:",
                "the correct answer is true false solution1 solution2",
            ]
            * 4,
            trainers.BpeTrainer(
                vocab_size=380,
                special_tokens=SPECIALS,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            ),
        )
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token=pad
        )

    return build


@pytest.fixture(scope="session")
def build_llama_dir(tmp_path_factory, build_tokenizer) -> Callable[..., Path]:
    """A function that writes a two-layer Llama with its tokenizer and gives the folder.

    Equal arguments give the same folder: whoever changes files in it copies it first.
    """
    made: dict[str, Path] = {}

    def build(
        *,
        pad: str | None = "</s>",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        weights: bool = True,
        max_shard_size: str = "5GB",
        **changes: Any,
    ) -> Path:
        key = repr((pad, seed, dtype, weights, max_shard_size, sorted(changes.items())))
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp("llama")
            tokenizer = build_tokenizer(pad)
            tokenizer.save_pretrained(folder)
            config = LlamaConfig(
                **{**TINY_LLAMA, **changes},
                vocab_size=len(tokenizer),
                bos_token_id=1,
                eos_token_id=2,
                dtype=dtype,
            )
            config.architectures = ["LlamaForCausalLM"]
            if weights:
                torch.manual_seed(seed)
                model = LlamaForCausalLM(config)
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        # Zero biases, as in a new Llama, would hide a fold that forgets them.
                        torch.nn.init.normal_(parameter, std=0.3)
                model.to(dtype)
                model.save_pretrained(folder, max_shard_size=max_shard_size)
            else:
                config.save_pretrained(folder)
        return made[key]

    return build


@pytest.fixture(scope="session")
def llama_dir(build_llama_dir) -> Path:
    """The usual base: float32, its tokenizer pads with eos. Only to be read."""
    return build_llama_dir()


@pytest.fixture(scope="session")
def unequal_rows() -> list[dict[str, str]]:
    """Ten prompt-completion rows whose learned tokens number 2 to 20."""
    return [
        {"prompt": f"Q{n}:{' again' * (n % 3)}", "completion": f" {'ab' * n} {n}"}
        for n in range(1, 11)
    ]


@pytest.fixture(scope="session")
def write_recipe_in(llama_dir: Path, unequal_rows) -> Callable[..., Path]:
    """A function that writes a small recipe with its rows into a folder and gives its path.

    Sections are merged over a base that trains 6 steps of 4 rows; `name` is file and run name, and
    the run's folder is `<folder>/runs/<name>`.
    """

    def write(
        folder: Path,
        name: str = "tiny",
        *,
        rows: list[dict[str, Any]] | None = None,
        **sections: Any,
    ) -> Path:
        data_path = folder / f"{name}.jsonl"
        lines = unequal_rows if rows is None else rows
        data_path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        values: dict[str, Any] = {
            "seed": 7,
            "output_dir": str(folder / "runs" / name),
            "model": {"name_or_path": str(llama_dir)},
            "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            "data": {"train": [{"path": str(data_path)}], "max_length": 64},
            "train": {
                "per_device_train_batch_size": 4,
                "num_train_epochs": 2,
                "learning_rate": 0.01,
                # The default saves at nearly every step of so short a run.
                "save_steps": 0,
            },
        }
        for key, value in sections.items():
            if isinstance(value, dict):
                values[key] = {**values.get(key, {}), **value}
            else:
                values[key] = value
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session", autouse=True)
def _planned_recipe(tmp_path_factory, write_recipe_in) -> None:
    """Give forked processes the usual recipe, planned."""
    preloaded.planned = write_recipe_in(tmp_path_factory.mktemp("planned"))


@pytest.fixture
def write_recipe(tmp_path: Path, write_recipe_in) -> Callable[..., Path]:
    """`write_recipe_in` for the test's own folder."""
    return partial(write_recipe_in, tmp_path)


@pytest.fixture(scope="session")
def adapters_rows() -> list[dict[str, str]]:
    """Rows as LLM-Adapters lays them out (its boolq), written for these tests."""
    return [
        {
            "instruction": "Please answer the following question with true or false, "
            f"question: is {n} an even number?\n\nAnswer format: true/false",
            "input": "",
            "output": f"the correct answer is {str(n % 2 == 0).lower()}",
            "answer": str(n % 2 == 0).lower(),
        }
        for n in range(6)
    ]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, adapters_rows) -> Path:
    """A folder in the LLM-Adapters layout with the test set boolq. Only to be read."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "boolq").mkdir()
    (folder / "boolq" / "test.json").write_text(json.dumps(adapters_rows), encoding="utf-8")
    return folder
