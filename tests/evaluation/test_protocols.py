from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wegeft_cli.data.text.templates import TEMPLATES, render_row
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.text import TextBenchmark
from wegeft_cli.evaluation.text.loading import TEST_SETS, Question, Questions, load_questions
from wegeft_cli.evaluation.text.protocol_registry import PROTOCOLS, find_protocol
from wegeft_cli.evaluation.text.scoring import score_outputs

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)
STEPS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response: Let's think step by step."
)
TUNING = (
    "{}\nAnswer the above question. First think step by step and then answer the final number.\n"
)
ADAPTERS_TRAINED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.  \n\n"
    "                ### Instruction:\n"
    "                {}\n"
    "                \n"
    "                ### Response:\n"
    "                "
)
ADAPTERS_ASKED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request. \n\n"
    "                ### Instruction:\n"
    "                {}\n\n"
    "                ### Response:\n"
    "                "
)
FREE = {"do_sample": False, "num_beams": 1}
# What these authors' code names as the only end: the tokenizer's end of text.
GREEDY = {**FREE, "eos_alone": True}
BEAMS = {"do_sample": False, "num_beams": 4, "eos_alone": True}
DRAWN = {
    "do_sample": True, "num_beams": 1, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "seed": 0,
    "max_prompt_tokens": 768,
}  # fmt: skip
STOP = [
    *("Question:", "Question", "USER:", "USER", "ASSISTANT:", "ASSISTANT"),
    *("Instruction:", "Instruction", "Response:", "Response"),
]

ASKED: list[tuple[str, str, str, int, dict[str, Any]]] = [
    *(
        (name, task, form, length, GREEDY)
        for name in ("wegeft", "gift", "wegeft_fixed", "gift_fixed")
        for task, form, length in (
            ("boolq", "{}\n", 32),
            ("hellaswag", "{}\n", 32),
            ("gsm8k", ALPACA, 512),
            ("svamp", ALPACA, 512),
            ("mawps", ALPACA, 512),
            ("aqua", ALPACA, 512),
        )
    ),
    ("llm_adapters", "piqa", ADAPTERS_ASKED, 32, BEAMS),
    ("llm_adapters", "gsm8k", ADAPTERS_ASKED, 256, BEAMS),
    ("llm_adapters", "aqua", ADAPTERS_ASKED, 256, BEAMS),
    ("llm_adapters_fixed", "piqa", ADAPTERS_TRAINED, 32, BEAMS),
    ("llm_adapters_fixed", "mawps", ADAPTERS_TRAINED, 256, BEAMS),
    ("lora_ga", "gsm8k", "Q: {}\nA:  ", 512, DRAWN),
    ("lora_ga_fixed", "gsm8k", "Q: {}\nA: ", 512, FREE),
    ("lora_pro", "gsm8k", ALPACA + " ", 512, DRAWN),
    ("lora_pro_fixed", "gsm8k", ALPACA, 512, FREE),
    ("metamath", "gsm8k", STEPS, 512, {**FREE, "stop": STOP}),
    ("metamath_fixed", "gsm8k", STEPS, 512, FREE),
    ("wegeft_tune", "gsm8k_tune", TUNING, 512, GREEDY),
    ("gift_tune", "gsm8k_tune_gift", TUNING, 512, GREEDY),
    ("tune_fixed", "gsm8k_tune", TUNING, 512, GREEDY),
    ("quickstart", "quickstart", "Question: {}\nAnswer:", 8, FREE),
]


def make_row(instruction: str, answer: str = "1") -> Question:
    return Question(0, instruction, answer, {"answer": answer})


@pytest.mark.parametrize(("name", "task", "form", "length", "decoding"), ASKED)
def test_prompts_and_decoding_are_byte_exact(
    name: str, task: str, form: str, length: int, decoding: dict[str, Any]
) -> None:
    protocol = find_protocol(name, TEST_SETS[task])
    instruction = "100 %s of {x}\\n?"
    assert protocol.prompt(TEST_SETS[task], make_row(instruction)) == form.format(instruction)
    assert protocol.decoding(TEST_SETS[task]).settings() == {"max_new_tokens": length, **decoding}
    told = hashlib.sha256(form.replace("{}", "%s").encode()).hexdigest()[:16]
    assert protocol.template_hash(TEST_SETS[task]) == told


def test_every_protocol_is_covered_above() -> None:
    assert {name for name, *_ in ASKED} | {"chat"} == PROTOCOLS.keys()


