"""Draws, stop texts, ends and streams of single answers: each as its definition says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from wegeft_cli.errors import UserError
from wegeft_cli.generation.completion import GenerationResult
from wegeft_cli.generation.decoding import Decoding, sample_id
from wegeft_cli.generation.engine import GenerationEvents, Prompts, generate_texts
from wegeft_cli.generation.sampling import PerSequenceSampler
from wegeft_cli.generation.stopping import cut_at_stop

PROMPTS = ["a", "a rather long prompt, the longest of all", "two words", "B" * 17]
NUM_NEW = 20  # a round and a bit
PLAIN = Decoding(NUM_NEW)
DRAWN = replace(PLAIN, temperature=0.9, top_k=50, top_p=0.95, min_p=0.001)
# A draw follows its distribution: at 4,000 draws an error of five standard deviations.
NUM_DRAWS, WIDE = 4000, 5.0


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    batch_size: int = 1,
    decoding: Decoding = PLAIN,
    on_text: Any = None,
    **options: Any,
) -> GenerationResult:
    return generate_texts(
        model,
        tokenizer,
        Prompts(prompts, **options),
        decoding,
        batch_size=batch_size,
        events=GenerationEvents(on_text=on_text),
    )


@pytest.mark.parametrize(
    "decoding", [DRAWN, replace(DRAWN, repetition_penalty=1.3, seed=5)], ids=["drawn", "penalised"]
)
def test_a_batch_draws_what_each_prompt_alone_would(
    llama: Any, make_tokenizer: Callable[..., Any], decoding: Decoding
) -> None:
    tokenizer = make_tokenizer("</s>")
    alone = [
        generate(llama, tokenizer, [prompt], decoding=decoding, sample_ids=[number]).new_ids[0]
        for number, prompt in enumerate(PROMPTS)
    ]
    for batch_size in (2, 4):
        assert generate(llama, tokenizer, PROMPTS, batch_size, decoding=decoding).new_ids == alone
    assert alone != generate(llama, tokenizer, PROMPTS).new_ids


def test_the_first_answer_has_its_prompts_number_and_no_two_share_one() -> None:
    numbers = [sample_id(index, sample) for index in range(50) for sample in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert [sample_id(index, 0) for index in range(50)] == list(range(50))


def test_min_p_leaves_what_reaches_its_share_of_the_likeliest() -> None:
    """Against the definition, on shares of which 0.3 lies just under half of the first."""
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for min_p, kept in ((0.61, 1), (0.59, 2), (0.29, 3), (0.01, 4)):
        choose = PerSequenceSampler(Decoding(1, temperature=1.0, min_p=min_p))
        choose.sample_ids, choose.padding = list(range(NUM_DRAWS)), [0] * NUM_DRAWS
        ids = torch.zeros(NUM_DRAWS, 1, dtype=torch.long)
        drawn = choose(ids, shares.log().expand(NUM_DRAWS, -1)).argmax(-1)
        assert set(drawn.tolist()) == set(range(kept))


def test_a_stopping_text_ends_the_row_and_is_no_part_of_it(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer("<pad>")
    whole = generate(llama, tokenizer, PROMPTS)
    # Two characters out of the middle of one answer, which other answers may hold or not.
    stop = whole.new_texts[0][5:7]
    told = generate(
        llama, tokenizer, PROMPTS, 4, decoding=replace(PLAIN, stop=(stop, "never written"))
    )
    assert told.new_texts == [cut_at_stop(text, (stop,)) for text in whole.new_texts]
    assert told.finish_reasons[0] == "stop"
    for before, ids, reason in zip(whole.new_ids, told.new_ids, told.finish_reasons, strict=True):
        assert before[: len(ids)] == ids
        assert (len(ids) == NUM_NEW) == (reason == "length")


def test_a_stopping_text_in_the_prompt_or_half_in_it_stops_nothing(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    whole = generate(llama, tokenizer, ["a b"])
    stop = "b" + whole.new_texts[0][0]
    assert stop not in whole.new_texts[0]
    told = generate(llama, tokenizer, ["a b"], decoding=replace(PLAIN, stop=(stop, "a")))
    assert told.new_texts[0] == cut_at_stop(whole.new_texts[0], ("a",))


def test_a_special_token_stops_too(llama: Any, make_tokenizer: Callable[..., Any]) -> None:
    """A head that always favours <pad>, which no decoded text shows."""
    tokenizer = make_tokenizer("</s>")
    head = torch.nn.Linear(32, 259)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    head.bias.data[0] = 1.0
    llama.lm_head = head
    told = generate(llama, tokenizer, ["a", "ab"], 2, decoding=replace(PLAIN, stop=("<pad><pad>",)))
    assert told.new_ids == [[0, 0], [0, 0]]
    assert told.new_texts == ["", ""]
    assert told.finish_reasons == ["stop", "stop"]


def test_an_answer_ends_at_the_tokenizers_the_models_and_the_turns_end(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    whole = generate(llama, tokenizer, ["a"]).new_ids[0]
    first, second = whole[3], whole[6]
    assert first not in whole[:3]
    assert second not in whole[:6]
    alone = replace(PLAIN, eos_alone=True)
    for own, turn_ends, end in ([[2, second], [first], 3], [second, [], 6], [[first], [second], 3]):
        llama.generation_config.eos_token_id = own
        told = generate(llama, tokenizer, ["a"], end_of_turn_ids=turn_ends)
        assert told.new_ids[0] == whole[: end + 1]
        assert told.finish_reasons == ["stop"]
        assert set(told.settings["eos_token_id"]) == {2, first, second} - (
            {first} if end == 6 else set()
        )
        # A protocol whose code names the tokenizer's own end hears of no other.
        told = generate(llama, tokenizer, ["a"], end_of_turn_ids=turn_ends, decoding=alone)
        assert told.new_ids[0] == whole
        assert told.settings["eos_token_id"] == [2]
    tokenizer.eos_token = None
    llama.generation_config.eos_token_id = None
    assert generate(llama, tokenizer, ["a"]).finish_reasons == ["length"]


@pytest.mark.parametrize("stop", [(), ("xyz",)])
@pytest.mark.parametrize("decoding", [PLAIN, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("is_stateful", [False, True])
def test_a_streamed_text_is_the_text(
    llama: Any,
    make_tokenizer: Callable[..., Any],
    decoding: Decoding,
    stop: tuple[str, ...],
    is_stateful: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In rounds and, where the cache cannot be parted, in one piece."""
    monkeypatch.setattr(type(llama), "_is_stateful", is_stateful)
    tokenizer = make_tokenizer()
    whole = generate(llama, tokenizer, ["a b"], decoding=decoding).new_texts[0]
    stop = stop and (*stop, whole[8:11])
    decoding = replace(decoding, stop=stop)
    pieces: list[str] = []
    passes: list[int] = []
    llama.model.embed_tokens.register_forward_pre_hook(lambda module, args: passes.append(1))
    told = generate(llama, tokenizer, ["a b"], decoding=decoding, on_text=pieces.append)
    assert "".join(pieces) == told.new_texts[0] == cut_at_stop(whole, stop)
    assert all(pieces)
    assert len(pieces) > 1
    # Somebody waits for the end: it is seen at once, not at the end of a round.
    assert len(passes) == len(told.new_ids[0])


def test_one_answer_at_a_time_is_streamed(llama: Any, make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="2 prompts"):
        generate(llama, make_tokenizer(), ["a", "b"], on_text=print)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("stop", ("",)),
        ("max_new_tokens", 0),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_told(key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        Decoding(**{"max_new_tokens": 1, key: value})
    assert caught.value.key == key
