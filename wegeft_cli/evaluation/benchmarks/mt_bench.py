"""MT-Bench: two turns are answered by the rules, and rated by the judge that the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.evaluation.benchmarks.base import Asked, TaskRequest
from wegeft_cli.evaluation.benchmarks.judged import (
    JudgedTask,
    collect_verdicts,
    name_answerer,
    to_lines,
)
from wegeft_cli.evaluation.judged import mt_bench_questions as mt_bench
from wegeft_cli.evaluation.judged import mt_bench_ratings as judging
from wegeft_cli.evaluation.judged.judge_client import Judge
from wegeft_cli.evaluation.score import TaskScore
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.inference.prompt_format import ChatPrompts, has_chat_template, write_chat_prompts
from wegeft_cli.statistics import normal_interval

_ALPACA = "fastchat_alpaca"
_PROTOCOLS = {
    "fastchat": "FastChat's single-answer grading: two turns, temperature by category, 1,024 "
    "tokens a turn, in the model's own chat template; a model without one is asked as by "
    "fastchat_alpaca. Draws are not FastChat's one by one; its top-p is the model's, here 1.",
    _ALPACA: "fastchat, in FastChat's conversation template `alpaca` whatever the model brings.",
}
_HIGHEST = 10
_TASK = JudgedTask(
    "mt_bench", _PROTOCOLS, f"{mt_bench.FOLDER}/question.jsonl", 160, other_names=("mt-bench",)
)


@dataclass(frozen=True)
class MtBenchJob:
    """MT-Bench under one protocol."""

    questions: mt_bench.Questions
    protocol: str
    max_new_tokens: int
    seed: int
    judge: Judge | None
    files: judging.JudgeFiles | None
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
        """Turns to be answered."""
        return mt_bench.NUM_TURNS * len(self.questions.rows)

    def key(self) -> Mapping[str, Any]:
        """All that the answers depend on besides the model; the judge is none of it."""
        return {
            "task": _TASK.name,
            "protocol": self.protocol,
            "data_sha256": self.questions.sha256,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }

    def run(self, model: Any, tokenizer: Any, asked: Asked) -> TaskScore:
        """Let the model answer both turns, and the judge rate them."""
        histories: dict[int, list[dict[str, str]]] = {q.index: [] for q in self.questions.rows}
        settings: dict[str, Any] = {}
        digest, num_tokens = "", 0
        for turn in range(mt_bench.NUM_TURNS):
            for question in self.questions.rows:
                text = question.turns[turn]
                histories[question.index].append({"role": "user", "content": text})
            prompts, is_chat = self._write_prompts(tokenizer, histories)
            digest = prompts.template_hash
            answers, settings, added = self._answer_turn(
                model, tokenizer, prompts, turn, asked, is_chat=is_chat
            )
            num_tokens += added
            for index, answer in answers.items():
                histories[index].append({"role": "assistant", "content": answer})
        answers_by_question = {
            index: (history[1]["content"], history[3]["content"])
            for index, history in histories.items()
        }
        model_id = name_answerer(model, self.options, asked)
        score = self._score(answers_by_question, model_id, asked)
        kept = {key: value for key, value in settings.items() if key not in ("do_sample", "seed")}
        generation = {
            **kept,
            "temperature": dict(mt_bench.TEMPERATURES),
            "seed": self.seed,
            "num_new_tokens": num_tokens,
        }
        return replace(score, generation=generation, template_hash=digest)

    def score_samples(self, path: Path) -> TaskScore:
        """Score a judgment file as it is, or let the judge rate an answer file."""
        if self.options.get("is_judged"):
            return self._summarise(judging.read_judgments(path, self.questions), {}, {})
        answers = mt_bench.read_answers(path, self.questions)
        return self._score(answers, path.stem, Asked(1))

    def _write_prompts(
        self, tokenizer: Any, histories: Mapping[int, Sequence[Mapping[str, str]]]
    ) -> tuple[ChatPrompts, bool]:
        """Prompts, and whether they hold their special tokens already."""
        if self.protocol != _ALPACA and has_chat_template(tokenizer):
            told = write_chat_prompts(tokenizer, histories, protocol=self.protocol, other=_ALPACA)
            return told, True
        eos = tokenizer.eos_token or ""
        prompts = {
            index: mt_bench.alpaca_conversation(history, eos)
            for index, history in histories.items()
        }
        return ChatPrompts(prompts, _ALPACA, []), False

    def _answer_turn(
        self,
        model: Any,
        tokenizer: Any,
        prompts: ChatPrompts,
        turn: int,
        asked: Asked,
        *,
        is_chat: bool,
    ) -> tuple[dict[int, str], dict[str, Any], int]:
        """Answer one turn of every question, temperature by temperature."""
        from wegeft_cli.evaluation.answers import write_answers

        answers: dict[int, str] = {}
        settings: dict[str, Any] = {}
        num_tokens, num_before = 0, turn * len(prompts.texts)
        for temperature in sorted({question.temperature for question in self.questions.rows}):
            indices = [q.index for q in self.questions.rows if q.temperature == temperature]
            num_done = num_before + len(answers)
            written, settings = write_answers(
                model,
                tokenizer,
                {mt_bench.NUM_TURNS * index + turn: prompts.texts[index] for index in indices},
                Decoding(self.max_new_tokens, temperature=temperature, seed=self.seed),
                asked,
                add_special_tokens=not is_chat,
                turn_ends=prompts.turn_ends,
                on_progress=lambda done, n=num_done: asked.on_progress(n + done, self.num_rows),  # type: ignore[misc]
            )
            for number, answer in written.items():
                answers[number // mt_bench.NUM_TURNS] = answer.new_text.strip()
                num_tokens += len(answer.new_ids)
        return answers, settings, num_tokens

    def _score(
        self, answers: Mapping[int, tuple[str, str]], model_id: str, asked: Asked
    ) -> TaskScore:
        rows = mt_bench.answer_rows(self.questions, answers, model_id)
        files = {"mt_bench-answers.jsonl": to_lines(rows)}
        if self.judge is None or self.files is None:
            return self._summarise(None, answers, files)
        requests = judging.judge_requests(self.questions, answers, self.files)
        words = collect_verdicts(self.judge, requests, asked)
        judgments = judging.judgment_rows(requests, words, model_id, self.judge.model)
        files["mt_bench-judgments.jsonl"] = to_lines(judgments)
        return self._summarise(judgments, answers, files)

    def _summarise(
        self,
        judgments: Sequence[Mapping[str, Any]] | None,
        answers: Mapping[int, tuple[str, str]],
        files: dict[str, str],
    ) -> TaskScore:
        ratings = {(row["question_id"], row["turn"]): row["score"] for row in judgments or ()}
        told = None
        if judgments is not None:
            told = judging.summarise_ratings(self.questions, judgments)
        rated = [value / _HIGHEST for value in ratings.values() if value >= 0]
        samples = [
            {
                "index": mt_bench.NUM_TURNS * question.index + turn,
                "question_id": question.question_id,
                "category": question.category,
                "turn": turn + 1,
                "prompt": question.turns[turn],
                "output": answers[question.index][turn] if answers else None,
                "prediction": ratings.get((question.question_id, turn + 1)),
                "answer": None,
                "correct": None,
                "valid": ratings.get((question.question_id, turn + 1), 0) >= 0,
            }
            for question in self.questions.rows
            for turn in range(mt_bench.NUM_TURNS)
        ]
        return TaskScore(
            task=_TASK.name,
            protocol=self.protocol,
            score=sum(rated) / len(rated) if rated else None,
            num_correct=None,
            n=self.num_rows,
            n_invalid=0 if told is None else told["n_invalid"],
            ci95=normal_interval(rated) if rated else None,
            template_hash="",
            data_sha256=self.questions.sha256,
            origin=self.questions.origin,
            samples=samples,
            extra={
                "rating": told,
                "judge": _judge_of(judgments),
                "num_rows": mt_bench.NUM_TURNS * self.questions.num_rows,
            },
            files=files,
        )


def read_mt_bench(request: TaskRequest) -> MtBenchJob:
    """Read MT-Bench, and the judge's files where there is a judge, before any model is loaded.

    Args:
        request: The task; `options` may hold judge_url, judge_model, is_judged, seed.

    Returns:
        The job.

    Raises:
        UserError: If files are missing or damaged, or the options do not go together.
        ExceptionGroup: If there are several such faults.
    """
    wishes = _TASK.read(request)
    questions = mt_bench.load_questions(wishes.data_dir, wishes.limit)
    files = None
    if wishes.judge is not None:
        files = judging.load_judge_files(wishes.data_dir, questions)
    return MtBenchJob(
        questions,
        wishes.protocol,
        wishes.max_new_tokens or mt_bench.MAX_NEW_TOKENS,
        int(request.options.get("seed") or 0),
        wishes.judge,
        files,
        request.options,
    )


def _judge_of(judgments: Sequence[Mapping[str, Any]] | None) -> str | None:
    return str(judgments[0].get("judge", ["?"])[0]) if judgments else None


MT_BENCH = _TASK.as_kind(read_mt_bench)
"""Answers of two turns, rated by a judge."""
