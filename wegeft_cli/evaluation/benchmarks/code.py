"""Tasks whose answers are code: HumanEval, run in a sandbox after the user has allowed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import Asked, TaskKind, TaskRequest
from wegeft_cli.evaluation.code.problems import (
    FILE,
    NUM_PUBLISHED,
    Problems,
    load_problems,
    read_code_samples,
)
from wegeft_cli.evaluation.code.protocols import (
    CODE_PROTOCOLS,
    DEFAULT_CODE_PROTOCOL,
    CodeProtocol,
    find_code_protocol,
)
from wegeft_cli.evaluation.score import TaskScore
from wegeft_cli.generation.decoding import Decoding, draw_number
from wegeft_cli.inference.prompt_format import write_chat_prompts

TASK = "humaneval"


@dataclass(frozen=True)
class CodeJob:
    """HumanEval under one protocol."""

    problems: Problems
    protocol: CodeProtocol
    decoding: Decoding
    num_samples: int

    @property
    def name(self) -> str:
        """The task's name."""
        return TASK

    @property
    def protocol_name(self) -> str:
        """The protocol's name."""
        return self.protocol.name

    @property
    def num_rows(self) -> int:
        """Samples to be written."""
        return len(self.problems.rows) * self.num_samples

    def key(self) -> Mapping[str, Any]:
        """All that the answers depend on besides the model."""
        return {
            "task": TASK,
            "protocol": self.protocol.name,
            "template_hash": self.protocol.template_hash(),
            "data_sha256": self.problems.sha256,
            "decoding": self.decoding.settings(),
            "num_samples": self.num_samples,
        }

    def run(self, model: Any, tokenizer: Any, asked: Asked) -> TaskScore:
        """Let the model write code, and run it."""
        from wegeft_cli.evaluation.answers import write_answers
        from wegeft_cli.evaluation.code.scoring import CODE_TIMEOUT, CodeSample
        from wegeft_cli.sandbox.run import open_sandbox

        # Before anything is written: where no wall can be put up, nothing is worth writing.
        with open_sandbox(timeout=CODE_TIMEOUT) as sandbox:
            self._tell_data(asked)
            texts = {row.index: self.protocol.prompt(row.prompt) for row in self.problems.rows}
            template_hash = self.protocol.template_hash()
            turn_ends: list[int] = []
            if self.protocol.is_chat:
                texts, template_hash, turn_ends = write_chat_prompts(
                    tokenizer,
                    {n: [{"role": "user", "content": text}] for n, text in texts.items()},
                    protocol=self.protocol.name,
                    other=DEFAULT_CODE_PROTOCOL,
                )
            problems = {row.index: row for row in self.problems.rows}
            numbers = {
                index * self.num_samples + sample: (index, sample)
                for index in texts
                for sample in range(self.num_samples)
            }
            written, settings = write_answers(
                model,
                tokenizer,
                {number: texts[index] for number, (index, _) in numbers.items()},
                self.decoding,
                asked,
                draws={n: draw_number(index, sample) for n, (index, sample) in numbers.items()},
                add_special_tokens=not self.protocol.is_chat,
                turn_ends=turn_ends,
                on_progress=lambda done: asked.on_progress(done, self.num_rows),
            )
            samples = {
                number: CodeSample(
                    problems[index],
                    sample,
                    texts[index],
                    written[number].new_text,
                    self.protocol.extract(written[number].new_text),
                )
                for number, (index, sample) in numbers.items()
            }
            score = self._score(sandbox, samples, asked)
        generation = {
            **settings,
            "num_samples": self.num_samples,
            "num_truncated_prompts": sum(answer.is_truncated for answer in written.values()),
            "num_new_tokens": sum(len(answer.new_ids) for answer in written.values()),
        }
        return replace(score, generation=generation, template_hash=template_hash)

    def score_samples(self, path: Path) -> TaskScore:
        """Run code that somebody else's model wrote."""
        from wegeft_cli.evaluation.code.scoring import CODE_TIMEOUT, CodeSample
        from wegeft_cli.sandbox.run import open_sandbox

        problems = {row.index: row for row in self.problems.rows}
        counts = dict.fromkeys(problems, 0)
        samples: dict[int, CodeSample] = {}
        for index, text, is_completion in read_code_samples(path, self.problems):
            completion = text if is_completion else self.protocol.extract(text)
            samples[len(samples)] = CodeSample(problems[index], counts[index], "", text, completion)
            counts[index] += 1
        with open_sandbox(timeout=CODE_TIMEOUT) as sandbox:
            return self._score(sandbox, samples, Asked(1))

    def _score(self, sandbox: Any, samples: Mapping[int, Any], asked: Asked) -> TaskScore:
        from wegeft_cli.evaluation.code.scoring import run_samples, sample_record, summarise

        mine = asked.processes.shard(sorted(samples))
        outcomes = asked.processes.merge(run_samples(sandbox, {n: samples[n] for n in mine}))
        result = summarise(
            [samples[number] for number in sorted(samples)],
            [outcomes[number] for number in sorted(samples)],
        )
        if num_errors := result.outcomes["sandbox_error"]:
            reason = next(o.detail for o in outcomes.values() if o.kind == "sandbox_error")
            asked.warn(
                f"{TASK}: {num_errors} samples could not be run ({reason}); they are left out of "
                "the score"
            )
        records = [
            {**sample_record(samples[number], outcomes[number]), "index": number}
            for number in sorted(samples)
        ]
        return TaskScore(
            task=TASK,
            protocol=self.protocol.name,
            score=result.pass_at_k["1"],
            num_correct=result.num_passed,
            n=result.num_samples,
            n_invalid=sum(not record["valid"] for record in records),
            ci95=result.ci95,
            template_hash=self.protocol.template_hash(),
            data_sha256=self.problems.sha256,
            origin=self.problems.origin,
            samples=records,
            extra={
                "pass_at_k": result.pass_at_k,
                "outcomes": result.outcomes,
                "num_problems": result.num_problems,
                "num_rows": self.problems.num_rows,
                "published_data": self.problems.is_published,
            },
        )

    def _tell_data(self, asked: Asked) -> None:
        if self.problems.is_published is False:
            asked.warn(
                f"{TASK}: {self.problems.origin} is not the published file; its score stands "
                "beside no published one"
            )


