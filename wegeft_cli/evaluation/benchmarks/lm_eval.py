"""Tasks of the lm-evaluation-harness, named `lm-eval:TASK`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import Asked, TaskKind, TaskRequest
from wegeft_cli.evaluation.lm_eval.bridge import HarnessTask, load_harness_task, run_harness
from wegeft_cli.evaluation.score import TaskScore
from wegeft_cli.statistics import normal_interval, wilson_interval

PREFIX = "lm-eval:"
PROTOCOL = "lm_eval"


@dataclass(frozen=True)
class HarnessJob:
    """One task (or group) of the harness."""

    task: HarnessTask
    limit: int | None

    @property
    def name(self) -> str:
        """The task's name, prefix included."""
        return PREFIX + self.task.name

    @property
    def protocol_name(self) -> str:
        """The harness is a protocol of its own."""
        return PROTOCOL

    @property
    def num_rows(self) -> int:
        """Rows of all its tasks."""
        counts = (len(task.eval_docs) for task in self.task.loaded["tasks"].values())
        return sum(count if self.limit is None else min(count, self.limit) for count in counts)

    def key(self) -> Mapping[str, Any]:
        """The harness keeps no answers between runs."""
        return {"task": self.name, "limit": self.limit}

    def run(self, model: Any, tokenizer: Any, asked: Asked) -> TaskScore:
        """Let the harness ask the model; of many processes the first, and the others wait."""
        if asked.write is not None:
            raise UserError(
                f"`{self.name}` needs the model in memory",
                key="--backend",
                hint="leave out --backend",
            )
        result = None
        if asked.processes.is_main:  # the harness gives a model in memory no others to share with
            result = run_harness(
                model, tokenizer, self.task, batch_size=asked.batch_size, limit=self.limit
            )
        result = asked.processes.broadcast(result)
        assert result is not None
        asked.on_progress(self.num_rows, self.num_rows)
        values = [sample["value"] for sample in result.samples]
        is_share = bool(values) and set(values) <= {0.0, 1.0}
        is_single = len(self.task.loaded["tasks"]) == 1
        fits = 0 <= result.score <= 1 and result.higher_is_better
        interval = None
        if is_share and is_single:
            interval = wilson_interval(round(sum(values)), len(values))
        elif fits and is_single and values and None not in values:
            interval = normal_interval(values)
        return TaskScore(
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
            generation={**result.settings, "batch_size": asked.batch_size},
            extra={"metric": result.metric, "metrics": dict(result.metrics)},
        )

    def score_samples(self, path: Path) -> TaskScore:
        """The harness reads likelihoods, which no file of outputs has."""
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
        """Of the first prompt: the harness's templates are spread over files and code."""
        first = samples[0]["prompt"] if samples else ""
        return hashlib.sha256(first.encode()).hexdigest()[:16]


def read_harness_task(request: TaskRequest) -> HarnessJob:
    """Read a task of the harness with its data, before any model is loaded.

    Args:
        request: The task; `options` may hold trust_task_code.

    Returns:
        The job.

    Raises:
        UserError: If the harness is not installed, knows no such task or cannot read its data, or
            another protocol than its own is asked for.
    """
    if request.protocol not in (None, PROTOCOL):
        _check(request.name, str(request.protocol), True)
    folder = request.data_dir
    if folder is None and request.settings.data_dir is not None:
        folder = Path(request.settings.data_dir).expanduser()
    task = load_harness_task(
        request.name[len(PREFIX) :],
        data_dir=folder,
        trust_code=bool(request.options.get("trust_task_code")),
    )
    is_named = request.name in request.settings.tasks
    return HarnessJob(task, request.limit or (request.settings.limit if is_named else None))


def _check(task: str, protocol: str, must: bool) -> None:
    if must and protocol != PROTOCOL:
        raise UserError(
            f"`{protocol}` does not score the task `{task}`",
            key="protocol",
            hint=f"leave it out: the harness is a protocol of its own, `{PROTOCOL}`",
        )


HARNESS = TaskKind(
    "lm_eval",
    lambda name: name.startswith(PREFIX),
    read_harness_task,
    lambda: [
        {
            "name": f"{PREFIX}TASK",
            "file": "lm-eval/TASK.yaml",
            "kind": "as the task",
            "num_rows": None,
            "protocols": [PROTOCOL],
        }
    ],
    _check,
    lambda: [
        {
            "name": PROTOCOL,
            "description": "EleutherAI's lm-evaluation-harness on the model in memory, for its own "
            "tasks: mostly likelihoods of given options, with the harness's prompts and few-shot "
            "examples. Its numbers and generated answers measure different things.",
            "fixed": None,
        }
    ],
)
"""Tasks of another harness."""
