"""What the judged benchmarks share: request, answers, verdicts, files."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkContext,
    BenchmarkFamily,
    EvaluationRequest,
)
from wegeft_cli.evaluation.benchmarks.training import JUDGE_MODEL_VARIABLE, JUDGE_URL_VARIABLE
from wegeft_cli.evaluation.judged.judge_client import Judge, JudgeRequest, query_judge
from wegeft_cli.evaluation.score import Score

Output = TypeVar("Output")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class JudgedRequest:
    """The settings of a judged benchmark: those of the request, the recipe, or the default."""

    protocol: str
    data_dir: Path | None
    limit: int | None
    max_new_tokens: int | None
    judge: Judge | None


@dataclass(frozen=True)
class JudgedBenchmark(ABC, Generic[Output]):
    """Generated answers, scored by a judge if there is one.

    Args:
        request: The settings.
        options: `target`, and `is_judged` if a samples file contains verdicts.
    """

    name: ClassVar[str]
    request: JudgedRequest
    options: Mapping[str, Any]

    @property
    def protocol_name(self) -> str:
        """The protocol's name."""
        return self.request.protocol

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """Number of answers."""

    @abstractmethod
    def cache_key(self) -> Mapping[str, Any]:
        """Return everything that the answers depend on besides the model and the judge."""

    @abstractmethod
    def answer(
        self, model: Any, context: BenchmarkContext
    ) -> tuple[dict[int, Output], dict[str, Any], str]:
        """Return the model's outputs by index, the generation settings and the template's hash."""

    @abstractmethod
    def judge_requests(self, outputs: Mapping[int, Output]) -> list[JudgeRequest]:
        """Return the questions to the judge."""

    @abstractmethod
    def output_file(self, outputs: Mapping[int, Output], generator: str) -> tuple[str, str]:
        """Return the end of the name and the content of the outputs' third-party file."""

    @abstractmethod
    def verdict_file(
        self, outputs: Mapping[int, Output], generator: str, texts: Mapping[int, str]
    ) -> tuple[Rows, str, str]:
        """Return the verdicts, and the end of the name and the content of their file."""

    @abstractmethod
    def read_verdicts(self, path: Path) -> Rows:
        """Read verdicts from a third-party file."""

    @abstractmethod
    def read_outputs(self, path: Path) -> dict[int, Output]:
        """Read outputs from a third-party file."""

    @abstractmethod
    def summarise(self, verdicts: Rows | None, outputs: Mapping[int, Output]) -> Score:
        """Return the score; None are the verdicts without a judge."""

    def run(self, model: Any, context: BenchmarkContext) -> Score:
        """Generate the answers, and query the judge if there is one."""
        outputs, generation, template_hash = self.answer(model, context)
        generator = _answerer(model.model, self.options, context)
        score = self._judge(outputs, generator, context)
        return replace(score, generation=generation, template_hash=template_hash)

    def score_file(self, path: Path) -> Score:
        """Score a file of verdicts as it is, or a file of outputs by the judge."""
        if self.options.get("is_judged"):
            return self.summarise(self.read_verdicts(path), {})
        return self._judge(self.read_outputs(path), path.stem, BenchmarkContext(1))

    def _judge(
        self, outputs: Mapping[int, Output], generator: str, context: BenchmarkContext
    ) -> Score:
        files = dict([self.output_file(outputs, generator)])
        verdicts = None
        if self.request.judge is not None:
            texts = collect_verdicts(self.request.judge, self.judge_requests(outputs), context)
            verdicts, end, content = self.verdict_file(outputs, generator, texts)
            files[end] = content
        return replace(self.summarise(verdicts, outputs), files=files)


