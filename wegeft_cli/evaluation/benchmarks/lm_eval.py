"""Tasks of EleutherAI's lm-evaluation-harness, named `lm-eval:TASK`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import (
    BenchmarkContext,
    BenchmarkFamily,
    EvaluationRequest,
)
from wegeft_cli.evaluation.lm_eval.bridge import (
    HarnessResult,
    HarnessTask,
    load_harness_task,
    run_harness,
)
from wegeft_cli.evaluation.score import Score
from wegeft_cli.statistics import normal_interval, wilson_interval

PREFIX = "lm-eval:"
PROTOCOL = "lm_eval"


@dataclass(frozen=True)
class HarnessBenchmark:
    """One task (or group) of the harness."""

    task: HarnessTask
    limit: int | None
    needs_model: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The task's name with the prefix."""
        return PREFIX + self.task.name

    @property
    def protocol_name(self) -> str:
        """The harness is one protocol."""
        return PROTOCOL

    @property
    def num_examples(self) -> int:
        """Number of rows of all its tasks."""
        counts = (len(task.eval_docs) for task in self.task.loaded["tasks"].values())
        return sum(count if self.limit is None else min(count, self.limit) for count in counts)

    def cache_key(self) -> Mapping[str, Any]:
        """Return the task and the limit; the harness caches no answers."""
        return {"task": self.name, "limit": self.limit}

    def run(self, model: Any, context: BenchmarkContext) -> Score:
        """Run the harness on the first process, or in lockstep on all; share its result."""
        result = self._run_harness(model, context)
        context.on_progress(self.num_examples, self.num_examples)
        values = [sample["value"] for sample in result.samples]
        is_share = bool(values) and set(values) <= {0.0, 1.0}
        is_single = len(self.task.loaded["tasks"]) == 1
        fits = 0 <= result.score <= 1 and result.higher_is_better
        interval = None
        if is_share and is_single:
            interval = wilson_interval(round(sum(values)), len(values))
        elif fits and is_single and values and None not in values:
            interval = normal_interval(values)
        return Score(
            task=self.name,
            protocol=PROTOCOL,
            score=result.score if fits else None,
            num_correct=round(sum(values)) if is_share else None,
            n=len(values),
            n_invalid=0,
            ci95=interval,
            template_hash=self._hash_prompts(result.samples),
            data_sha256=self._hash_rows(),
            origin=self.task.origin,
            samples=[
                {
                    "index": index,
                    **sample,
                    "prediction": sample["value"],
                    "correct": bool(sample["value"]) if is_share else None,
                    "valid": True,
                }
                for index, sample in enumerate(result.samples)
            ],
            generation=dict(result.settings),
            extra={"metric": result.metric, "metrics": dict(result.metrics)},
        )

    def _run_harness(self, model: Any, context: BenchmarkContext) -> HarnessResult:
        def run(check: Callable[[], None]) -> HarnessResult:
            return run_harness(
                model.model,
                model.tokenizer,
                self.task,
                batch_size=context.batch_size,
                limit=self.limit,
                check=check,
                warn=lambda text: context.warn(f"{self.name}: {text}"),
            )

        if context.in_lockstep:
            return run(context.check_stop or (lambda: None))
        is_main = context.processes.is_main
        result = context.run_apart(lambda check: run(check) if is_main else None)
        result = context.processes.broadcast(result)
        assert result is not None
        return result

    def score_file(self, path: Path) -> Score:
        """Raise UserError: the harness reads likelihoods, which no file of outputs contains."""
        raise UserError(
            f"`{self.name}` is scored from the model, not from a file",
            key="--samples",
            hint="leave out --samples",
        )

    def _hash_rows(self) -> str:
        digest = hashlib.sha256()
        for name, task in sorted(self.task.loaded["tasks"].items()):
            for row in task.eval_docs:
                digest.update(f"{name} {sorted(dict(row).items())!r}\n".encode())
        return digest.hexdigest()

    def _hash_prompts(self, samples: Any) -> str:
        """Hash the first prompt: the harness has no single template."""
        first = samples[0]["prompt"] if samples else ""
        return hashlib.sha256(first.encode()).hexdigest()[:16]


def load_harness_benchmark(name: str, request: EvaluationRequest) -> HarnessBenchmark:
    """Load a task of the harness with its data; option: trust_task_code.

    Raises:
        UserError: If the harness is not installed, has no such task or cannot read its data, or
            the request names another protocol.
    """
    if request.protocol not in (None, PROTOCOL):
        _check_protocol(name, str(request.protocol), True)
    task = load_harness_task(
        name[len(PREFIX) :],
        data_dir=request.data_dir or request.settings_dir,
        trust_code=bool(request.options.get("trust_task_code")),
    )
    limit, _ = request.limits(is_named=name in request.settings.tasks)
    return HarnessBenchmark(task, limit)


def _check_protocol(name: str, protocol: str, must_fit: bool) -> None:
    if must_fit and protocol != PROTOCOL:
        raise UserError(
            f"`{protocol}` does not score the task `{name}`",
            key="protocol",
            hint=f"leave it out: the harness has one protocol, `{PROTOCOL}`",
        )


FAMILY = BenchmarkFamily(
    "lm_eval",
    lambda name: name if name.startswith(PREFIX) else None,
    load_harness_benchmark,
    lambda: [
        {
            "name": f"{PREFIX}TASK",
            "file": "lm-eval/TASK.yaml",
            "kind": "as the task",
            "num_rows": None,
            "protocols": [PROTOCOL],
        }
    ],
    _check_protocol,
    list_protocols=lambda: [
        {
            "name": PROTOCOL,
            "description": "EleutherAI's lm-evaluation-harness on the model in memory, for its own "
            "tasks: mostly likelihoods of given options, with the harness's prompts and few-shot "
            "examples. Its numbers and generated answers measure different things.",
            "fixed": None,
        }
    ],
)
