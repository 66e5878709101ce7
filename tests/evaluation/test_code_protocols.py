"""How code is asked for and taken out of an answer, and pass@k."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from math import comb

import pytest

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.evaluation.code.problems import Problem
from wegeft_cli.evaluation.code.protocols import (
    CODE_PROTOCOLS,
    cut_at_stop,
    find_code_protocol,
    first_block,
    first_block_of_chat,
    normalise_lora_ga,
)
from wegeft_cli.evaluation.code.scoring import CodeSample, pass_at_k, run_samples, summarise
from wegeft_cli.sandbox.run import Outcome

LORA_GA_PROMPT_HASH = "ee94655945b2cd6e"


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            exact = 1 - Fraction(comb(n - c, k), comb(n, k))
            assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


def test_pass_at_k_of_large_numbers_and_bad_ones():
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    for bad in ((5, 2, 6), (5, 6, 1), (5, 2, 0)):
        with pytest.raises(ValueError, match="n 5"):
            pass_at_k(*bad)


def test_lora_ga_repairs_an_answer_with_its_faults():
    text = (
        ' def f(a):\n   """Doc\n   string."""\n\n\tif a:\n         return 1\n   return 2\n```\nSo.'
    )
    assert normalise_lora_ga(text) == (
        # Margin 1; widths 3, 4 and 9 become levels 1, 2, 3: `if` is one too deep, which breaks it;
        # and what follows the fence is kept.
        "def f(a):\n        if a:\n            return 1\n    return 2\nSo."
    )
    assert normalise_lora_ga("```\n\n") == ""
    assert normalise_lora_ga("x = 1\n  y = 2") == "x = 1\n    y = 2"


def test_lora_ga_cuts_a_triple_quoted_string_out_of_code():
    assert normalise_lora_ga("def f():\n    return '''a'''") == "def f():\n    return"
    assert first_block("def f():\n    return '''a'''\n```\nSo.") == "def f():\n    return '''a'''\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def f(): pass\n```\nThis does nothing.", "def f(): pass\n"),
        (" def f():\n    pass\n", "def f():\n    pass\n"),
        ("```python\ndef f(): pass\n```\nSo.", "def f(): pass\n"),
        ("    return 1\n```", "    return 1\n"),
        ("", ""),
        ("```", ""),
    ],
)
def test_the_first_block_is_taken_as_it_is(text, code):
    assert first_block(text) == code


def test_a_chat_answer_gives_its_first_block_or_all_of_it():
    text = "Sure:\n```python\ndef f(): pass\n```\nOr:\n```\ndef f(): return\n```"
    assert first_block_of_chat(text) == "def f(): pass\n"
    assert first_block_of_chat("def f(): pass") == "def f(): pass"
    assert first_block_of_chat("```py\ndef f(): pass") == "def f(): pass"


@pytest.mark.parametrize("stop", ["\nclass", "\ndef", "\n#", "\nif", "\nprint"])
def test_a_completion_ends_where_something_new_begins_at_the_margin(stop):
    assert (
        cut_at_stop(f"    return 1\n    # x{stop} more\ndef g(): pass") == "    return 1\n    # x"
    )
    assert cut_at_stop("    return 1\n") == "    return 1\n"


def test_the_lora_ga_prompt_is_that_of_its_code_byte_for_byte():
    told = CODE_PROTOCOLS["lora_ga"].prompt("def f():\n    pass\n")
    assert told.startswith("Below is an instruction that describes a task.\n Write a response")
    assert "code:\n```python\ndef f():\n    pass\n\n```\n\n### Response:\n```python\n " in told
    assert told.endswith("```python\n ")
    # Of the prompt that LoRA-GA's own script writes for `%s`, and the blank of its inference.
    assert CODE_PROTOCOLS["lora_ga"].template_hash() == LORA_GA_PROMPT_HASH
    assert (
        hashlib.sha256((CODE_PROTOCOLS["lora_ga_fixed"].template + " ").encode()).hexdigest()[:16]
        == LORA_GA_PROMPT_HASH
    )
    decoding = CODE_PROTOCOLS["lora_ga"].decoding
    assert (decoding.temperature, decoding.top_p, decoding.max_new_tokens) == (0.8, 0.95, 512)
    assert [CODE_PROTOCOLS[name].num_samples for name in ("lora_ga", "lora_pro")] == [5, 1]
    for name in ("lora_ga", "lora_pro"):
        kept, fixed = CODE_PROTOCOLS[name], CODE_PROTOCOLS[f"{name}_fixed"]
        assert kept.fixed == fixed.name
        assert fixed.num_samples == kept.num_samples
        assert kept.template == fixed.template + " "


def test_an_unknown_protocol_is_told_with_a_near_one():
    with pytest.raises(UserError, match="does not score") as caught:
        find_code_protocol("lora_gaa")
    assert "lora_ga" in str(caught.value.hint)


def samples_of(*counts: int) -> list[CodeSample]:
    problems = [Problem(i, f"T/{i}", "def f(): ...\n", "f", "", "") for i in range(len(counts))]
    return [
        CodeSample(problem, number, "", "x", "x")
        for problem, count in zip(problems, counts, strict=True)
        for number in range(count)
    ]


def test_what_the_machine_could_not_run_is_no_fail_of_the_model():
    kinds = ["passed", "sandbox_error", "failed", "passed", "timeout", "memory"]
    outcomes = [Outcome(kind, "why") for kind in kinds]
    result = summarise(samples_of(2, 2, 2), outcomes)
    assert (result.num_passed, result.num_samples, result.num_problems) == (2, 5, 3)
    assert result.pass_at_k == {"1": pytest.approx((1 + 0.5 + 0) / 3)}
    assert result.outcomes == {
        "passed": 2, "failed": 1, "timeout": 1, "memory": 1, "sandbox_error": 1,
    }  # fmt: skip
    with pytest.raises(MachineError, match=r"no program could be run.*why"):
        summarise(samples_of(1), [Outcome("sandbox_error", "why")])


def test_k_goes_as_far_as_every_problem_has_answers():
    passed = [Outcome("passed")] * 12 + [Outcome("failed")] * 10
    assert list(summarise(samples_of(12, 10), passed).pass_at_k) == ["1", "10"]
    assert summarise(samples_of(12, 10), passed).pass_at_k["10"] == pytest.approx(0.5)
    assert list(summarise(samples_of(5), passed[:5]).pass_at_k) == ["1", "5"]


def test_a_sandbox_that_fails_is_tried_again(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    class Failing:
        def __init__(self, times: int) -> None:
            self.left = times

        def run(self, program):
            self.left -= 1
            return Outcome("passed") if self.left < 0 else Outcome("sandbox_error", "busy")

    sample = {7: samples_of(1)[0]}
    assert run_samples(Failing(2), sample)[7].kind == "passed"
    assert run_samples(Failing(3), sample)[7].kind == "sandbox_error"
