"""Execution of generated code against its tests, and the score: pass@k."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

from wegeft_cli.errors import MachineError
from wegeft_cli.evaluation.code.problems import Problem
from wegeft_cli.sandbox.run import Outcome, OutcomeKind, Program, Sandbox
from wegeft_cli.statistics import normal_interval, wilson_interval

CODE_TIMEOUT = 3.0
"""CPU seconds of a program, as in HumanEval's own scorer."""

_KS = (1, 10, 100)
_ATTEMPTS = 3


@dataclass(frozen=True)
class CodeSample:
    """An answer to a problem."""

    problem: Problem
    number: int
    """Number among the answers to the problem, from 0."""
    prompt: str
    """The model's prompt; empty for an answer from a file."""
    output: str
    """The model's output."""
    completion: str
    """The code in the output, which follows the problem's prompt."""


@dataclass(frozen=True)
class CodeResult:
    """The metrics of the samples that could be run."""

    pass_at_k: dict[str, float]
    """`1`, `10`, ... -> share of problems, 0 to 1."""
    num_passed: int
    num_samples: int
    num_problems: int
    ci95: tuple[float, float]
    """Interval of pass@1: Wilson's if each problem has one answer, else normal over problems."""
    outcomes: dict[str, int]


def run_samples(
    sandbox: Sandbox,
    samples: Mapping[int, CodeSample],
    on_done: Callable[[int], None] = lambda done: None,
) -> dict[int, Outcome]:
    """Run every sample, as many at a time as there are processors; return outcomes by number.

    A sample that the machine kept from running is tried again, since the model did not cause it.
    `on_done` is called with the number of samples done.
    """
    outcomes: dict[int, Outcome] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda sample: _run(sandbox, sample), samples.values())
        try:
            for number, outcome in zip(samples, results, strict=True):
                outcomes[number] = outcome
                on_done(len(outcomes))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return outcomes


def _run(sandbox: Sandbox, sample: CodeSample) -> Outcome:
    problem = sample.problem
    program = Program(
        problem.prompt + sample.completion, problem.prompt, problem.test, problem.entry_point
    )
    outcome = sandbox.run(program)
    for attempt in range(1, _ATTEMPTS):
        if outcome.kind != "sandbox_error":
            break
        time.sleep(attempt)
        outcome = sandbox.run(program)
    return outcome


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Return the unbiased estimate that one of k answers passes: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, equation 1, as a product, which stays exact for large n.

    Args:
        num_passed: c, the number of these that pass, 0 to n.
        k: 1 to n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
        raise ValueError(f"n {num_samples}, c {num_passed}, k {k}")
    if num_samples - num_passed < k:
        return 1.0
    return 1.0 - math.prod(
        1.0 - k / total for total in range(num_samples - num_passed + 1, num_samples + 1)
    )


def summarise(samples: Sequence[CodeSample], outcomes: Sequence[Outcome]) -> CodeResult:
    """Compute the metrics; raise MachineError if no program could be run.

    Answers that the machine could not run count only in `outcomes`: they are neither passed nor
    failed, and no program can cause that.
    """
    totals: Counter[int] = Counter()
    passed: Counter[int] = Counter()
    for sample, outcome in zip(samples, outcomes, strict=True):
        if outcome.kind != "sandbox_error":
            totals[sample.problem.index] += 1
            passed[sample.problem.index] += outcome.kind == "passed"
    if not totals:
        reasons = sorted({outcome.detail for outcome in outcomes})
        raise MachineError(f"no program could be run in the sandbox: {'; '.join(reasons[:3])}")
    fewest = min(totals.values())
    ks = sorted({k for k in (*_KS, fewest) if k <= fewest})
    estimates = {
        k: [pass_at_k(n, passed[index], k) for index, n in sorted(totals.items())] for k in ks
    }
    firsts = estimates[1]
    return CodeResult(
        pass_at_k={str(k): sum(values) / len(values) for k, values in estimates.items()},
        num_passed=sum(passed.values()),
        num_samples=sum(totals.values()),
        num_problems=len(totals),
        ci95=_interval(firsts, is_single=max(totals.values()) == 1),
        outcomes={
            kind: sum(outcome.kind == kind for outcome in outcomes)
            for kind in get_args(OutcomeKind)
        },
    )


def _interval(shares: Sequence[float], *, is_single: bool) -> tuple[float, float]:
    """Return the 95 % interval of the mean; answers to one problem are not independent."""
    if is_single:
        return wilson_interval(round(sum(shares)), len(shares))
    return normal_interval(shares)


def sample_record(sample: CodeSample, outcome: Outcome) -> dict[str, Any]:
    """Return a line of the samples file, which HumanEval's own tools can read."""
    return {
        "index": sample.problem.index,
        "task_id": sample.problem.task_id,
        "sample": sample.number,
        "prompt": sample.prompt,
        "output": sample.output,
        "completion": sample.completion,
        "prediction": outcome.kind,
        "answer": "passed",
        "correct": outcome.kind == "passed",
        "valid": bool(sample.completion.strip()) and outcome.kind != "sandbox_error",
        "detail": outcome.detail,
    }
