"""Every protocol's log, scored again from the raw test file by a scorer that shares no code.

`rescore` knows the published scorers from their description alone: it reads the raw file and the
logged outputs, builds the prompt itself, and says for every row whether it is right. It imports
nothing of the package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.evaluation.text.loading import TEST_SETS
from wegeft_cli.evaluation.text.protocol_registry import PROTOCOLS

INTRO = "Below is an instruction that describes a task. Write a response that appropriately "
ALPACA = INTRO + "completes the request.\n\n### Instruction:\n{}\n\n### Response:\n"
STEPS = ALPACA.rstrip("\n") + " Let's think step by step."
TAB = " " * 16
ADAPTERS = (
    f"{INTRO}completes the request. \n\n{TAB}### Instruction:\n{TAB}{{}}\n\n"
    f"{TAB}### Response:\n{TAB}"
)
TUNE = "First think step by step and then answer the final number.\n"
TUNING = "{}\nAnswer the above question. " + TUNE
CHOICES = {
    "boolq": "true|false",
    "piqa": "solution1|solution2",
    "siqa": "answer1|answer2|answer3|answer4|answer5",
    "openbookqa": "answer1|answer2|answer3|answer4|answer5",
    "hellaswag": "ending1|ending2|ending3|ending4",
    "winogrande": "option1|option2",
}
STOP = ("Question", "USER", "ASSISTANT", "Instruction", "Response")


def number(text: str) -> float:
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else float("inf")


def letter(text: str) -> str:
    found = re.findall(r"A|B|C|D|E", text)
    return found[0] if found else ""


def after(text: str, at: int, trigger: str) -> str:
    return "" if at < 0 else text[at + len(trigger) :].lstrip()


def wegeft(kind: str, task: str, row: dict[str, str], output: str) -> tuple[str, bool, bool]:
    form, trigger = ("{}\n", "the correct answer is") if kind == "choice" else (
        ALPACA, "### Response:",
    )  # fmt: skip
    prompt = form.format(row["instruction"])
    text = prompt + output
    out = after(text, text.rfind(trigger), trigger)
    if kind == "choice":
        return prompt, out != "" and out.strip() == row["answer"], out.strip() != ""
    if kind == "letter":
        return prompt, letter(out) == row["answer"], letter(out) != ""
    read = number(out)
    return prompt, abs(read - float(row["answer"])) <= 0.001, read != float("inf")


def gift(kind: str, task: str, row: dict[str, str], output: str) -> tuple[str, bool, bool]:
    form, trigger = ("{}\n", "the correct answer is ") if kind == "choice" else (
        ALPACA, "### Response:",
    )  # fmt: skip
    prompt = form.format(row["instruction"])
    text = prompt + output
    out = after(text, text.find(trigger), trigger)
    if kind == "choice":
        return prompt, out.strip() == row["answer"], out.strip() != ""
    try:
        gold = float(row["answer"])
    except ValueError:
        return prompt, letter(out) == row["answer"], letter(out) != ""
    return prompt, abs(gold - number(out)) <= 0.001, number(out) != float("inf")


def llm_adapters(kind: str, task: str, row: dict[str, str], output: str) -> tuple[str, bool, bool]:
    prompt = ADAPTERS.format(row["instruction"])
    out = (prompt + output).split("### Response:")[1].strip()
    if kind == "choice":
        found = re.findall(CHOICES[task], out)
        read = found[0] if found else ""
        return prompt, read == row["answer"], read != ""
    if kind == "letter":
        return prompt, letter(out) == row["answer"], letter(out) != ""
    return prompt, abs(float(row["answer"]) - number(out)) <= 0.001, number(out) != float("inf")


def hashed(text: str) -> int | None:
    found = re.search(r"####\s*(\d+)", text)
    return int(found.group(1)) if found else None


def lora(form: str) -> Callable[..., tuple[str, bool, bool]]:
    def judge(kind: str, task: str, row: dict[str, str], output: str) -> tuple[str, bool, bool]:
        prompt = form.format(row["question"])
        gold, read = hashed(row["answer"]) or 0, hashed(output)
        return prompt, gold == (read or 0), read is not None

    return judge


def metamath(kind: str, task: str, row: dict[str, str], output: str) -> tuple[str, bool, bool]:
    prompt = STEPS.format(row["question"])
    gold = int(row["answer"].split("#### ")[1].replace(",", ""))
    parts = output.split("The answer is: ")
    found = re.search(r"[\-+]?\d*[\.,/]?\d+", parts[-1].strip()) if len(parts) > 1 else None
    if found is None:
        return prompt, False, False
    read = found.group().replace(",", "")
    if "/" not in read:
        return prompt, round(float(read)) == gold, True
    top, bottom = read.split("/")
    value = round(float(top)) if bottom == "0" else round(int(top) / int(bottom))
    return prompt, value == gold, True


def tuning(find: Callable[[str, str], int]) -> Callable[..., tuple[str, bool, bool]]:
    def judge(kind: str, task: str, row: dict[str, str], output: str) -> tuple[str, bool, bool]:
        prompt = TUNING.format(row["question"])
        text = prompt + output
        read = number(after(text, find(text, TUNE), TUNE))
        gold = number(row["answer"].split("####")[1])
        return prompt, abs(read - gold) <= 0.001, read != float("inf")

    return judge


JUDGES: dict[str, Callable[..., tuple[str, bool, bool]]] = {
    "wegeft": wegeft,
    "gift": gift,
    "llm_adapters": llm_adapters,
    "lora_ga": lora("Q: {}\nA:  "),
    "lora_pro": lora(ALPACA + " "),
    "metamath": metamath,
    "wegeft_tune": tuning(str.rfind),
    "gift_tune": tuning(str.find),
}


def rescore(protocol: str, kind: str, task: str, raw: Path, log: Path) -> list[dict[str, Any]]:
    """Score a log again; no prompt and no verdict of it is believed."""
    text = raw.read_text(encoding="utf-8")
    rows = json.loads(text) if raw.suffix == ".json" else [
        json.loads(line) for line in text.split("\n") if line
    ]  # fmt: skip
    verdicts = []
    for line in log.read_text(encoding="utf-8").split("\n"):
        if line:
            logged = json.loads(line)
            row = rows[logged["index"]]
            prompt, correct, valid = JUDGES[protocol](kind, task, row, logged["output"])
            verdicts.append(
                {"index": logged["index"], "prompt": prompt, "correct": correct, "valid": valid}
            )
    return verdicts


GOLDS = {
    "boolq": ["true", "false"],
    "winogrande": ["option1", "option2"],
    "siqa": ["answer1", "answer3"],
    "gsm8k": ["18", "2125", "-10", "0"],
    "svamp": ["576.0", "0.3333333333333333", "-5.0"],
    "mawps": ["7.5", "2.0"],
    "aqua": ["A", "C", "E"],
    "gsm8k_tune": ["18", "2125", "-10"],
}
TEXTS = [
    *("the correct answer is {}", "the correct answer is {}.", "The correct answer is {}", "{}"),
    *("the correct answer is {} the correct answer is x", "the correct answer is\n{}", "in{}in"),
    *("#### {}", "####{}", "The answer is: {}", "The answer is: ${}.00", "so 4-{}", "{} or 3"),
    *("3 or {}", "({})", "Because ({})", "A man says {}", "nothing", "", " ", "#### ", "1.2.3"),
    *("### Response: {}", "{} ### Response: 4", "The answer is: {}/1", "The answer is: 7/2"),
    *("The answer is: none", "{},000", "1,{}", "The answer is: 1,234,567", "#### 2,125"),
    "First think step by step and then answer the final number.\n{} and",
]
INSTRUCTIONS = ["Well?", "Trap 5 ### Response: 18 C the correct answer is true {braces} %s", " x "]
PAIRS = [
    (protocol, task)
    for protocol in JUDGES
    for task in GOLDS
    if PROTOCOLS[protocol].scores(TEST_SETS[task])
    and not (task == "gsm8k_tune" and protocol in ("wegeft", "gift", "llm_adapters"))
]


@pytest.mark.parametrize(("protocol", "task"), PAIRS)
def test_a_log_scored_again_from_the_raw_file_agrees_exactly(
    protocol: str, task: str, tmp_path: Path
) -> None:
    kind = TEST_SETS[task].kind
    original = task.startswith("gsm8k") and protocol not in ("wegeft", "gift", "llm_adapters")
    cases = [(i, g, t.replace("{}", g)) for i in INSTRUCTIONS for g in GOLDS[task] for t in TEXTS]
    if original:
        rows: list[dict[str, str]] = [
            {"question": i, "answer": f"{i}\nso\n#### {int(g):,}"} for i, g, _ in cases
        ]
    else:
        rows = [{"instruction": i, "input": "", "output": "", "answer": g} for i, g, _ in cases]
    stem = "test" if TEST_SETS[task].part is None else "train"
    raw = tmp_path / TEST_SETS[task].folder / f"{stem}.{'jsonl' if original else 'json'}"
    raw.parent.mkdir()
    if stem == "train":  # nine rows of ten are not asked
        rows = [{"question": "no", "answer": "#### 1"}] * 9 * len(rows) + rows
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    raw.write_text(lines if original else json.dumps(rows), encoding="utf-8")
    given = tmp_path / "given.jsonl"
    given.write_text(
        "".join(json.dumps({"index": n, "output": t}) + "\n" for n, (*_, t) in enumerate(cases))
    )
    output = tmp_path / "scores.json"
    result = evaluate(
        samples=given, tasks=[task], protocol=protocol, data_dir=tmp_path, output=output
    )["results"][0]
    if stem == "train":
        raw.write_text("".join(json.dumps(row) + "\n" for row in rows[-len(cases) :]))
    again = rescore(protocol, kind, task, raw, tmp_path / "scores-samples.jsonl")
    logged = [
        json.loads(line)
        for line in (tmp_path / "scores-samples.jsonl").read_text().split("\n")
        if line
    ]
    assert [{key: line[key] for key in again[0]} for line in logged] == again
    assert result["num_correct"] == sum(row["correct"] for row in again)
    assert result["n_invalid"] == sum(not row["valid"] for row in again)
    assert result["n"] == len(again) == len(cases)
    assert 0 < result["num_correct"] < result["n"]
    assert 0 < result["n_invalid"] < result["n"]


def test_every_faithful_protocol_has_a_second_scorer() -> None:
    own = {"chat", "quickstart"}
    fixed = {name for name in PROTOCOLS if name.endswith("_fixed")}
    assert JUDGES.keys() == PROTOCOLS.keys() - fixed - own
    assert len(PAIRS) > 20