@pytest.mark.parametrize(("name", "task"), [(name, task) for name, task, *_ in ASKED])
def test_training_and_scoring_share_their_template(name: str, task: str) -> None:
    """The prompt of a training row is what is asked, but where the authors' own code differs."""
    protocol = PROTOCOLS[name]
    template = protocol.template_name(TEST_SETS[task])
    row = {"instruction": "How {many}?", "input": "", "output": "#### 5"}
    trained = render_row(row, template=template, loss_on="completion")
    asked = protocol.prompt(TEST_SETS[task], make_row("How {many}?"))
    assert (trained.segments[0].text == asked) is (
        name not in ("llm_adapters", "lora_ga", "lora_pro")
    )
    pair = TEMPLATES[template]
    assert pair is not None
    assert asked in (
        pair.prompt.format(instruction="How {many}?"),
        str(pair.asked_as).format(instruction="How {many}?"),
    )


@pytest.mark.parametrize(
    ("template", "protocol", "said"),
    [
        ("gsm8k_wegeft", "wegeft_tune", "so 4+1\nThe answer is: 5"),
        ("gsm8k_gift", "gift_tune", "so 4+1\nThe final answer is:  5"),
        ("metamath", "lora_ga", " so 4+1\n#### 5"),
        ("metamath", "lora_ga_fixed", " so 4+1\n#### 5"),
        ("lora_ga", "lora_pro", " so 4+1\n#### 5"),
        ("alpaca", "wegeft", "so 4+1\n#### 5"),
        ("llm_adapters", "llm_adapters", "so 4+1\n#### 5"),
    ],
)
def test_what_a_template_teaches_its_protocol_reads(
    template: str, protocol: str, said: str
) -> None:
    row = {"instruction": "Four and one?", "input": "", "output": "so 4+1\n#### 5"}
    taught = render_row(row, template=template, loss_on="completion").segments[1].text
    assert taught == said
    task = TEST_SETS["gsm8k"]
    prompt = PROTOCOLS[protocol].prompt(task, make_row("Four and one?"))
    prediction = PROTOCOLS[protocol].extract(task, prompt + taught, taught, "5")
    assert prediction == 5
    gold = "#### 5" if protocol.startswith("lora") else "5"
    assert PROTOCOLS[protocol].is_correct(task, prediction, gold)


def test_the_quickstart_reads_the_first_line_alone() -> None:
    protocol, task = PROTOCOLS["quickstart"], TEST_SETS["quickstart"]
    prompt = protocol.prompt(task, make_row("What is 2 + 2?"))
    assert protocol.extract(task, prompt + " 3, no 4\n5", " 3, no 4\n5", "4") == 4.0
    assert protocol.extract(task, prompt + "\n4", "\n4", "4") is None


@pytest.mark.parametrize("name", ["wegeft", "gift", "wegeft_fixed", "gift_fixed", "chat"])
def test_a_general_protocol_scores_the_published_sets(name: str) -> None:
    published = [task for task in TEST_SETS.values() if task.name != "quickstart"]
    assert len(published) == 18
    for task in published:
        assert find_protocol(name, task) is PROTOCOLS[name]


@pytest.mark.parametrize(
    ("name", "task", "hint"),
    [
        ("quickstart", "gsm8k", "use `wegeft` or `wegeft_fixed`"),
        ("wegeft", "quickstart", "use `quickstart`"),
        ("gift", "quickstart", "use `quickstart`"),
        ("llm_adapters", "mawps", "use `wegeft` or `wegeft_fixed`"),
        ("lora_ga", "svamp", "use `wegeft`"),
        ("metamath", "boolq", "use `wegeft`"),
        ("wegeft_tune", "aqua", "use `wegeft`"),
    ],
)
def test_a_protocol_of_another_task_is_refused(name: str, task: str, hint: str) -> None:
    with pytest.raises(UserError, match="does not score") as caught:
        find_protocol(name, TEST_SETS[task])
    assert str(caught.value.hint).startswith(hint)


def test_without_a_name_the_task_decides() -> None:
    assert find_protocol(None, TEST_SETS["quickstart"]).name == "quickstart"
    assert find_protocol(None, TEST_SETS["gsm8k"]).name == "wegeft"
    assert find_protocol(None, TEST_SETS["gsm8k_tune"]).name == "wegeft_tune"
    assert find_protocol(None, TEST_SETS["gsm8k_tune_gift"]).name == "gift_tune"


