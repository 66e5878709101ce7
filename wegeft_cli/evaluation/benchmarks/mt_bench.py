"""MT-Bench: answers of two turns, rated by a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from wegeft_cli.data.text.template_settings import CHAT
from wegeft_cli.evaluation.benchmarks.base import BenchmarkContext, EvaluationRequest
from wegeft_cli.evaluation.benchmarks.judged import (
    JudgedBenchmark,
    JudgedRequest,
    Rows,
    judged_family,
    to_lines,
)
from wegeft_cli.evaluation.judged import mt_bench_questions as mt_bench
from wegeft_cli.evaluation.judged import mt_bench_ratings as ratings_of
from wegeft_cli.evaluation.judged.judge_client import JudgeRequest
from wegeft_cli.evaluation.score import Score
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.inference.prompt_format import (
    RenderedPrompts,
    has_chat_template,
    render_chat_prompts,
)
from wegeft_cli.statistics import normal_interval

_ALPACA = "fastchat_alpaca"
_PROTOCOLS = {
    "fastchat": "FastChat's single-answer grading: two turns, temperature by category, 1,024 "
    "tokens a turn, in the model's own chat template; a model without one is asked as by "
    "fastchat_alpaca. Draws are not FastChat's one by one; its top-p is the model's, here 1.",
    _ALPACA: "fastchat, in FastChat's conversation template `alpaca` for every model.",
}
_HIGHEST = 10
Turns = tuple[str, str]


@dataclass(frozen=True)
class MtBench(JudgedBenchmark[Turns]):
    """MT-Bench under one protocol."""

    name: ClassVar[str] = "mt_bench"
    questions: mt_bench.Questions
    max_new_tokens: int
    seed: int
    judge_files: ratings_of.JudgeFiles | None

    @property
    def num_examples(self) -> int:
        """Number of turns to answer."""
        return mt_bench.NUM_TURNS * len(self.questions.rows)

    def cache_key(self) -> Mapping[str, Any]:
        """Return everything that the answers depend on besides the model and the judge."""
        return {
            "task": self.name,
            "protocol": self.protocol_name,
            "data_sha256": self.questions.sha256,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }

    def answer(
        self, model: Any, context: BenchmarkContext
    ) -> tuple[dict[int, Turns], dict[str, Any], str]:
        """Generate both turns of every question."""
        histories: dict[int, list[dict[str, str]]] = {q.index: [] for q in self.questions.rows}
        settings: dict[str, Any] = {}
        template_hash, num_tokens = "", 0
        for turn in range(mt_bench.NUM_TURNS):
            for question in self.questions.rows:
                text = question.turns[turn]
                histories[question.index].append({"role": "user", "content": text})
            prompts = self._render(model, histories)
            template_hash = prompts.template_hash
            answers, settings, added = self._answer_turn(model, prompts, turn, context)
            num_tokens += added
            for index, answer in answers.items():
                histories[index].append({"role": "assistant", "content": answer})
        outputs = {
            index: (history[1]["content"], history[3]["content"])
            for index, history in histories.items()
        }
        kept = {key: value for key, value in settings.items() if key not in ("do_sample", "seed")}
        generation = {
            **kept,
            "temperature": dict(mt_bench.TEMPERATURES),
            "seed": self.seed,
            "num_new_tokens": num_tokens,
        }
        return outputs, generation, template_hash

    def _render(
        self, model: Any, histories: Mapping[int, Sequence[Mapping[str, str]]]
    ) -> RenderedPrompts:
        tokenizer = model.tokenizer
        has_form = has_chat_template(tokenizer) or model.chat_settings.name != CHAT
        if self.protocol_name != _ALPACA and has_form:
            return render_chat_prompts(
                tokenizer,
                histories,
                protocol=self.protocol_name,
                other=_ALPACA,
                settings=model.chat_settings,
            )
        eos = tokenizer.eos_token or ""
        texts = {
            index: mt_bench.alpaca_conversation(history, eos)
            for index, history in histories.items()
        }
        return RenderedPrompts(texts, _ALPACA)

    def _answer_turn(
        self, model: Any, prompts: RenderedPrompts, turn: int, context: BenchmarkContext
    ) -> tuple[dict[int, str], dict[str, Any], int]:
        """Generate one turn of every question, temperature by temperature."""
        from wegeft_cli.evaluation.answers import generate_answers

        texts: dict[int, str] = {}
        settings: dict[str, Any] = {}
        num_tokens, num_before = 0, turn * len(prompts.texts)
        for temperature in sorted({question.temperature for question in self.questions.rows}):
            indices = [q.index for q in self.questions.rows if q.temperature == temperature]
            some = {mt_bench.NUM_TURNS * index + turn: prompts.texts[index] for index in indices}
            num_done = num_before + len(texts)

            def report(done: int, before: int = num_done) -> None:
                context.on_progress(before + done, self.num_examples)

            answers = generate_answers(
                model,
                replace(prompts, texts=some),
                Decoding(self.max_new_tokens, temperature=temperature, seed=self.seed),
                context,
                on_progress=report,
            )
            settings = answers.settings
            for number, answer in answers.completions.items():
                texts[number // mt_bench.NUM_TURNS] = answer.new_text.strip()
                num_tokens += len(answer.new_ids)
        return texts, settings, num_tokens

    def judge_requests(self, outputs: Mapping[int, Turns]) -> list[JudgeRequest]:
        """Return the questions to the judge."""
        assert self.judge_files is not None
        return ratings_of.judge_requests(self.questions, outputs, self.judge_files)

    def output_file(self, outputs: Mapping[int, Turns], generator: str) -> tuple[str, str]:
        """Return FastChat's file of answers."""
        rows = mt_bench.answer_rows(self.questions, outputs, generator)
        return "mt_bench-answers.jsonl", to_lines(rows)

    def verdict_file(
        self, outputs: Mapping[int, Turns], generator: str, texts: Mapping[int, str]
    ) -> tuple[Rows, str, str]:
        """Return FastChat's file of judgments."""
        assert self.request.judge is not None
        requests = self.judge_requests(outputs)
        rows = ratings_of.judgment_rows(requests, texts, generator, self.request.judge.model)
        return rows, "mt_bench-judgments.jsonl", to_lines(rows)

    def read_verdicts(self, path: Path) -> Rows:
        """Read FastChat's file of judgments."""
        return ratings_of.read_judgments(path, self.questions)

    def read_outputs(self, path: Path) -> dict[int, Turns]:
        """Read FastChat's file of answers."""
        return mt_bench.read_answers(path, self.questions)

    def summarise(self, verdicts: Rows | None, outputs: Mapping[int, Turns]) -> Score:
        """Return the mean rating divided by 10."""
        ratings = {(row["question_id"], row["turn"]): row["score"] for row in verdicts or ()}
        summary = None
        if verdicts is not None:
            summary = ratings_of.summarise_ratings(self.questions, verdicts)
        rated = [value / _HIGHEST for value in ratings.values() if value >= 0]
        samples = [
            {
                "index": mt_bench.NUM_TURNS * question.index + turn,
                "question_id": question.question_id,
                "category": question.category,
                "turn": turn + 1,
                "prompt": question.turns[turn],
                "output": outputs[question.index][turn] if outputs else None,
                "prediction": ratings.get((question.question_id, turn + 1)),
                "answer": None,
                "correct": None,
                "valid": ratings.get((question.question_id, turn + 1), 0) >= 0,
            }
            for question in self.questions.rows
            for turn in range(mt_bench.NUM_TURNS)
        ]
        return Score(
            task=self.name,
            protocol=self.protocol_name,
            score=sum(rated) / len(rated) if rated else None,
            num_correct=None,
            n=self.num_examples,
            n_invalid=0 if summary is None else summary["n_invalid"],
            ci95=normal_interval(rated) if rated else None,
            template_hash="",
            data_sha256=self.questions.sha256,
            origin=self.questions.origin,
            samples=samples,
            extra={
                "rating": summary,
                "judge": _judge_name(verdicts),
                "num_rows": mt_bench.NUM_TURNS * self.questions.num_rows,
            },
        )


def _load(request: JudgedRequest, whole: EvaluationRequest) -> MtBench:
    questions = mt_bench.load_questions(request.data_dir, request.limit)
    files = None
    if request.judge is not None:
        files = ratings_of.load_judge_files(request.data_dir, questions)
    return MtBench(
        request,
        whole.options,
        questions,
        request.max_new_tokens or mt_bench.MAX_NEW_TOKENS,
        int(whole.options.get("seed") or 0),
        files,
    )


def _judge_name(verdicts: Sequence[Mapping[str, Any]] | None) -> str | None:
    return ratings_of.name_judge(verdicts[0]) if verdicts else None


FAMILY = judged_family(
    ("mt_bench", "mt-bench"), _PROTOCOLS, f"{mt_bench.FOLDER}/question.jsonl", 160, _load
)
