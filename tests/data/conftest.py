"""Tiny real tokenizers for this room."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "Question: What is 12 + 30?\nAnswer: 42",
    "the correct answer is true",
    "the correct answer is false",
    "Below is an instruction that describes a task.\n\n### Response:\n",
    "Sum: \nthe thing is 7\n\nAnswer: the sum is 99.",
] * 4


def build_tokenizer(*, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that adds BOS, trims its offsets as Llama 3's does, and pads with EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    single = "<s> $A </s>" if adds_eos else "<s> $A"
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def eos_adding_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(adds_eos=True)


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    chat = build_tokenizer()
    chat.chat_template = CHATML
    return chat


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSONL and give the file."""

    def write(rows: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write