def test_a_misspelt_protocol_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="wegft") as caught:
        find_protocol("wegft", TEST_SETS["gsm8k"])
    assert caught.value.hint == "did you mean `wegeft`?"


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_every_protocol_tells_the_faults_it_keeps(name: str) -> None:
    description = PROTOCOLS[name].description
    assert ("Kept fault" in description) != ("o kept fault is known" in description)
    if name.endswith("_fixed"):
        assert "Kept fault" not in description


def test_a_fault_that_is_known_has_a_fixed_form() -> None:
    for name, protocol in PROTOCOLS.items():
        if "Kept fault" in protocol.description and name != "quickstart":
            assert protocol.fixed in PROTOCOLS, name
            assert PROTOCOLS[str(protocol.fixed)].fixed is None


GOLDS = [
    # (gold as published, answer, lora_ga, fixed)
    ("#### 18", "#### 18", True, True),
    ("#### 2,125", "#### 2,125", True, True),
    ("#### 2,125", "#### 2125", False, True),
    ("#### 2,125", "#### 2", True, False),
    ("#### -10", "#### -10", True, True),
    ("#### -10", "no idea", True, False),
    ("#### -10", "#### 10", False, False),
    ("#### 0", "", True, False),
    ("#### 18", "", False, False),
]


@pytest.mark.parametrize(("gold", "said", "faithful", "fixed"), GOLDS)
@pytest.mark.parametrize("frame", ["lora_ga", "lora_pro"])
def test_lora_gas_golds_are_misread_as_published(
    write_set: Callable[..., Path], frame: str, gold: str, said: str, faithful: bool, fixed: bool
) -> None:
    rows = [{"question": "Q?", "answer": f"It is so.\n{gold}"}]
    data = load_questions(
        TEST_SETS["gsm8k"], data_dir=write_set("gsm8k", rows, "test.jsonl"), limit=None
    )
    for name, verdict in ((frame, faithful), (f"{frame}_fixed", fixed)):
        score = score_outputs(PROTOCOLS[name], data, {0: said})
        assert (score.num_correct == 1) is verdict, name
        # What cannot be read is told, right or not.
        assert score.n_invalid == (
            not any(c.isdigit() for c in said) or (name == frame and said == "#### -10")
        )


def test_lora_ga_needs_the_golds_as_published(make_data: Callable[..., Questions]) -> None:
    data = make_data("gsm8k", [("Q?", "2125.0"), ("Q?", "3.0")])
    with pytest.raises(ExceptionGroup) as caught:
        PROTOCOLS["lora_ga"].check_data(data)
    assert len(caught.value.exceptions) == 2
    told = str(caught.value.exceptions[0])
    assert "gsm8k/test.jsonl" in told
    assert "`lora_ga_fixed`" in told
    PROTOCOLS["lora_ga_fixed"].check_data(data)


def test_a_gold_that_a_protocol_cannot_read_is_told(make_data: Callable[..., Questions]) -> None:
    """The set is sound for those that look for a number, not for those that take the whole."""
    data = make_data("gsm8k", [("Q?", "3.0"), ("Q?", "about 5")])
    PROTOCOLS["wegeft"].check_data(data)
    for name in ("gift", "llm_adapters"):
        with pytest.raises(UserError, match="reads no number in the gold answer 'about 5'"):
            PROTOCOLS[name].check_data(data)


CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


def test_chat_asks_in_the_models_own_template(
    make_data: Callable[..., Questions], make_tokenizer: Callable[..., Any]
) -> None:
    data = make_data("mawps", [("How many?", "3")])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    prompts = TextBenchmark(data, PROTOCOLS["chat"]).prompts(tokenizer)
    assert prompts.texts == {0: "[user]How many?[assistant]"}
    assert not prompts.add_special_tokens
    assert prompts.template_hash == hashlib.sha256(CHAT.encode()).hexdigest()[:16]


def test_a_model_without_a_chat_template_is_not_asked_in_one(
    make_data: Callable[..., Questions], make_tokenizer: Callable[..., Any]
) -> None:
    benchmark = TextBenchmark(make_data("mawps", [("Q", "3")]), PROTOCOLS["chat"])
    with pytest.raises(UserError, match="no chat template") as caught:
        benchmark.prompts(make_tokenizer())
    assert caught.value.key == "protocol"
    assert "instruction-tuned model" in str(caught.value.hint)
