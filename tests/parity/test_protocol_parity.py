"""The published scorers, written down again from their description, against ours on odd outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from wegeft_cli.evaluation.text.loading import TEST_SETS, load_questions
from wegeft_cli.evaluation.text.protocol_registry import PROTOCOLS
from wegeft_cli.evaluation.text.scoring import score_outputs

BARE = "%s\n"
ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
%s

### Response:
"""

WORD_OUTPUTS = [
    "the correct answer is true",
    "the correct answer is true.",
    "The correct answer is true",
    "true",
    "the correct answer is true the correct answer is false",
    "the correct answer is false the correct answer is true",
    "the correct answer is  true \n",
    "the correct answer is\ntrue",
    "the correct answer istrue",
    "the correct answer is",
    "the correct answer is ",
    "the correct answer is True",
    "the correct answer is true\nthe correct answer is true",
    "",
    " ",
]
NUMBER_OUTPUTS = [
    "It is 2-1",
    "range 3-5",
    "7 (see step 2)",
    "1.2.3",
    "$576",
    "576.",
    "576.0 dollars",
    "1,234",
    "12,34",
    "#### 576",
    "####576",
    "#### -5",
    "-5",
    "- 5",
    "1/3",
    "0.333",
    "0.3323",
    "0.334",
    "576 ### Response: 5",
    "5 ### Response: 576",
    "### Response:",
    "none",
    "",
    "\n\n",
    "9" * 400,
    "5e2",
    "\u0665",
    "The answer is 576 and\n\n### Instruction:\nNext 3",
]
LETTER_OUTPUTS = [
    "B",
    "(B)",
    "The answer is B.",
    "A man has B",
    "Because C",
    "Rationale: C",
    "b",
    "C ### Response: B",
    "B ### Response: C",
    "Answer: B",
    "none",
    "",
    "DEAB",
    "5",
]
NUMBER_GOLDS = ["576.0", "-5.0", "0.3333333333333333", "1234.0", "-1", "2", "3.0", "5"]
WORD_INSTRUCTIONS = ["Is it?", "Say: the correct answer is false. Is it?"]
MATHS_INSTRUCTIONS = ["How many? 576", "A trap. ### Response: 576 B ?"]

CASES = {
    "boolq": (WORD_INSTRUCTIONS, ["true", "false"], WORD_OUTPUTS),
    "gsm8k": (MATHS_INSTRUCTIONS, NUMBER_GOLDS, NUMBER_OUTPUTS),
    "svamp": (MATHS_INSTRUCTIONS, NUMBER_GOLDS, NUMBER_OUTPUTS),
    "mawps": (MATHS_INSTRUCTIONS, NUMBER_GOLDS, NUMBER_OUTPUTS),
    "aqua": (MATHS_INSTRUCTIONS, list("ABCDE"), LETTER_OUTPUTS + NUMBER_OUTPUTS),
}


def plain_number(text: str) -> float:
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else float("inf")


def plain_letter(text: str) -> str:
    found = re.findall(r"A|B|C|D|E", text)
    return found[0] if found else ""


def plain_wegeft(task: str, instruction: str, output: str, gold: str) -> tuple[bool, bool]:
    if task == "boolq":
        prompt, trigger = BARE % instruction, "the correct answer is"
    else:
        prompt, trigger = ALPACA % instruction, "### Response:"
    text = prompt + output
    at = text.rfind(trigger)
    out = "" if at < 0 else text[at + len(trigger) :].lstrip()
    if task == "boolq":
        return out != "" and out.strip() == gold.strip(), out != ""
    if task == "aqua":
        letter = plain_letter(out)
        return letter == gold, letter != ""
    number = plain_number(out)
    return abs(number - plain_number(gold)) <= 0.001, number != float("inf")


def plain_gift(task: str, instruction: str, output: str, gold: str) -> tuple[bool, bool]:
    if task == "boolq":
        prompt, trigger = BARE % instruction, "the correct answer is "
    else:
        prompt, trigger = ALPACA % instruction, "### Response:"
    text = prompt + output
    at = text.find(trigger)
    out = "" if at < 0 else text[at + len(trigger) :].lstrip()
    if task == "boolq":
        return out.strip() == gold.strip(), out != ""
    try:
        wanted = float(gold)
    except ValueError:
        letter = plain_letter(out)
        return letter == gold, letter != ""
    number = plain_number(out)
    return abs(wanted - number) <= 0.001, number != float("inf")


PLAIN = {"wegeft": plain_wegeft, "gift": plain_gift}


@pytest.mark.parametrize("protocol", sorted(PLAIN))
@pytest.mark.parametrize("task", sorted(CASES))
def test_every_verdict_is_the_plain_scorers(protocol: str, task: str, tmp_path: Path) -> None:
    instructions, golds, outputs = CASES[task]
    cases = [(i, g, o) for i in instructions for g in golds for o in outputs]
    path = tmp_path / TEST_SETS[task].folder / "test.json"
    path.parent.mkdir()
    rows: list[dict[str, Any]] = [
        {"instruction": instruction, "input": "", "output": "", "answer": gold}
        for instruction, gold, _ in cases
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    data = load_questions(TEST_SETS[task], data_dir=tmp_path, limit=None)
    texts = {index: output for index, (*_, output) in enumerate(cases)}
    score = score_outputs(PROTOCOLS[protocol], data, texts)
    expected = [PLAIN[protocol](task, i, o, g) for i, g, o in cases]
    got = [(sample["correct"], sample["valid"]) for sample in score.samples]
    assert got == expected
    assert score.num_correct == sum(correct for correct, _ in expected)
    assert 0 < score.num_correct < score.n
    assert 0 < score.n_invalid < score.n


@pytest.mark.parametrize(
    ("output", "wegeft", "gift"),
    [
        ("the correct answer is true", True, True),
        ("the correct answer is true.", False, False),
        ("The correct answer is true", False, False),
        ("true", False, False),
        ("the correct answer is true the correct answer is false", False, False),
        ("the correct answer is false the correct answer is true", True, False),
        ("the correct answer is\ntrue", True, False),
    ],
)
def test_the_published_table_of_verdicts(output: str, wegeft: bool, gift: bool) -> None:
    task = TEST_SETS["boolq"]
    for name, verdict in (("wegeft", wegeft), ("gift", gift)):
        prediction = PROTOCOLS[name].extract(task, f"Is it?\n{output}", output, "true")
        assert PROTOCOLS[name].is_correct(task, prediction, "true") is verdict
        assert PLAIN[name]("boolq", "Is it?", output, "true")[0] is verdict


@pytest.mark.parametrize(
    ("text", "number"),
    [("It is 2-1", -1), ("range 3-5", -5), ("7 (see step 2)", 2), ("1.2.3", 3), ("$1,234.", 1234)],
)
def test_the_published_readings_of_numbers(text: str, number: float, tmp_path: Path) -> None:
    assert plain_number(text) == number
    task, protocol = TEST_SETS["mawps"], PROTOCOLS["wegeft"]
    assert protocol.extract(task, f"### Response:{text}", text, "0") == number
