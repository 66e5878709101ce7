"""What was read is not read again, and the answers are those of a fresh reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import Prompts, generate_texts
from wegeft_cli.generation.kv_cache import PrefixCache

NUM_NEW = 18  # a round and a bit
TALK = ["a question", " the next one", " and a third, the longest", " end"]


def widths_of(model: Any) -> list[int]:
    """The lengths that the model is made to read from now on."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    return seen


def say_letters(model: Any, tokenizer: Any) -> None:
    """Let a random model write nothing but letters, which are tokenised again as they were."""
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz ", add_special_tokens=False)["input_ids"]
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.fill_(-1e4)
        head.bias[letters] = 0.0
    model.lm_head = head


@pytest.mark.parametrize(
    "drawing", [{}, {"temperature": 0.9, "repetition_penalty": 1.2}], ids=["greedy", "drawn"]
)
def test_a_talk_goes_on_behind_what_was_read(
    llama: Any, make_tokenizer: Callable[..., Any], drawing: dict[str, Any]
) -> None:
    tokenizer = make_tokenizer()
    say_letters(llama, tokenizer)
    decoding = Decoding(NUM_NEW, **drawing)
    reading, text = PrefixCache(), ""
    seen = widths_of(llama)
    for number, said in enumerate(TALK):
        text = text[-60:] + said if number == 3 else text + said  # at last the talk is cut
        ask = {"batch_size": 1, "decoding": decoding}
        prompts = Prompts([text], sample_ids=[number])
        fresh = generate_texts(llama, tokenizer, prompts, **ask)
        whole = seen[0]
        seen.clear()
        told = generate_texts(llama, tokenizer, prompts, prefix_cache=reading, **ask)
        assert told.completions == fresh.completions
        if number in (1, 2):
            # The last token that was written has not been read yet.
            assert seen[0] == len(tokenizer(said, add_special_tokens=False)["input_ids"]) + 1
        else:
            assert seen[0] == whole - (number == 3)  # only the begin-of-text token is in common
        seen.clear()
        text += fresh.new_texts[0]
        assert len(tokenizer(text)["input_ids"]) < llama.config.max_position_embeddings - NUM_NEW


def test_the_same_prompt_again_reads_one_token(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer, reading = make_tokenizer(), PrefixCache()
    ask: dict[str, Any] = {"decoding": Decoding(NUM_NEW), "batch_size": 1}
    first = generate_texts(llama, tokenizer, TALK[:1], prefix_cache=reading, **ask)
    seen = widths_of(llama)
    again = generate_texts(llama, tokenizer, TALK[:1], prefix_cache=reading, **ask)
    assert again.completions == first.completions
    assert set(seen) == {1}


def test_an_interrupted_answer_leaves_no_half_reading(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer, reading = make_tokenizer(), PrefixCache()
    ask: dict[str, Any] = {"batch_size": 1, "decoding": Decoding(NUM_NEW)}
    fresh = generate_texts(llama, tokenizer, TALK[:1], **ask)
    calls: list[int] = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 18:  # in the second round
            raise KeyboardInterrupt

    # Between the two layers: one of them has read a token more than the other.
    handle = llama.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        generate_texts(llama, tokenizer, TALK[:1], prefix_cache=reading, **ask)
    handle.remove()
    seen = widths_of(llama)
    told = generate_texts(llama, tokenizer, TALK[:1], prefix_cache=reading, **ask)
    assert told.completions == fresh.completions
    assert seen[0] == 1  # what the first round had read still counts


def test_a_cache_that_forgets_is_not_gone_on_with(make_tokenizer: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        sliding_window=8, initializer_range=0.4,
    )  # fmt: skip
    model, tokenizer, reading = MistralForCausalLM(config), make_tokenizer(), PrefixCache()
    seen, text = widths_of(model), ""
    for said in TALK[:2]:
        text += said
        ask: dict[str, Any] = {"batch_size": 1, "decoding": Decoding(NUM_NEW)}
        seen.clear()
        told = generate_texts(model, tokenizer, [text], prefix_cache=reading, **ask)
        assert seen[0] == len(tokenizer(text)["input_ids"])
        assert told.completions == generate_texts(model, tokenizer, [text], **ask).completions
        text += told.new_texts[0]
