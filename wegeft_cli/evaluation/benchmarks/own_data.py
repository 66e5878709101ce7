"""A user's own test set: `data:FILE`, prompted as in training, scored by a metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import (
    BenchmarkContext,
    BenchmarkFamily,
    EvaluationRequest,
)
from wegeft_cli.evaluation.benchmarks.groups import OWN_DATA
from wegeft_cli.evaluation.benchmarks.judged import choose_judge, collect_verdicts
from wegeft_cli.evaluation.judged.judge_client import Judge, JudgeRequest
from wegeft_cli.evaluation.own_data import (
    DESCRIPTIONS,
    METRICS,
    Graded,
    OwnTestSet,
    check_answers,
    load_own_set,
    own_name,
    read_verdict,
    write_judge_prompt,
)
from wegeft_cli.evaluation.score import Score
from wegeft_cli.evaluation.text.scoring import read_outputs
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.inference.prompt_format import PromptForm, RenderedPrompts, question_text
from wegeft_cli.statistics import normal_interval, wilson_interval

_MAX_NEW_TOKENS = 512
_VERDICT_TOKENS = 512


@dataclass(frozen=True)
class OwnBenchmark:
    """One test set under one metric.

    Args:
        data: The rows.
        metric: A name of `METRICS`.
        max_new_tokens: Longest answer in tokens.
        judge: The judge, if the metric is `judge`.
    """

    data: OwnTestSet
    metric: str
    max_new_tokens: int
    judge: Judge | None = None

    @property
    def name(self) -> str:
        """`data:` and the file's name."""
        return self.data.name

    @property
    def protocol_name(self) -> str:
        """The metric: scores of different ones are not comparable."""
        return self.metric

    @property
    def num_examples(self) -> int:
        """Number of rows."""
        return len(self.data.rows)

    def cache_key(self) -> dict[str, Any]:
        """Return everything that the answers depend on besides the model."""
        return {
            "task": self.name,
            "data_sha256": self.data.sha256,
            "max_new_tokens": self.max_new_tokens,
        }

    def run(self, model: Any, context: BenchmarkContext) -> Score:
        """Generate the answers in the model's prompt form, and score them."""
        from wegeft_cli.evaluation.answers import generate_answers

        form = PromptForm.of_model(model)
        prompts = RenderedPrompts(
            {row.index: form.write(row.asked) for row in self.data.rows},
            form.template.digest,
            not form.holds_turns,
            form.find_turn_ends(model.tokenizer),
        )
        answers = generate_answers(
            model,
            prompts,
            Decoding(self.max_new_tokens),
            context,
            on_progress=lambda done: context.on_progress(done, self.num_examples),
        )
        outputs = {number: answer.new_text for number, answer in answers.completions.items()}
        score = self._score(outputs, prompts.texts, context)
        return replace(
            score,
            template=form.name,
            template_hash=form.template.digest,
            generation=answers.generation(),
        )

    def score_file(self, path: Path) -> Score:
        """Score outputs from a file."""
        indices = [row.index for row in self.data.rows]
        outputs = read_outputs(
            path, self.name, indices, num_rows=self.data.num_rows, origin=self.data.origin
        )
        return self._score(outputs, {}, BenchmarkContext(1))

    def _score(
        self, outputs: Mapping[int, str], prompts: Mapping[int, str], context: BenchmarkContext
    ) -> Score:
        grades, verdicts = self._grade(outputs, context)
        samples = [
            {
                "index": row.index,
                "prompt": prompts.get(row.index, question_text(row.asked)),
                "output": outputs[row.index],
                "prediction": grades[row.index].prediction,
                "answer": row.answers[0] if len(row.answers) == 1 else list(row.answers),
                "score": grades[row.index].score,
                "correct": grades[row.index].score == 1,
                "valid": grades[row.index].prediction is not None,
                **({"verdict": verdicts[row.index]} if verdicts else {}),
            }
            for row in self.data.rows
        ]
        scores = [grades[row.index].score for row in self.data.rows]
        num_correct = None if self.metric == "rouge_l" else sum(map(int, scores))
        return Score(
            task=self.name,
            protocol=self.metric,
            metric=self.metric,
            score=sum(scores) / len(scores),
            num_correct=num_correct,
            n=len(samples),
            n_invalid=sum(grade.prediction is None for grade in grades.values()),
            ci95=(
                normal_interval(scores)
                if num_correct is None
                else wilson_interval(num_correct, len(samples))
            ),
            data_sha256=self.data.sha256,
            origin=self.data.origin,
            samples=samples,
            extra={
                "num_rows": self.data.num_rows,
                **({} if self.judge is None else {"judge": self.judge.model}),
            },
        )

    def _grade(
        self, outputs: Mapping[int, str], context: BenchmarkContext
    ) -> tuple[dict[int, Graded], dict[int, str]]:
        """Return the grades by row, and the judge's texts."""
        grade = METRICS[self.metric]
        if grade is not None:
            return {row.index: grade(outputs[row.index], row.answers) for row in self.data.rows}, {}
        assert self.judge is not None
        requests = [
            JudgeRequest(
                row.index,
                (
                    {
                        "role": "user",
                        "content": write_judge_prompt(
                            question_text(row.asked), row.answers, outputs[row.index]
                        ),
                    },
                ),
                0.0,
                _VERDICT_TOKENS,
                {},
            )
            for row in self.data.rows
        ]
        texts = collect_verdicts(self.judge, requests, context)
        return {number: read_verdict(text) for number, text in texts.items()}, texts


def load_own_benchmark(name: str, request: EvaluationRequest) -> OwnBenchmark:
    """Read a test set; options: metric, columns, judge_url, judge_model.

    Raises:
        UserError: If the file, the metric or the judge is at fault.
        ExceptionGroup: If several rows are.
    """
    settings = request.settings
    metric = request.options.get("metric") or request.protocol or settings.answer_metric
    if metric not in METRICS:
        hint = f"one of {', '.join(METRICS)}"
        raise UserError(f"no metric {metric!r}", key="--metric", hint=hint)
    judge = choose_judge(request.options) if METRICS[metric] is None else None
    if METRICS[metric] is None and judge is None:
        raise UserError(
            "the metric `judge` needs a judge",
            key="--judge-url",
            hint="give --judge-url and --judge-model, or another --metric",
        )
    is_named = name in settings.tasks
    limit, max_new_tokens = request.limits(is_named=is_named)
    data = load_own_set(name, limit, request.options.get("columns") or ())
    check_answers(data, metric)
    return OwnBenchmark(data, metric, max_new_tokens or _MAX_NEW_TOKENS, judge)


FAMILY = BenchmarkFamily(
    "own_data",
    lambda name: own_name(name) if name.startswith(OWN_DATA) else None,
    load_own_benchmark,
    lambda: [
        {
            "name": f"{OWN_DATA}FILE",
            "file": "FILE",
            "kind": "as the metric",
            "num_rows": None,
            "protocols": [*METRICS],
        }
    ],
    list_protocols=lambda: [
        {"name": name, "description": f"For --data FILE: {text}.", "fixed": None}
        for name, text in DESCRIPTIONS.items()
    ],
)
