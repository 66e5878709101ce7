"""AlpacaEval: answers to instructions, compared with a reference model's by a judge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from wegeft_cli.data.text.templates import TEMPLATES
from wegeft_cli.evaluation.benchmarks.base import BenchmarkContext, EvaluationRequest
from wegeft_cli.evaluation.benchmarks.judged import (
    JudgedBenchmark,
    JudgedRequest,
    Rows,
    judged_family,
    to_array,
)
from wegeft_cli.evaluation.judged import alpaca_eval_data as alpaca_eval
from wegeft_cli.evaluation.judged.judge_client import JudgeRequest
from wegeft_cli.evaluation.score import Score
from wegeft_cli.evaluation.text.answer_extraction import text_after_first
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.inference.prompt_format import RenderedPrompts, render_user_prompts
from wegeft_cli.statistics import normal_interval

_GIFT_LENGTH = 2048
_CHAT_TOKENS = 2048
_MARK = "### Response:"
_PROTOCOLS = {
    "gift": "GIFT's, which is pyreft's: the Alpaca prompt, greedy, no n-gram of 5 twice, "
    "repetition penalty 1.1 (both see the prompt, too), prompt and answer together at most 2,048 "
    "tokens; the text after the first `### Response:`.",
    "chat": "For instruction-tuned models: the instruction in the model's own chat template, "
    "greedy, at most 2,048 tokens.",
}


@dataclass(frozen=True)
class AlpacaEval(JudgedBenchmark[str]):
    """AlpacaEval under one protocol."""

    name: ClassVar[str] = "alpaca_eval"
    instructions: alpaca_eval.Instructions
    messages: Sequence[tuple[str, str]]

    @property
    def num_examples(self) -> int:
        """Number of instructions."""
        return len(self.instructions.rows)

    def cache_key(self) -> Mapping[str, Any]:
        """Return everything that the answers depend on besides the model and the judge."""
        return {
            "task": self.name,
            "protocol": self.protocol_name,
            "data_sha256": self.instructions.sha256,
            "max_new_tokens": self.request.max_new_tokens,
        }

    def answer(
        self, model: Any, context: BenchmarkContext
    ) -> tuple[dict[int, str], dict[str, Any], str]:
        """Generate the answers, length by length."""
        from wegeft_cli.evaluation.answers import Answers, generate_answers

        is_gift = self.protocol_name == "gift"
        prompts = self._render(model)
        answers = Answers({}, {})
        for length, numbers in self._lengths(model, prompts.texts).items():
            decoding = Decoding(length)
            if is_gift:
                decoding = Decoding(
                    length, repetition_penalty=1.1, no_repeat_ngram_size=5, eos_alone=True
                )

            def report(done: int, before: int = len(answers.completions)) -> None:
                context.on_progress(before + done, self.num_examples)

            new = generate_answers(
                model,
                replace(prompts, texts={number: prompts.texts[number] for number in numbers}),
                decoding,
                context,
                on_progress=report,
            )
            answers = Answers(answers.completions | new.completions, new.settings)
        outputs = {
            number: text_after_first(answer.text, _MARK) if is_gift else answer.new_text.strip()
            for number, answer in answers.completions.items()
        }
        generation = answers.generation(max_length=_GIFT_LENGTH if is_gift else None)
        return outputs, generation, prompts.template_hash

    def _render(self, model: Any) -> RenderedPrompts:
        texts = {row.index: row.instruction for row in self.instructions.rows}
        if self.protocol_name == "chat":
            settings = model.chat_settings
            return render_user_prompts(
                model.tokenizer, texts, protocol="chat", other="gift", settings=settings
            )
        template = TEMPLATES["alpaca"]
        assert template is not None
        filled = {n: template.prompt.replace("{instruction}", t, 1) for n, t in texts.items()}
        digest = hashlib.sha256(template.prompt.encode()).hexdigest()[:16]
        return RenderedPrompts(filled, digest)

    def _lengths(self, model: Any, texts: Mapping[int, str]) -> dict[int, list[int]]:
        """Group the prompts by the longest answer that they may have.

        GIFT limits prompt and answer together, so that the limit depends on the prompt's length.
        """
        from wegeft_cli.generation.engine import context_length

        if self.request.max_new_tokens is not None:
            return {self.request.max_new_tokens: list(texts)}
        if self.protocol_name == "chat":
            return {_CHAT_TOKENS: list(texts)}
        longest = min(_GIFT_LENGTH, context_length(model.model) or _GIFT_LENGTH)
        groups: dict[int, list[int]] = {}
        for number, text in texts.items():
            room = max(1, longest - len(model.tokenizer(text)["input_ids"]))
            groups.setdefault(room, []).append(number)
        return dict(sorted(groups.items()))

    def judge_requests(self, outputs: Mapping[int, str]) -> list[JudgeRequest]:
        """Return the questions to the judge."""
        return alpaca_eval.judge_requests(self.instructions, outputs, self.messages)

    def output_file(self, outputs: Mapping[int, str], generator: str) -> tuple[str, str]:
        """Return AlpacaEval's file of outputs."""
        rows = alpaca_eval.output_rows(self.instructions, outputs, generator)
        return "alpaca_eval-outputs.json", to_array(rows)

    def verdict_file(
        self, outputs: Mapping[int, str], generator: str, texts: Mapping[int, str]
    ) -> tuple[Rows, str, str]:
        """Return AlpacaEval's file of annotations."""
        assert self.request.judge is not None
        rows = alpaca_eval.annotation_rows(
            self.instructions,
            outputs,
            texts,
            generator=generator,
            annotator=self.request.judge.model,
        )
        return rows, "alpaca_eval-annotations.json", to_array(rows)

    def read_verdicts(self, path: Path) -> Rows:
        """Read AlpacaEval's file of annotations."""
        return alpaca_eval.read_annotations(path, self.instructions)

    def read_outputs(self, path: Path) -> dict[int, str]:
        """Read AlpacaEval's file of outputs."""
        return alpaca_eval.read_outputs(path, self.instructions)

    def summarise(self, verdicts: Rows | None, outputs: Mapping[int, str]) -> Score:
        """Return the win rate."""
        rows = self.instructions.rows
        summary = None if verdicts is None else alpaca_eval.summarise_preferences(verdicts)
        preferences: list[float | None] = [None] * len(rows)
        if verdicts is not None:
            preferences = [alpaca_eval.read_preference(row) for row in verdicts]
        shares = [float(value) - 1 for value in preferences if value is not None]
        is_judged = summary is not None
        samples = [
            {
                "index": row.index,
                "prompt": row.instruction,
                "output": outputs.get(row.index),
                "prediction": preference,
                "answer": row.reference,
                "correct": preference is not None and preference > 1.5 if is_judged else None,
                "valid": preference is not None or not is_judged,
            }
            for row, preference in zip(rows, preferences, strict=True)
        ]
        return Score(
            task=self.name,
            protocol=self.protocol_name,
            score=None if summary is None else summary["win_rate"],
            num_correct=None if summary is None else summary["n_wins"],
            n=len(rows),
            n_invalid=0 if summary is None else summary["n_invalid"],
            ci95=normal_interval(shares) if shares else None,
            template_hash="",
            data_sha256=self.instructions.sha256,
            origin=self.instructions.origin,
            samples=samples,
            template="alpaca" if self.protocol_name == "gift" else self.protocol_name,
            extra={
                "preference": summary,
                "judge": str(verdicts[0].get("annotator")) if verdicts else None,
                "reference": rows[0].generator,
                "num_rows": self.instructions.num_rows,
            },
        )


def _load(request: JudgedRequest, whole: EvaluationRequest) -> AlpacaEval:
    instructions = alpaca_eval.load_instructions(request.data_dir, request.limit)
    messages: Sequence[tuple[str, str]] = ()
    if request.judge is not None:
        messages = alpaca_eval.load_judge_prompt(request.data_dir)
    return AlpacaEval(request, whole.options, instructions, messages)


FAMILY = judged_family(
    ("alpaca_eval",),
    _PROTOCOLS,
    f"{alpaca_eval.FOLDER}/alpaca_eval.json",
    alpaca_eval.NUM_PUBLISHED,
    _load,
)
