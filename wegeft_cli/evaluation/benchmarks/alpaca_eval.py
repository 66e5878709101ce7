"""AlpacaEval: instructions are answered, and compared by the judge that the user names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.data.text.templates import TEMPLATES
from wegeft_cli.evaluation.benchmarks.base import Asked, TaskRequest
from wegeft_cli.evaluation.benchmarks.judged import (
    JudgedTask,
    collect_verdicts,
    name_answerer,
    to_array,
)
from wegeft_cli.evaluation.judged import alpaca_eval_data as alpaca_eval
from wegeft_cli.evaluation.judged.judge_client import Judge
from wegeft_cli.evaluation.score import TaskScore
from wegeft_cli.evaluation.text.answer_extraction import text_after_first
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.inference.prompt_format import ChatPrompts, write_chat_prompts
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
_TASK = JudgedTask(
    "alpaca_eval",
    _PROTOCOLS,
    f"{alpaca_eval.FOLDER}/alpaca_eval.json",
    alpaca_eval.NUM_PUBLISHED,
)


@dataclass(frozen=True)
class AlpacaEvalJob:
    """AlpacaEval under one protocol."""

    instructions: alpaca_eval.Instructions
    protocol: str
    max_new_tokens: int | None
    judge: Judge | None
    messages: Sequence[tuple[str, str]]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The task's name."""
        return _TASK.name

    @property
    def protocol_name(self) -> str:
        """The protocol's name."""
        return self.protocol

    @property
    def num_rows(self) -> int:
        """Instructions to be answered."""
        return len(self.instructions.rows)

    def key(self) -> Mapping[str, Any]:
        """All that the answers depend on besides the model; the judge is none of it."""
        return {
            "task": _TASK.name,
            "protocol": self.protocol,
            "data_sha256": self.instructions.sha256,
            "max_new_tokens": self.max_new_tokens,
        }

    def run(self, model: Any, tokenizer: Any, asked: Asked) -> TaskScore:
        """Let the model answer, and the judge compare."""
        from wegeft_cli.evaluation.answers import write_answers
        from wegeft_cli.generation.completion import Written

        prompts, template_hash, turn_ends = self._write_prompts(tokenizer)
        written: dict[int, Written] = {}
        settings: dict[str, Any] = {}
        for length, numbers in self._lengths(model, tokenizer, prompts).items():
            decoding = Decoding(length)
            if self.protocol == "gift":
                decoding = Decoding(
                    length, repetition_penalty=1.1, no_repeat_ngram_size=5, eos_alone=True
                )
            num_done = len(written)
            answers, settings = write_answers(
                model,
                tokenizer,
                {number: prompts[number] for number in numbers},
                decoding,
                asked,
                add_special_tokens=self.protocol != "chat",
                turn_ends=turn_ends,
                on_progress=lambda done, n=num_done: asked.on_progress(n + done, self.num_rows),  # type: ignore[misc]
            )
            written |= answers
        outputs = {
            number: answer.new_text.strip()
            if self.protocol == "chat"
            else text_after_first(answer.text, _MARK)
            for number, answer in written.items()
        }
        score = self._score(outputs, name_answerer(model, self.options, asked), asked)
        generation = {
            **settings,
            "max_length": _GIFT_LENGTH if self.protocol == "gift" else None,
            "num_truncated_prompts": sum(answer.is_truncated for answer in written.values()),
            "num_new_tokens": sum(len(answer.new_ids) for answer in written.values()),
        }
        return replace(score, generation=generation, template_hash=template_hash)

    def score_samples(self, path: Path) -> TaskScore:
        """Score an annotation file as it is, or let the judge compare an output file."""
        if self.options.get("is_judged"):
            annotations = alpaca_eval.read_annotations(path, self.instructions)
            return self._summarise(annotations, {}, {})
        outputs = alpaca_eval.read_outputs(path, self.instructions)
        return self._score(outputs, path.stem, Asked(1))

    def _write_prompts(self, tokenizer: Any) -> ChatPrompts:
        rows = self.instructions.rows
        if self.protocol == "chat":
            return write_chat_prompts(
                tokenizer,
                {row.index: [{"role": "user", "content": row.instruction}] for row in rows},
                protocol="chat",
                other="gift",
            )
        template = TEMPLATES["alpaca"]
        assert template is not None
        texts = {
            row.index: template.prompt.replace("{instruction}", row.instruction, 1) for row in rows
        }
        digest = hashlib.sha256(template.prompt.encode()).hexdigest()[:16]
        return ChatPrompts(texts, digest, [])

    def _lengths(
        self, model: Any, tokenizer: Any, prompts: Mapping[int, str]
    ) -> dict[int, list[int]]:
        """Longest answer -> the prompts that may have it.

        GIFT limits prompt and answer together, so each length of prompt has a limit of its own.
        """
        from wegeft_cli.generation.engine import find_context

        if self.max_new_tokens is not None:
            return {self.max_new_tokens: list(prompts)}
        if self.protocol == "chat":
            return {_CHAT_TOKENS: list(prompts)}
        longest = min(_GIFT_LENGTH, find_context(model) or _GIFT_LENGTH)
        groups: dict[int, list[int]] = {}
        for number, text in prompts.items():
            room = max(1, longest - len(tokenizer(text)["input_ids"]))
            groups.setdefault(room, []).append(number)
        return dict(sorted(groups.items()))

    def _score(self, outputs: Mapping[int, str], generator: str, asked: Asked) -> TaskScore:
        rows = alpaca_eval.output_rows(self.instructions, outputs, generator)
        files = {"alpaca_eval-outputs.json": to_array(rows)}
        if self.judge is None:
            return self._summarise(None, outputs, files)
        requests = alpaca_eval.judge_requests(self.instructions, outputs, self.messages)
        words = collect_verdicts(self.judge, requests, asked)
        annotations = alpaca_eval.annotation_rows(
            self.instructions, outputs, words, generator=generator, annotator=self.judge.model
        )
        files["alpaca_eval-annotations.json"] = to_array(annotations)
        return self._summarise(annotations, outputs, files)

    def _summarise(
        self,
        annotations: Sequence[Mapping[str, Any]] | None,
        outputs: Mapping[int, str],
        files: dict[str, str],
    ) -> TaskScore:
        rows = self.instructions.rows
        told = None if annotations is None else alpaca_eval.summarise_preferences(annotations)
        preferences: list[float | None] = [None] * len(rows)
        if annotations is not None:
            preferences = [alpaca_eval.read_preference(row) for row in annotations]
        shares = [float(value) - 1 for value in preferences if value is not None]
        is_judged = told is not None
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
        return TaskScore(
            task=_TASK.name,
            protocol=self.protocol,
            score=None if told is None else told["win_rate"],
            num_correct=None if told is None else told["n_wins"],
            n=len(rows),
            n_invalid=0 if told is None else told["n_invalid"],
            ci95=normal_interval(shares) if shares else None,
            template_hash="",
            data_sha256=self.instructions.sha256,
            origin=self.instructions.origin,
            samples=samples,
            template="alpaca" if self.protocol == "gift" else self.protocol,
            extra={
                "preference": told,
                "judge": str(annotations[0].get("annotator")) if annotations else None,
                "reference": rows[0].generator,
                "num_rows": self.instructions.num_rows,
            },
            files=files,
        )


def read_alpaca_eval(request: TaskRequest) -> AlpacaEvalJob:
    """Read AlpacaEval, and the judge's prompt where there is a judge, before any model is loaded.

    Args:
        request: The task; `options` may hold judge_url, judge_model, is_judged.

    Returns:
        The job.

    Raises:
        UserError: If files are missing or damaged, or the options do not go together.
        ExceptionGroup: If there are several such faults.
    """
    wishes = _TASK.read(request)
    messages: Sequence[tuple[str, str]] = ()
    instructions = alpaca_eval.load_instructions(wishes.data_dir, wishes.limit)
    if wishes.judge is not None:
        messages = alpaca_eval.load_judge_prompt(wishes.data_dir)
    return AlpacaEvalJob(
        instructions,
        wishes.protocol,
        wishes.max_new_tokens,
        wishes.judge,
        messages,
        request.options,
    )


ALPACA_EVAL = _TASK.as_kind(read_alpaca_eval)
"""Answers compared with a reference model's by a judge."""
