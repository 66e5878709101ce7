from __future__ import annotations

import hashlib

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.protocols import PROTOCOLS, find_protocol
from wegeft_cli.evaluation.tasks import TASKS, TaskRow

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)


def make_row(instruction: str, answer: str = "1") -> TaskRow:
    return TaskRow(0, instruction, answer, {})


@pytest.mark.parametrize("name", ["wegeft", "gift"])
@pytest.mark.parametrize(
    ("task", "template", "max_new_tokens"),
    [("boolq", "{}\n", 32), ("gsm8k", ALPACA, 512), ("aqua", ALPACA, 512)],
)
def test_prompts_are_byte_exact(name: str, task: str, template: str, max_new_tokens: int) -> None:
    protocol = PROTOCOLS[name]
    instruction = "100 %s of {x}\\n?"
    assert protocol.prompt(TASKS[task], make_row(instruction)) == template.format(instruction)
    assert protocol.max_new_tokens(TASKS[task]) == max_new_tokens
    told = hashlib.sha256(template.replace("{}", "%s").encode()).hexdigest()[:16]
    assert protocol.template_hash(TASKS[task]) == told


def test_the_quickstart_reads_the_first_line_alone() -> None:
    protocol, task = PROTOCOLS["quickstart"], TASKS["quickstart"]
    prompt = protocol.prompt(task, make_row("What is 2 + 2?"))
    assert prompt == "Question: What is 2 + 2?\nAnswer:"
    assert protocol.max_new_tokens(task) == 8
    assert protocol.extract(task, prompt + " 3, no 4\n5", " 3, no 4\n5", "4") == 4.0
    assert protocol.extract(task, prompt + "\n4", "\n4", "4") is None


@pytest.mark.parametrize("name", ["wegeft", "gift"])
def test_a_published_protocol_scores_the_published_sets(name: str) -> None:
    published = [task for task in TASKS.values() if task.name != "quickstart"]
    assert len(published) == 18
    for task in published:
        assert find_protocol(name, task) is PROTOCOLS[name]


@pytest.mark.parametrize(
    ("name", "task", "hint"),
    [
        ("quickstart", "gsm8k", "use `wegeft` or `wegeft_fixed`"),
        ("wegeft", "quickstart", "use `quickstart`"),
        ("gift", "quickstart", "use `quickstart`"),
    ],
)
def test_a_protocol_of_another_task_is_refused(name: str, task: str, hint: str) -> None:
    with pytest.raises(UserError, match="does not score") as caught:
        find_protocol(name, TASKS[task])
    assert str(caught.value.hint).startswith(hint)


def test_without_a_name_the_task_decides() -> None:
    assert find_protocol(None, TASKS["quickstart"]).name == "quickstart"
    assert find_protocol(None, TASKS["gsm8k"]).name == "wegeft"


def test_a_misspelt_protocol_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="wegft") as caught:
        find_protocol("wegft", TASKS["gsm8k"])
    assert caught.value.hint == "did you mean `wegeft`?"


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_every_protocol_tells_the_faults_it_keeps(name: str) -> None:
    description = PROTOCOLS[name].description
    assert ("Kept fault" in description) != ("o kept fault is known" in description)
    if name.endswith("_fixed"):
        assert "Kept fault" not in description