def judged_family(
    benchmark: tuple[str, ...],
    protocols: Mapping[str, str],
    file: str,
    num_rows: int,
    load: Callable[[JudgedRequest, EvaluationRequest], Benchmark],
) -> BenchmarkFamily:
    """Build the family of one judged benchmark.

    Args:
        protocols: {name: description}, the default first.
    """
    name = benchmark[0]

    def check_protocol(typed: str, protocol: str, must_fit: bool) -> None:
        if must_fit and protocol not in protocols:
            raise UserError(
                f"`{protocol}` does not score the task `{name}`",
                key="protocol",
                hint=f"use one of {', '.join(protocols)}",
            )

    def load_request(typed: str, request: EvaluationRequest) -> Benchmark:
        settings = request.settings
        of_recipe = settings.protocol if settings.protocol in protocols else None
        protocol = request.protocol or of_recipe or next(iter(protocols))
        check_protocol(name, protocol, True)
        limit, max_new_tokens = request.limits(is_named=name in settings.tasks)
        judge = choose_judge(request.options)
        folder = request.data_dir or request.settings_dir
        return load(JudgedRequest(protocol, folder, limit, max_new_tokens, judge), request)

    listed = {
        "name": name,
        "file": file,
        "kind": "judged",
        "num_rows": num_rows,
        "protocols": list(protocols),
    }
    described = [
        {"name": protocol, "description": f"For {name}: {text}", "fixed": None, "task": name}
        for protocol, text in protocols.items()
    ]
    return BenchmarkFamily(
        name,
        lambda typed: name if typed.lower() in benchmark else None,
        load_request,
        lambda: [listed],
        check_protocol,
        _check_training,
        lambda: described,
    )


def _check_training(name: str, options: Mapping[str, Any]) -> None:
    if choose_judge(options) is None:
        raise UserError(
            f"`{name}` has no score without a judge",
            hint=f"set the environment variables {JUDGE_URL_VARIABLE} and {JUDGE_MODEL_VARIABLE}",
        )


def to_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def to_array(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an indented JSON array."""
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


def choose_judge(options: Mapping[str, Any]) -> Judge | None:
    """Return the judge that the options name, without a request to it; None if they name none.

    Raises:
        UserError: If one of judge_url and judge_model is missing, or the address is invalid.
    """
    url, model = options.get("judge_url"), options.get("judge_model")
    if url is None and model is None:
        return None
    if url is None or model is None:
        missing = "--judge-url" if url is None else "--judge-model"
        raise UserError(
            "a judge needs an address and a model's name", key=missing, hint=f"add {missing}"
        )
    from wegeft_cli.evaluation.judged.judge_client import KEY_VARIABLE, OpenAIJudge

    return OpenAIJudge(url, model, os.environ.get(KEY_VARIABLE) or None)


def collect_verdicts(
    judge: Judge, requests: Sequence[JudgeRequest], context: BenchmarkContext
) -> dict[int, str]:
    """Query the judge, this process for its shard of the questions.

    Verdicts are cached as they come. A verdict of another judge or on another answer is not reused.

    Raises:
        UserError: If the judge refuses.
        MachineError: If it cannot be reached.
    """
    cache, processes = context.cache, context.processes
    prints = {request.number: _fingerprint(judge, request) for request in requests}
    stored = processes.broadcast({} if cache is None else cache.read())
    known = {
        number: stored[_place(number)]["text"]
        for number, fingerprint in prints.items()
        if stored.get(_place(number), {}).get("of") == fingerprint
    }

    def store(number: int, text: str) -> None:
        if cache is not None:
            cache.append({_place(number): {"of": prints[number], "text": text}})

    if known:
        context.warn(f"the judge: {len(known)} of {len(requests)} verdicts are cached")
    mine = processes.shard(requests)
    texts = context.run_apart(
        lambda check: query_judge(judge, mine, known=known, on_answer=store, check=check)
    )
    return processes.merge(texts)


def _answerer(model: Any, options: Mapping[str, Any], context: BenchmarkContext) -> str:
    """Return the name in third-party files: that of the target's folder, or the base's."""
    path = None if context.title == "base" else options.get("target")
    if path is None:
        path = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(path).name if path else context.title


def _place(number: int) -> int:
    """Return a verdict's index in the cache, below those of answers."""
    return -1 - number


def _fingerprint(judge: Judge, request: JudgeRequest) -> str:
    text = json.dumps([judge.model, request.messages, request.temperature, request.max_tokens])
    return hashlib.sha256(text.encode()).hexdigest()
