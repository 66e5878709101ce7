"""`EvalProtocol`: prompt, decoding, answer extraction and scoring of text benchmarks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wegeft_cli.data.text.template_settings import CHAT
from wegeft_cli.data.text.templates import TEMPLATES
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text.answer_extraction import NUMBER_TOLERANCE, gold_number
from wegeft_cli.evaluation.text.json_rows import raise_faults
from wegeft_cli.evaluation.text.loading import Question, Questions, TestSet
from wegeft_cli.generation.decoding import Decoding

Prediction = str | float
"""A word or letter, or a finite number."""


Cut = Callable[[str, str], str]
"""(full text, generated text) -> the part that contains the answer."""

Read = Callable[[str, str, TestSet], Prediction | None]
"""(that part, gold answer, test set) -> the prediction, None if there is none."""


@dataclass(frozen=True)
class Rule:
    """Prompt and reading of one kind of answer, or of one test set."""

    template: str
    """The name of a template of `data/text/templates.py`, shared with training."""
    decoding: Decoding
    cut: Cut
    """Selects the part of the text that contains the answer."""
    read: Read
    """Reads the answer in that part."""
    gold: Callable[[str], float | None] = gold_number
    """Reads the number of the gold answer."""
    tolerance: float = NUMBER_TOLERANCE
    """Largest difference at which two numbers are equal."""
    missing: float | None = None
    """Value of an answer or a gold that cannot be read, and which may be right."""
    as_trained: bool = False
    """Use the prompt of training, even if the authors' scorer uses another one."""
    reads_original: bool = False
    """Read the gold from the published `answer` of the set."""
    suffix: str = ""
    """Text after the instruction."""

    @property
    def is_chat(self) -> bool:
        """Whether the prompt uses the model's own chat template."""
        return self.template == CHAT

    def question_form(self) -> str:
        """Return the prompt with `%s` for the instruction; for a chat, the user's message."""
        pair = TEMPLATES[self.template]
        form = "{instruction}" if pair is None else pair.question(as_trained=self.as_trained)
        return form.format(instruction=f"%s{self.suffix}")


@dataclass(frozen=True)
class EvalProtocol:
    """Prompt, decoding and scoring for every kind of test set that it scores."""

    name: str
    description: str
    """What it does and which faults it keeps, for the user."""
    rules: Mapping[str, Rule]
    """Rules by a set's folder or by kind of answer; the folder has priority."""
    fixed: str | None = None
    """The protocol with the same prompts that reads without the faults."""

    def rule(self, test_set: TestSet) -> Rule:
        """Return the rule of a test set; KeyError if the protocol does not score it."""
        return self.rules[test_set.folder if test_set.folder in self.rules else test_set.kind]

    def scores(self, test_set: TestSet) -> bool:
        """Return whether the protocol scores a test set."""
        if test_set.own_protocol is not None:
            return test_set.own_protocol == self.name
        return test_set.folder in self.rules or test_set.kind in self.rules

    def prompt(self, test_set: TestSet, row: Question) -> str:
        """Return the text that the model continues; for a chat, the user's message."""
        return self.rule(test_set).question_form().replace("%s", row.instruction, 1)

    def decoding(self, test_set: TestSet) -> Decoding:
        """Return the decoding settings of a test set."""
        return self.rule(test_set).decoding

    def max_new_tokens(self, test_set: TestSet) -> int:
        """Return the length of the longest answer in tokens."""
        return self.rule(test_set).decoding.max_new_tokens

    def template_name(self, test_set: TestSet) -> str:
        """Return the template's name, a value of `data.template`."""
        return self.rule(test_set).template

    def template_hash(self, test_set: TestSet) -> str:
        """Return the first 16 hex digits of the SHA-256 of the prompt's template."""
        return hashlib.sha256(self.rule(test_set).question_form().encode()).hexdigest()[:16]

    def extract(
        self, test_set: TestSet, full_text: str, new_text: str, answer: str
    ) -> Prediction | None:
        """Return the prediction (a word, a letter or a finite number), None if there is none.

        `full_text` is the prompt and the generated text. gift uses the gold answer to distinguish
        numbers from letters.
        """
        rule = self.rule(test_set)
        return rule.read(rule.cut(full_text, new_text), answer, test_set)

    def gold_text(self, test_set: TestSet, row: Question) -> str:
        """Return the text that contains the gold answer."""
        return str(row.source["answer"]) if self.rule(test_set).reads_original else row.answer

    def is_correct(self, test_set: TestSet, prediction: Prediction | None, answer: str) -> bool:
        """Return whether a prediction is the gold answer: an equal text, or an equal number."""
        rule = self.rule(test_set)
        if isinstance(prediction, str):
            return prediction == answer.strip()
        prediction = rule.missing if prediction is None else prediction
        if prediction is None:
            return False
        gold = rule.gold(answer)
        gold = rule.missing if gold is None else gold
        return gold is not None and abs(prediction - gold) <= rule.tolerance

    def check_data(self, data: Questions) -> None:
        """Raise UserError for each row whose gold answer this protocol cannot read."""
        rule = self.rule(data.test_set)
        if not rule.reads_original:
            raise_faults(
                [
                    UserError(
                        f"row {row.index}: `{self.name}` reads no number in the gold answer "
                        f"{row.answer!r}",
                        file=data.origin,
                    )
                    for row in data.rows
                    if data.test_set.kind == "number" and rule.gold(row.answer) is None
                ]
            )
            return
        raise_faults(
            [
                UserError(
                    f"row {row.index} has no `answer` with `####`, out of which `{self.name}` "
                    "reads the gold",
                    file=data.origin,
                    key="protocol",
                    hint=f"put {data.test_set.name} in its original form at "
                    f"<data-dir>/{Path(data.test_set.file).with_suffix('.jsonl')}, or use "
                    f"`{self.fixed}`",
                )
                for row in data.rows
                if "####" not in str(row.source.get("answer"))
            ]
        )
