from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import BloomConfig, BloomForCausalLM

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import BenchmarkContext
from wegeft_cli.evaluation.benchmarks.text import TextBenchmark
from wegeft_cli.evaluation.text.loading import Questions
from wegeft_cli.evaluation.text.protocol_registry import PROTOCOLS
from wegeft_cli.evaluation.text.scoring import score_outputs
from wegeft_cli.generation.completion import GenerationResult
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import GenerationEvents, generate_texts
from wegeft_cli.inference.loaded_model import LoadedModel

PROMPTS = ["a", "a rather long prompt, the longest of all", "two words", "", "B" * 17]
NUM_NEW = 12


def generate(
    model: Any, tokenizer: Any, prompts: list[str], batch_size: int = 1
) -> GenerationResult:
    return generate_texts(model, tokenizer, prompts, Decoding(NUM_NEW), batch_size=batch_size)


def greedy_by_hand(model: Any, ids: list[int], eos_id: int) -> list[int]:
    """The definition: one prompt, no cache, the best token each time."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < NUM_NEW and eos_id not in new:
            logits = model(input_ids=torch.tensor([ids + new])).logits
            new.append(int(logits[0, -1].argmax()))
    return new


@pytest.fixture(params=["pad", "pad is eos", "no pad"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer({"pad": "<pad>", "pad is eos": "</s>", "no pad": None}[request.param])


@pytest.fixture
def early_eos(llama: Any, tokenizer: Any) -> int:
    """Makes a token that only some rows write the end of text, so that not all end at once."""
    written = generate(llama, tokenizer, PROMPTS).new_ids
    for token in {token for ids in written for token in ids[1:-1]}:
        if 0 < sum(token in ids for ids in written) < len(written):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
            return token
    raise AssertionError("every row writes the same tokens")


def test_a_batch_writes_what_each_prompt_alone_would(
    llama: Any, tokenizer: Any, early_eos: int
) -> None:
    # The last prompt holds the padding and end tokens as real ones, which a mask must not hide.
    prompts = [*PROMPTS, "x<pad></s>y<pad>"]
    expected = [
        greedy_by_hand(llama, tokenizer(prompt)["input_ids"], early_eos) for prompt in prompts
    ]
    assert len({len(ids) for ids in expected}) > 1
    for batch_size in (1, 2, 3, len(prompts)):
        generations = generate(llama, tokenizer, prompts, batch_size)
        assert generations.new_ids == expected
        assert generations.num_new_tokens == sum(len(ids) for ids in expected)


def test_texts_hold_prompt_and_answer_without_special_tokens(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer("<pad>")
    generations = generate(llama, tokenizer, PROMPTS, 2)
    for prompt, text, ids in zip(PROMPTS, generations.texts, generations.new_ids, strict=True):
        assert text.startswith(prompt)
        assert "<s>" not in text
        assert text == tokenizer.decode(
            tokenizer(prompt)["input_ids"] + ids, skip_special_tokens=True
        )
    assert generations.new_texts == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in generations.new_ids
    ]


def test_the_models_own_generation_config_is_put_aside(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    expected = generate(llama, tokenizer, PROMPTS).new_ids
    own = llama.generation_config
    own.do_sample, own.temperature, own.top_p, own.repetition_penalty = True, 5.0, 0.9, 3.0
    own.no_repeat_ngram_size, own.num_beams = 1, 3
    own.suppress_tokens = sorted({token for ids in expected for token in ids})
    before = own.to_dict()
    generations = generate(llama, tokenizer, PROMPTS, 3)
    assert generations.new_ids == expected
    assert llama.generation_config is own
    assert own.to_dict() == before
    assert generations.settings["eos_token_id"] == [tokenizer.eos_token_id]


def test_model_and_tokenizer_are_left_as_they_were(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    llama.train()
    llama.model.layers[0].eval()
    modes = [module.training for module in llama.modules()]
    own = llama.generation_config
    generate(llama, tokenizer, PROMPTS, 2)
    assert [module.training for module in llama.modules()] == modes
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token is None

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_texts(
            llama,
            tokenizer,
            PROMPTS,
            Decoding(1),
            events=GenerationEvents(on_progress=stop),
            batch_size=1,
        )
    assert [module.training for module in llama.modules()] == modes
    assert llama.generation_config is own


def test_dropout_is_off(llama: Any, make_tokenizer: Callable[..., Any]) -> None:
    llama.config.attention_dropout = 0.9
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.9
    expected = generate(llama.eval(), make_tokenizer(), PROMPTS).new_ids
    assert generate(llama.train(), make_tokenizer(), PROMPTS).new_ids == expected


def test_the_longest_go_first_and_progress_is_told(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    # The self-test of batches runs once.
    generate_texts(llama, make_tokenizer(), PROMPTS, Decoding(1), batch_size=2)
    widths: list[int] = []
    llama.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[1])
    )
    seen: list[tuple[int, int]] = []
    generate_texts(
        llama,
        make_tokenizer(),
        PROMPTS,
        Decoding(1),
        events=GenerationEvents(on_progress=lambda done, total: seen.append((done, total))),
        batch_size=2,
    )
    assert widths == sorted((len(PROMPTS[1]) + 1, len(PROMPTS[2]) + 1, 1), reverse=True)
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_prompt_too_long_loses_its_left_but_not_its_start(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    long = "x" * 500 + "the very end"
    room = llama.config.max_position_embeddings - NUM_NEW
    generations = generate(llama, tokenizer, [long, "short"], 2)
    kept = long[-(room - 1) :]
    assert generations.settings["num_truncated_prompts"] == 1
    assert generations.new_ids == generate(llama, tokenizer, [kept, "short"]).new_ids
    assert generations.texts[0] == kept + generations.new_texts[0]


@pytest.mark.parametrize(("max_new_tokens", "batch_size"), [(0, 1), (1, 0), (128, 1)])
def test_numbers_out_of_range_are_told(
    llama: Any, make_tokenizer: Callable[..., Any], max_new_tokens: int, batch_size: int
) -> None:
    with pytest.raises(UserError) as caught:
        generate_texts(
            llama, make_tokenizer(), PROMPTS, Decoding(max_new_tokens), batch_size=batch_size
        )
    assert caught.value.key == ("batch_size" if batch_size == 0 else "max_new_tokens")


def test_a_tokenizer_without_any_special_token_will_do(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.bos_token = tokenizer.eos_token = None
    llama.generation_config.eos_token_id = None
    prompts = ["x" * 500, "short"]
    generations = generate(llama, tokenizer, prompts, 2)
    assert generations.settings["eos_token_id"] is None
    assert generations.new_ids == generate(llama, tokenizer, prompts).new_ids
    room = llama.config.max_position_embeddings - NUM_NEW
    assert generations.texts[0] == "x" * room + generations.new_texts[0]
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        generate(llama, tokenizer, ["a", ""])


def test_without_an_end_token_of_the_tokenizer_the_models_counts(
    llama: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    llama.generation_config.eos_token_id = [7, 8]
    assert generate(llama, tokenizer, ["a"]).settings["eos_token_id"] == [7, 8]


def test_a_model_without_a_fixed_context_cuts_nothing(
    make_tokenizer: Callable[..., Any],
) -> None:
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=16, n_layer=1, n_head=2))
    generations = generate(model, make_tokenizer(), ["x" * 300])
    assert generations.settings["num_truncated_prompts"] == 0
    assert generations.texts[0].startswith("x" * 300)


def test_no_prompts_are_no_work(llama: Any, make_tokenizer: Callable[..., Any]) -> None:
    assert generate(llama, make_tokenizer(), []).texts == []


def test_a_task_is_scored_as_its_own_samples_would_be(
    llama: Any, make_tokenizer: Callable[..., Any], make_data: Callable[..., Questions]
) -> None:
    data = make_data("boolq", [("Is it?", "true"), ("Is it not, then, at last?", "false")])
    protocol = PROTOCOLS["wegeft"]
    model = LoadedModel(llama, make_tokenizer())
    score = TextBenchmark(data, protocol).run(model, BenchmarkContext(2))
    assert score.generation is not None
    assert score.generation["max_new_tokens"] == 32
    assert 2 <= score.generation["num_new_tokens"] <= 64
    assert None not in score.generation.values()
    json.dumps(score.to_dict(), allow_nan=False)
    again = score_outputs(protocol, data, {row["index"]: row["output"] for row in score.samples})
    assert again.samples == score.samples


def test_a_model_that_says_the_answer_scores_full_marks(
    llama: Any, make_tokenizer: Callable[..., Any], make_data: Callable[..., Questions]
) -> None:
    """A head that always favours the digit 4: the quickstart's answers are all 4."""
    tokenizer = make_tokenizer()
    four = tokenizer("4", add_special_tokens=False)["input_ids"][0]
    head = torch.nn.Linear(32, 259)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[four] = 1.0
    llama.lm_head = head
    data = make_data("quickstart", [("2 + 2?", "44"), ("1 + 1?", "2")])
    benchmark = TextBenchmark(data, PROTOCOLS["quickstart"], max_new_tokens=2)
    score = benchmark.run(LoadedModel(llama, tokenizer), BenchmarkContext(4))
    assert [sample["output"] for sample in score.samples] == ["44", "44"]
    assert (score.num_correct, score.n, score.n_invalid) == (1, 2, 0)
