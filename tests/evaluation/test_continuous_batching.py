"""Rows leave a batch, draw by themselves, stop at texts: each writes as if alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from wegeft_cli.errors import UserError
from wegeft_cli.generation.completion import Completion
from wegeft_cli.generation.continuous_batching import caches_every_position, rows_can_leave
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import GenerationEvents, Prompts, generate_texts
from wegeft_cli.generation.sampling import PerSequenceSampler

PROMPTS = ["a", "a rather long prompt, the longest", "two words", "B" * 17, "?", "seven", "ab" * 11]
VOCABULARY = 259
NUM_NEW = 34  # two rounds and a bit
NUM_DRAWS = 4000
DRAW_SPREAD = 5  # standard deviations that a right share stays within


def write(model: Any, tokenizer: Any, batch_size: int, **decoding: Any) -> list[list[int]]:
    told = Decoding(**{"max_new_tokens": NUM_NEW, **decoding})
    return generate_texts(model, tokenizer, PROMPTS, told, batch_size=batch_size).new_ids


def build_bloom() -> Any:
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3
        )
    )


def build_gpt2() -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=128,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def build_mistral() -> Any:
    """Its layers see the last eight tokens alone, so that its cache holds no more."""
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        sliding_window=8, initializer_range=0.4,
    )  # fmt: skip
    return MistralForCausalLM(config)


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer("</s>")


@pytest.fixture(params=["llama", "gpt2", "bloom", "mistral"])
def model(request: pytest.FixtureRequest, llama: Any) -> Any:
    """One of several families: rotary, learned and ALiBi positions, a sliding window."""
    if request.param == "llama":
        return llama
    torch.manual_seed(1)
    return {"gpt2": build_gpt2, "bloom": build_bloom, "mistral": build_mistral}[request.param]()


@pytest.fixture
def ended_early(model: Any, tokenizer: Any) -> Any:
    """Makes a token that rows write at several places the end of text; gives the model."""
    written = write(model, tokenizer, 1)
    found = Counter(token for ids in written for token in set(ids[2:-2]))
    ends = [token for token, count in found.items() if 2 <= count < len(PROMPTS)]
    assert ends, "all rows write the same tokens"
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(min(ends))
    return model


def test_every_family_writes_what_each_prompt_alone_would(ended_early: Any, tokenizer: Any) -> None:
    expected = write(ended_early, tokenizer, 1)
    assert len({len(ids) for ids in expected}) > 1
    for batch_size in (2, 3, len(PROMPTS)):
        assert write(ended_early, tokenizer, batch_size) == expected


def test_rows_that_have_ended_leave_their_batch(llama: Any, tokenizer: Any) -> None:
    """Counted in forward passes: no row is computed once a round is over in which it ended."""
    expected = write(llama, tokenizer, 1)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(expected[0][3])
    expected = write(llama, tokenizer, 1)
    short = [len(ids) < NUM_NEW for ids in expected]
    assert any(short)
    assert not all(short)
    sizes: list[int] = []
    llama.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: sizes.append(args[0].shape[0])
    )
    assert rows_can_leave(llama)
    assert write(llama, tokenizer, 3) == expected
    computed = sum(sizes)
    static = 0
    longest_first = sorted(range(len(PROMPTS)), key=lambda i: -len(PROMPTS[i]))
    for start in range(0, len(PROMPTS), 3):
        batch = longest_first[start : start + 3]
        static += len(batch) * max(len(expected[index]) for index in batch)
    assert computed < static
    assert max(sizes) <= 3


def test_answers_are_told_as_they_come_and_each_once(llama: Any, tokenizer: Any) -> None:
    told: list[int] = []
    done: list[tuple[int, int]] = []

    def listen(answers: Mapping[int, Completion]) -> None:
        told.extend(answers)

    generations = generate_texts(
        llama,
        tokenizer,
        PROMPTS,
        Decoding(3),
        events=GenerationEvents(
            on_progress=lambda n, total: done.append((n, total)), on_completed=listen
        ),
        batch_size=2,
    )
    assert sorted(told) == list(range(len(PROMPTS)))
    assert done[-1] == (len(PROMPTS), len(PROMPTS))
    assert [n for n, _ in done] == sorted(n for n, _ in done)
    assert len(generations.completions) == len(PROMPTS)


def test_beams_are_those_of_one_prompt_and_differ_from_greed(llama: Any, tokenizer: Any) -> None:
    expected = write(llama, tokenizer, 1, num_beams=4, max_new_tokens=8)
    assert write(llama, tokenizer, 3, num_beams=4, max_new_tokens=8) == expected
    assert expected != write(llama, tokenizer, 1, max_new_tokens=8)
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        plain = llama.generate(
            **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False),
            num_beams=4,
            do_sample=False,
            max_new_tokens=8,
            pad_token_id=tokenizer.eos_token_id,
        )[0]
        assert plain[len(tokenizer(prompt)["input_ids"]) :].tolist()[: len(ids)] == ids


def test_a_draw_hangs_on_seed_and_number_alone(llama: Any, tokenizer: Any) -> None:
    drawing = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
    expected = write(llama, tokenizer, 1, **drawing)
    for batch_size in (2, len(PROMPTS)):
        assert write(llama, tokenizer, batch_size, **drawing) == expected
    assert write(llama, tokenizer, 2, **{**drawing, "seed": 6}) != expected
    some = [4, 1]
    alone = generate_texts(
        llama,
        tokenizer,
        Prompts([PROMPTS[index] for index in some], sample_ids=some),
        Decoding(NUM_NEW, **drawing),
        batch_size=2,
    )
    assert alone.new_ids == [expected[index] for index in some]
    twice = generate_texts(
        llama,
        tokenizer,
        Prompts([PROMPTS[0]] * 2, sample_ids=[0, 100]),
        Decoding(NUM_NEW, **drawing),
        batch_size=2,
    )
    assert twice.new_ids[0] == expected[0]
    assert twice.new_ids[1] != expected[0]


def test_draws_have_the_models_shares() -> None:
    """Ten thousand times one token, at temperature 2, of the three likeliest."""
    logits = torch.tensor([1.0, 3.0, 2.0, -4.0, 0.0])
    choose = PerSequenceSampler(Decoding(1, temperature=2.0, top_k=3))
    choose.sample_ids, choose.padding = list(range(NUM_DRAWS)), [0] * NUM_DRAWS
    ids = torch.zeros(NUM_DRAWS, 1, dtype=torch.long)
    drawn = choose(ids, logits.expand(NUM_DRAWS, -1)).argmax(-1)
    counts = torch.bincount(drawn, minlength=5) / NUM_DRAWS
    kept = torch.softmax(torch.tensor([1.0, 3.0, 2.0]) / 2, -1)
    expected = torch.tensor([*kept, 0.0, 0.0])
    spread = (expected * (1 - expected) / NUM_DRAWS).sqrt()
    assert ((counts - expected).abs() <= DRAW_SPREAD * spread).all()


def test_top_p_keeps_the_likeliest(llama: Any, tokenizer: Any) -> None:
    greedy = write(llama, tokenizer, 2)
    assert write(llama, tokenizer, 2, temperature=0.7, top_p=1e-6) == greedy
    assert write(llama, tokenizer, 2, temperature=1e-4) == greedy
    assert write(llama, tokenizer, 2, temperature=5.0, top_k=1) == greedy


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_penalties_do_not_see_the_padding(
    llama: Any, tokenizer: Any, penalty: dict[str, Any]
) -> None:
    expected = write(llama, tokenizer, 1, **penalty)
    assert expected != write(llama, tokenizer, 1)
    assert write(llama, tokenizer, 4, **penalty) == expected
    plain = llama.generate(
        **tokenizer(PROMPTS[1], return_tensors="pt", return_token_type_ids=False),
        do_sample=False,
        max_new_tokens=NUM_NEW,
        pad_token_id=tokenizer.eos_token_id,
        **penalty,
    )[0]
    start = len(tokenizer(PROMPTS[1])["input_ids"])
    assert plain[start:].tolist()[: len(expected[1])] == expected[1]


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(llama: Any, tokenizer: Any) -> None:
    whole = generate_texts(llama, tokenizer, PROMPTS, Decoding(NUM_NEW), batch_size=2)
    # A text somewhere inside the first answer, not at a round's end.
    first = whole.new_texts[0]
    stop = first[5:7]
    assert stop
    for batch_size in (1, 4):
        cut = generate_texts(
            llama,
            tokenizer,
            PROMPTS,
            Decoding(NUM_NEW, stop=("no such text", stop)),
            batch_size=batch_size,
        )
        for full, short, ids in zip(whole.new_texts, cut.new_texts, cut.new_ids, strict=True):
            assert short == full.split(stop)[0]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert (stop in text) == (stop in full)
            assert stop not in tokenizer.decode(ids[:-1], skip_special_tokens=True)
        assert cut.texts[0] == PROMPTS[0] + cut.new_texts[0]
        assert cut.settings["stop"] == ["no such text", stop]


def test_a_prompt_longer_than_the_protocols_loses_its_end(llama: Any, tokenizer: Any) -> None:
    cut = generate_texts(llama, tokenizer, PROMPTS, Decoding(4, max_prompt_tokens=5), batch_size=3)
    kept = [prompt[:4] for prompt in PROMPTS]  # and the begin-of-text token
    plain = generate_texts(llama, tokenizer, kept, Decoding(4), batch_size=3)
    assert cut.new_ids == plain.new_ids
    assert cut.settings["num_truncated_prompts"] == sum(len(prompt) > 4 for prompt in PROMPTS)


def test_a_model_whose_cache_cannot_be_parted_goes_batch_by_batch(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(llama, tokenizer, 3)
    monkeypatch.setattr(type(llama), "_is_stateful", True)
    assert not rows_can_leave(llama)
    assert write(llama, tokenizer, 3) == expected


def test_a_sliding_window_lets_rows_leave_but_keeps_no_prefix() -> None:
    assert rows_can_leave(build_mistral())
    assert not caches_every_position(build_mistral())


def test_the_settings_are_whole_and_hold_no_null() -> None:
    assert Decoding(7).settings() == {"do_sample": False, "num_beams": 1, "max_new_tokens": 7}
    told = Decoding(7, temperature=0.8, top_p=0.95, seed=3, max_prompt_tokens=768).settings()
    assert told["do_sample"] is True
    assert (told["temperature"], told["top_p"], told["top_k"], told["seed"]) == (0.8, 0.95, 0, 3)
    assert told["max_prompt_tokens"] == 768
    assert None not in told.values()
    with pytest.raises(UserError, match="out of range"):
        Decoding(0)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("5.23.0", "past_key_values"),
        ("5.24.0", "cache"),
        ("5.24.0.dev0", "cache"),
        ("6.0.0rc1", "cache"),
    ],
)
def test_the_cache_goes_under_the_name_of_the_installed_transformers(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, version: str, name: str
) -> None:
    expected = write(llama, tokenizer, 2)
    real = llama.generate
    names: set[str] = set()

    def generate(**named: Any) -> Any:
        found = {"cache", "past_key_values"} & named.keys()
        names.update(found)
        for each in found:
            named["past_key_values"] = named.pop(each)
        return real(**named)

    monkeypatch.setattr(llama, "generate", generate)
    monkeypatch.setattr("transformers.__version__", version)
    assert write(llama, tokenizer, 2) == expected
    assert names == {name}
