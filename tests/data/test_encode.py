"""Encoding: one tokenisation, learned tokens by their characters, EOS and BOS exactly once."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from wegeft_cli.data.text.chat_rendering import RenderedText, Segment, render_chat
from wegeft_cli.data.text.encode import (
    EncodedDataset,
    EncodeStatistics,
    concatenate_datasets,
    encode_rows,
)
from wegeft_cli.data.text.tokenizer import build_encoder
from wegeft_cli.errors import UserError

BOS, EOS = 0, 1


def pair(prompt: str, completion: str, **fields: bool) -> RenderedText:
    return RenderedText((Segment(prompt, False), Segment(completion, True)), **fields)


def encode(
    rows: list[RenderedText], tokenizer: Any, *, max_length: int = 512, **fields: Any
) -> tuple[EncodedDataset, EncodeStatistics]:
    return encode_rows(rows, encoder=build_encoder(tokenizer), max_length=max_length, **fields)


def trained_text(dataset: EncodedDataset, index: int, tokenizer: Any) -> str:
    ids, mask = dataset.row(index)
    text: str = tokenizer.decode(ids[mask].tolist())
    return text


def test_ids_are_the_tokenizers_own_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("Question: 1 + 1?\nAnswer:", " 2"), pair("é 😀\n\n", "the correct answer")]
    dataset, report = encode(rows, tokenizer)
    assert report == EncodeStatistics(longest=int(dataset.lengths.max()))
    assert len(dataset) == 2
    for i, row in enumerate(rows):
        assert dataset.row(i)[0].tolist() == [*tokenizer(row.text)["input_ids"], EOS]
    assert trained_text(dataset, 0, tokenizer) == " 2</s>"
    assert trained_text(dataset, 1, tokenizer) == "the correct answer</s>"


def byte_ends(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Where each token ends in the UTF-8 bytes of the text: one letter per byte in this BPE."""
    lengths = [0 if i == BOS else len(tokenizer.convert_ids_to_tokens(i)) for i in ids]
    return np.cumsum(lengths).tolist()


