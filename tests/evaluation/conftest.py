from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wegeft_cli.evaluation.text.loading import TEST_SETS, Questions, load_questions

WriteSet = Callable[..., Path]


@pytest.fixture
def write_set(tmp_path: Path) -> WriteSet:
    """Writes rows as <data dir>/<folder>/<file> and gives the data dir."""

    def write(folder: str, rows: Sequence[Any], file: str = "test.json") -> Path:
        path = tmp_path / "data" / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".json"):
            text = json.dumps(list(rows))
        else:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return tmp_path / "data"

    return write


@pytest.fixture
def make_data(write_set: WriteSet) -> Callable[..., Questions]:
    """A task's data from (instruction, answer) pairs."""

    def make(name: str, pairs: Sequence[tuple[str, str]], limit: int | None = None) -> Questions:
        rows = [
            {"instruction": instruction, "input": "", "output": "", "answer": answer}
            for instruction, answer in pairs
        ]
        task = TEST_SETS[name]
        return load_questions(task, data_dir=write_set(task.folder, rows), limit=limit)

    return make


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A byte-level tokenizer that puts <s> in front, with or without a padding token."""

    def make(pad_token: str | None = None) -> PreTrainedTokenizerFast:
        specials = ["<pad>", "<s>", "</s>"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.add_special_tokens(specials)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token=pad_token,
            clean_up_tokenization_spaces=False,
        )

    return make


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """Two random layers in float32, with a context of 128."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)
