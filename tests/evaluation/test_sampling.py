"""Draws, penalties and stopping texts: each row as if it were alone, and as its definition says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.answering import Generations, generate_texts
from wegeft_cli.evaluation.sampling import Decoding, cut_at_stop, derive_seed

PROMPTS = ["a", "a rather long prompt, the longest of all", "two words", "B" * 17]
NUM_NEW = 16
DRAWN = Decoding(do_sample=True, temperature=0.9, top_k=50, top_p=0.95, min_p=0.001)
# A draw follows its distribution: at 4,000 draws an error of five standard deviations.
NUM_DRAWS, WIDE = 4000, 5.0


def generate(
    model: Any, tokenizer: Any, prompts: list[str], batch_size: int = 1, **options: Any
) -> Generations:
    return generate_texts(
        model, tokenizer, prompts, max_new_tokens=NUM_NEW, batch_size=batch_size, **options
    )


@pytest.mark.parametrize(
    "decoding", [DRAWN, Decoding(repetition_penalty=1.7), Decoding(True, repetition_penalty=1.3)]
)
def test_a_batch_draws_what_each_prompt_alone_would(
    llama: Any, make_tokenizer: Callable[..., Any], decoding: Decoding
) -> None:
    tokenizer = make_tokenizer("</s>")
    seeds = [derive_seed(5, index) for index in range(len(PROMPTS))]
    alone = [
        generate(llama, tokenizer, [prompt], decoding=decoding, seeds=[seed]).new_ids[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    for batch_size in (2, 4):
        told = generate(llama, tokenizer, PROMPTS, batch_size, decoding=decoding, seeds=seeds)
        assert told.new_ids == alone
    assert alone != generate(llama, tokenizer, PROMPTS).new_ids


def test_the_seed_decides_and_the_draws_of_two_rows_differ(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    told = generate(llama, tokenizer, ["a"] * 4, 4, decoding=DRAWN, seeds=[1, 2, 1, 3])
    assert told.new_ids[0] == told.new_ids[2]
    assert len({tuple(ids) for ids in told.new_ids}) == 3
    assert told.settings["do_sample"] is True
    assert told.settings["temperature"] == 0.9
    torch.manual_seed(1)  # what else draws does not matter
    again = generate(llama, tokenizer, ["a"] * 2, 2, decoding=DRAWN, seeds=[1, 2])
    assert again.new_ids == told.new_ids[:2]


def test_draws_follow_the_distribution(llama: Any, make_tokenizer: Callable[..., Any]) -> None:
    """First tokens over many seeds against the softmax, narrowed to the top three, by hand."""
    tokenizer = make_tokenizer()
    decoding = Decoding(do_sample=True, temperature=1.5, top_k=3)
    with torch.no_grad():
        logits = llama(input_ids=torch.tensor([tokenizer("a")["input_ids"]])).logits[0, -1]
    best = (logits.double() / 1.5).topk(3)
    expected = best.values.softmax(-1)
    processors = decoding.build_processors(
        [1] * NUM_DRAWS, [derive_seed(0, n) for n in range(NUM_DRAWS)], torch.device("cpu")
    )
    ids = torch.ones(NUM_DRAWS, 1, dtype=torch.long)
    drawn = processors(ids, logits.expand(NUM_DRAWS, -1).clone()).argmax(-1)
    assert set(drawn.tolist()) == set(best.indices.tolist())
    for token, share in zip(best.indices, expected, strict=True):
        deviation = (share * (1 - share) / NUM_DRAWS).sqrt()
        assert abs((drawn == token).double().mean() - share) < WIDE * deviation


def test_the_penalty_is_transformers_own_where_nothing_is_padded() -> None:
    scores = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 5], [2, 3, 4]])
    own = Decoding(repetition_penalty=1.4).build_processors([3, 3], [0, 0], torch.device("cpu"))
    assert torch.equal(own(ids, scores), RepetitionPenaltyLogitsProcessor(1.4)(ids, scores))


def test_a_stopping_text_ends_the_row_and_is_no_part_of_it(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer("<pad>")
    whole = generate(llama, tokenizer, PROMPTS)
    # Two characters out of the middle of one answer, which other answers may hold or not.
    stop = whole.new_texts[0][5:7]
    told = generate(llama, tokenizer, PROMPTS, 4, decoding=Decoding(stop=(stop, "never written")))
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
    told = generate(llama, tokenizer, ["a b"], decoding=Decoding(stop=(stop, "a")))
    assert told.new_texts[0] == cut_at_stop(whole.new_texts[0], ("a",))


def test_a_special_token_stops_too(llama: Any, make_tokenizer: Callable[..., Any]) -> None:
    """A head that always favours <pad>, which no decoded text shows."""
    tokenizer = make_tokenizer("</s>")
    head = torch.nn.Linear(32, 259)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    head.bias.data[0] = 1.0
    llama.lm_head = head
    told = generate(llama, tokenizer, ["a", "ab"], 2, decoding=Decoding(stop=("<pad><pad>",)))
    assert told.new_ids == [[0, 0], [0, 0]]
    assert told.new_texts == ["", ""]
    assert told.finish_reasons == ["stop", "stop"]


def test_several_tokens_end_a_text(llama: Any, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    whole = generate(llama, tokenizer, ["a"]).new_ids[0]
    told = generate(llama, tokenizer, ["a"], end_ids=[whole[6], whole[3]])
    assert told.new_ids[0] == whole[: whole.index(whole[3]) + 1]
    assert generate(llama, tokenizer, ["a"], end_ids=[]).finish_reasons == ["length"]


@pytest.mark.parametrize("stop", [(), ("xyz",)])
@pytest.mark.parametrize("decoding", [Decoding(), DRAWN])
def test_a_streamed_text_is_the_text(
    llama: Any, make_tokenizer: Callable[..., Any], decoding: Decoding, stop: tuple[str, ...]
) -> None:
    tokenizer = make_tokenizer()
    whole = generate(llama, tokenizer, ["a b"], decoding=decoding).new_texts[0]
    stop = stop and (*stop, whole[8:11])
    decoding = Decoding(**{**vars(decoding), "stop": stop})
    pieces: list[str] = []
    told = generate(llama, tokenizer, ["a b"], decoding=decoding, on_text=pieces.append)
    assert "".join(pieces) == told.new_texts[0] == cut_at_stop(whole, stop)
    assert all(pieces)
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("stop", ("",)),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_told(key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        Decoding(**{key: value}).check()
    assert caught.value.key == key