def test_learned_tokens_are_those_with_completion_characters(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    pieces = [
        "the",
        " correct",
        "answer",
        " ",
        "\n",
        "\n\n",
        ":",
        ".",
        "é",
        "😀",
        " 42",
        "  ",
        "is",
    ]
    rng = random.Random(0)
    rows = [
        pair(
            "".join(rng.choices(pieces, k=rng.randint(1, 5))),
            "".join(rng.choices(pieces, k=rng.randint(1, 5))) + "x",
        )
        for _ in range(400)
    ]
    dataset, report = encode(rows, tokenizer)
    num_merged = 0
    for i, row in enumerate(rows):
        ids, mask = dataset.row(i)
        boundary = len(row.segments[0].text.encode())
        ends = byte_ends(ids[:-1].tolist(), tokenizer)
        assert mask.tolist() == [*(end > boundary for end in ends), True]
        num_merged += boundary not in ends
    assert report.num_boundary_merged == num_merged
    assert num_merged > 10  # otherwise the test shows nothing


def test_a_token_across_the_boundary_is_learned_and_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # The tokenizer trims white space off its offsets: by them alone " the" would begin at "the".
    dataset, report = encode([pair("Answer: ", "the sum"), pair("Answer:", " the")], tokenizer)
    assert report.num_boundary_merged == 1
    assert trained_text(dataset, 0, tokenizer) == " the sum</s>"
    assert trained_text(dataset, 1, tokenizer) == " the</s>"


def test_several_learned_stretches(tokenizer: PreTrainedTokenizerFast) -> None:
    row = RenderedText(
        (
            Segment("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
            Segment("the sum<|im_end|>", True),
            Segment("\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n", False),
            Segment("is", True),
            Segment(" 7<|im_end|>", True),
            Segment("\n", False),
        ),
        append_eos=False,
        add_special_tokens=False,
    )
    dataset, report = encode([row], tokenizer)
    assert trained_text(dataset, 0, tokenizer) == "the sum<|im_end|>is 7<|im_end|>"
    assert dataset.row(0)[0].tolist() == tokenizer(row.text, add_special_tokens=False)["input_ids"]
    assert report.num_boundary_merged == 0


def test_a_token_behind_a_learned_stretch_is_learned_when_it_holds_some_of_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = RenderedText((Segment("a", False), Segment("x t", True), Segment("he b", False)), False)
    dataset, report = encode([row], tokenizer)
    assert trained_text(dataset, 0, tokenizer) == "x the"
    assert report.num_boundary_merged == 1


@pytest.mark.parametrize("text", ["a", "a</s>"])
def test_eos_comes_once_and_is_learned(
    text: str,
    tokenizer: PreTrainedTokenizerFast,
    eos_adding_tokenizer: PreTrainedTokenizerFast,
) -> None:
    for each in (tokenizer, eos_adding_tokenizer):
        dataset, _ = encode([pair("q", text)], each)
        ids, mask = dataset.row(0)
        if each is tokenizer or text == "a":
            assert ids.tolist().count(EOS) == 1
        assert ids[-1] == EOS
        assert mask[-1]


def test_no_eos_where_the_template_ends_the_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset, _ = encode([pair("q", "a<|im_end|>", append_eos=False)], tokenizer)
    assert EOS not in dataset.ids


def test_bos_comes_once(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("<s>q", "ab"), pair("q", "ab"), pair("<s>q", "ab", add_special_tokens=False)]
    dataset, _ = encode(rows, tokenizer)
    first, mask = dataset.row(0)
    assert first.tolist().count(BOS) == 1
    for i in (1, 2):
        assert dataset.row(i)[0].tolist() == first.tolist()
        assert dataset.row(i)[1].tolist() == mask.tolist()


def test_a_rows_first_token_is_not_a_label(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset, _ = encode([RenderedText((Segment("the sum", True),))], tokenizer)
    assert trained_text(dataset, 0, tokenizer) == "the sum</s>"
    bare = RenderedText((Segment("the sum", True),), add_special_tokens=False)
    assert trained_text(encode([bare], tokenizer)[0], 0, tokenizer) == " sum</s>"


def test_long_rows_are_cut_from_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    row = pair("q", "abcdefgh")
    whole = encode([row], tokenizer)[0].row(0)
    dataset, report = encode([row, pair("q", "a")], tokenizer, max_length=6)
    assert dataset.row(0)[0].tolist() == whole[0][:6].tolist()
    assert dataset.row(0)[1].tolist() == whole[1][:6].tolist()
    assert report == EncodeStatistics(num_truncated=1, longest=len(whole[0]))
    exact, report = encode([row], tokenizer, max_length=len(whole[0]))
    assert report.num_truncated == 0
    assert exact.row(0)[0][-1] == EOS


def test_of_a_text_that_is_far_too_long_only_the_beginning_is_tokenised(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rng = random.Random(1)
    words = ["the", " correct", "answer", " ", "\n", ":", "é", "😀", " 42", "aaaaaaaaaaaa"]
    encoder = build_encoder(tokenizer)
    limit = encoder.count_characters(20)
    for _ in range(50):
        text = "x" + "".join(rng.choices(words, k=limit))
        short = pair("q", text[: limit // 2])
        whole, expected = encode([short], tokenizer, max_length=20)
        dataset, report = encode([pair("q", text)], tokenizer, max_length=20)
        assert expected.num_truncated == report.num_truncated == 1
        assert dataset.ids.tolist() == whole.ids.tolist()
        assert dataset.label_mask.tolist() == whole.label_mask.tolist()
        assert report.longest < limit


def test_a_row_of_ten_megabytes_is_cut_like_any_other(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        pair("q", "x" * 10_000_000),
        pair("x" * 10_000_000, "a"),
        pair("q", "a"),
        RenderedText((Segment("word " * 2_000_000, True),)),
    ]
    dataset, report = encode(rows, tokenizer, max_length=16)
    assert dataset.lengths.tolist() == [16, *encode(rows[2:3], tokenizer)[0].lengths, 16]
    assert (report.num_truncated, report.num_cut_away, report.num_empty) == (2, 1, 0)
    assert report.num_overlong == 2
    assert EOS not in dataset.row(0)[0]
    filtered, report = encode(rows, tokenizer, length_below=100)
    assert (len(filtered), report.num_too_long) == (1, 3)


@pytest.fixture
def joining_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """One whose normaliser makes many spaces one."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace(Regex(" +"), " ")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_a_text_of_which_the_tokenizer_takes_characters_away_is_not_cut_too_early(
    joining_tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [pair("a" + " " * spaces, "the sum") for spaces in (1, 3000)]
    dataset, report = encode(rows, joining_tokenizer, max_length=16)
    short, long = (dataset.row(i) for i in range(2))
    assert long[0].tolist() == short[0].tolist()
    assert long[1].tolist() == short[1].tolist()
    assert (report.num_truncated, report.num_overlong) == (0, 0)
    filtered, report = encode(rows, joining_tokenizer, length_below=16)
    assert (len(filtered), report.num_too_long) == (2, 0)


def test_turns_that_were_thought_to_be_cut_away_are_looked_for_when_they_are_not(
    joining_tokenizer: PreTrainedTokenizerFast,
) -> None:
    def write(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        said = "".join(f"[{m['role'][0]}]{m['content']}." for m in messages)
        return said + ("[a]" if add_generation_prompt else "")

    limit = build_encoder(joining_tokenizer).count_characters(64)
    rendered = []
    for spaces in (1, 3000):
        contents = ["q" + " " * spaces, "the", "q", "sum"]
        talk = [
            {"role": role, "content": content}
            for role, content in zip(["user", "assistant"] * 2, contents, strict=True)
        ]
        rendered.append(render_chat(talk, [None] * 4, "assistant", write, limit))
    assert [row.render_whole is None for row in rendered] == [True, False]
    dataset, _ = encode(rendered, joining_tokenizer, max_length=64)
    assert trained_text(dataset, 0, joining_tokenizer) == "the.sum."
    assert trained_text(dataset, 1, joining_tokenizer) == "the.sum."


def test_rows_without_anything_to_learn_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [pair("q", ""), pair("q", " \n"), pair("abcdefgh", "a"), pair("q", "a")]
    dataset, report = encode(rows, tokenizer, max_length=6)
    assert len(dataset) == 1
    assert (report.num_empty, report.num_cut_away, report.num_dropped) == (2, 1, 3)
    assert report.num_truncated == 0


def test_a_tokenizer_without_eos_is_a_fault(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token") as caught:
        encode([pair("q", "a")], bare)
    assert caught.value.key == "model.name_or_path"


def test_length_rule_and_window_take_the_first_rows_that_pass(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [pair(str(i), "abcdefgh" if i % 2 else "a") for i in range(9)]
    limit = len(tokenizer("1abcdefgh")["input_ids"])
    short, report = encode(rows, tokenizer, length_below=limit)
    assert (len(short), report.num_too_long) == (5, 4)
    assert len(encode(rows, tokenizer, length_below=limit + 1)[0]) == 9
    inner, _ = encode(rows, tokenizer, length_below=limit, window=(1, 3))
    assert [inner.row(i)[0].tolist() for i in range(2)] == [
        short.row(i)[0].tolist() for i in (1, 2)
    ]
    assert len(inner) == 2


def test_the_tokenizer_itself_is_left_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    encode([pair("q ", "the")], tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_leftover_truncation_and_padding_do_no_harm(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = pair("Question:", " the correct answer is true")
    clean = encode([row], chat_tokenizer)[0].ids.tolist()
    chat_tokenizer("a", padding="max_length", truncation=True, max_length=4)
    assert encode([row], chat_tokenizer)[0].ids.tolist() == clean


def test_slow_tokenizers_give_the_same_masks() -> None:
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    rows = [
        pair("Answer: ", "é 42"),
        RenderedText((Segment("a", False), Segment("bc", True), Segment("d", False)), False),
    ]
    dataset, report = encode(rows, slow)
    assert trained_text(dataset, 0, slow) == "é 42</s>"
    assert trained_text(dataset, 1, slow) == "bc"
    assert dataset.row(0)[0].tolist() == slow("Answer: é 42")["input_ids"]
    assert report.num_boundary_merged == 0


class PairMerging:
    """A slow tokenizer that turns every `ab` into one token."""

    is_fast = False
    bos_token_id, eos_token_id = None, EOS

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text.replace("ab", "%")]}

    def get_vocab(self) -> dict[str, int]:
        return {"ab": ord("%")}


def test_slow_tokenizers_show_a_token_across_the_boundary() -> None:
    row = RenderedText((Segment("xa", False), Segment("bca", True), Segment("bd", False)), False)
    dataset, report = encode([row], PairMerging())
    ids, mask = dataset.row(0)
    assert "".join(map(chr, ids)) == "x%c%d"
    assert "".join(map(chr, ids[mask])) == "%c%"
    assert report.num_boundary_merged == 1


def test_data_sets_are_cut_and_joined_by_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset, _ = encode([pair("q", "a" * n) for n in range(1, 6)], tokenizer)
    joined = concatenate_datasets([dataset.take(0, 2), dataset.take(2, 2), dataset.take(2, 5)])
    assert len(joined) == 5
    for i in range(5):
        for ours, theirs in zip(joined.row(i), dataset.row(i), strict=True):
            assert ours.tolist() == theirs.tolist()
    assert joined.lengths.sum() == len(joined.ids)
    assert joined.label_counts.tolist() == [int(dataset.row(i)[1].sum()) for i in range(5)]
    assert (joined.ids.dtype, joined.label_mask.dtype) == (np.int32, np.bool_)
    assert len(encode([], tokenizer)[0]) == 0