def read_code_task(request: TaskRequest) -> CodeJob:
    """Read HumanEval before any model is loaded.

    Args:
        request: The task; `options` may hold allow_code_execution, num_samples, temperature, seed.

    Returns:
        The job.

    Raises:
        UserError: If running code was not allowed, the file is missing or damaged, or the settings
            do not go together.
        ExceptionGroup: If there are several such faults.
    """
    if not request.options.get("allow_code_execution"):
        raise UserError(
            "HumanEval runs the code that a model writes",
            key="--allow-code-execution",
            hint="add this option; the code runs in a sandbox, see docs/code-and-judges.md",
        )
    settings = request.settings
    is_named = TASK in settings.tasks
    name = request.protocol
    if name is None and settings.protocol in CODE_PROTOCOLS:
        name = settings.protocol
    protocol = find_code_protocol(name)
    folder = request.data_dir
    if folder is None and settings.data_dir is not None:
        own_folder = Path(settings.data_dir).expanduser()
        is_there = (own_folder / FILE).is_file() or (
            own_folder / FILE.removesuffix(".gz")
        ).is_file()
        folder = own_folder if is_there else None
    problems = load_problems(
        data_dir=folder, limit=request.limit or (settings.limit if is_named else None)
    )
    length = request.max_new_tokens or (settings.max_new_tokens if is_named else None)
    temperature = request.options.get("temperature")
    num_samples = request.options.get("num_samples") or protocol.num_samples
    decoding = replace(
        protocol.decoding,
        max_new_tokens=length or protocol.decoding.max_new_tokens,
        temperature=protocol.decoding.temperature if temperature is None else temperature,
        seed=int(request.options.get("seed") or 0),
    )
    if num_samples > 1 and not decoding.do_sample:
        raise UserError(
            f"{num_samples} samples at temperature 0 are {num_samples} times the same",
            key="--num-samples",
            hint="add --temperature, such as 0.2 for pass@1 or 0.8 for pass@10 and more",
        )
    return CodeJob(problems, protocol, decoding, num_samples)


def _check(task: str, protocol: str, must: bool) -> None:
    if must:
        find_code_protocol(protocol)


def _list_tasks() -> list[dict[str, Any]]:
    return [
        {
            "name": TASK,
            "file": FILE,
            "kind": "code",
            "num_rows": NUM_PUBLISHED,
            "protocols": list(CODE_PROTOCOLS),
        }
    ]


def _list_protocols() -> list[dict[str, Any]]:
    return [
        {
            "name": protocol.name,
            "description": f"For {TASK}: {protocol.description}",
            "fixed": protocol.fixed,
            "task": TASK,
        }
        for protocol in CODE_PROTOCOLS.values()
    ]


CODE = TaskKind(
    "code",
    lambda name: name.lower() == TASK,
    read_code_task,
    _list_tasks,
    _check,
    _list_protocols,
)
"""Answers in code, run against tests."""
