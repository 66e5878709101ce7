"""HumanEval: generated code, run in a sandbox with the user's consent."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.data.text.template_settings import TemplateSettings
from wegeft_cli.distributed.separate_work import raise_together
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import (
    BenchmarkContext,
    BenchmarkFamily,
    EvaluationRequest,
)
from wegeft_cli.evaluation.benchmarks.training import ALLOW_CODE_VARIABLE
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
from wegeft_cli.evaluation.score import Score
from wegeft_cli.generation.decoding import Decoding, sample_id
from wegeft_cli.inference.prompt_format import RenderedPrompts, render_user_prompts

NAME = "humaneval"
_PARSE_ERRORS = ("SyntaxError", "IndentationError", "TabError")


@dataclass(frozen=True)
class CodeBenchmark:
    """HumanEval under one protocol."""

    problems: Problems
    protocol: CodeProtocol
    decoding: Decoding
    num_samples: int

    @property
    def name(self) -> str:
        """The benchmark's name."""
        return NAME

    @property
    def protocol_name(self) -> str:
        """The protocol's name."""
        return self.protocol.name

    @property
    def num_examples(self) -> int:
        """Number of samples: problems times answers per problem."""
        return len(self.problems.rows) * self.num_samples

    def cache_key(self) -> Mapping[str, Any]:
        """Return everything that the answers depend on besides the model."""
        return {
            "task": NAME,
            "protocol": self.protocol.name,
            "template_hash": self.protocol.template_hash(),
            "data_sha256": self.problems.sha256,
            "decoding": self.decoding.settings(),
            "num_samples": self.num_samples,
        }

    def prompts(self, tokenizer: Any, settings: TemplateSettings | None = None) -> RenderedPrompts:
        """Render one prompt per problem, by the problem's index."""
        texts = {row.index: self.protocol.prompt(row.prompt) for row in self.problems.rows}
        if self.protocol.is_chat:
            return render_user_prompts(
                tokenizer,
                texts,
                protocol=self.protocol.name,
                other=DEFAULT_CODE_PROTOCOL,
                settings=settings,
            )
        return RenderedPrompts(texts, self.protocol.template_hash())

    def run(self, model: Any, context: BenchmarkContext) -> Score:
        """Generate code and run it."""
        from wegeft_cli.evaluation.answers import generate_answers
        from wegeft_cli.evaluation.code.scoring import CODE_TIMEOUT, CodeSample
        from wegeft_cli.sandbox.run import open_sandbox

        # The sandbox first: without isolation, no answer can be scored.
        with ExitStack() as stack:
            opened = open_sandbox(timeout=CODE_TIMEOUT)
            sandbox = raise_together(context.processes, lambda: stack.enter_context(opened))
            self._warn_of_other_data(context)
            prompts = self.prompts(model.tokenizer, model.chat_settings)
            texts = prompts.texts
            numbers = {
                index * self.num_samples + sample: (index, sample)
                for index in texts
                for sample in range(self.num_samples)
            }
            answers = generate_answers(
                model,
                replace(prompts, texts={n: texts[index] for n, (index, _) in numbers.items()}),
                self.decoding,
                context,
                sample_ids={n: sample_id(*place) for n, place in numbers.items()},
                on_progress=lambda done: context.on_progress(done, self.num_examples),
            )
            problems = {row.index: row for row in self.problems.rows}
            outputs = {n: answer.new_text for n, answer in answers.completions.items()}
            samples = {
                n: CodeSample(
                    problems[index],
                    sample,
                    texts[index],
                    outputs[n],
                    self.protocol.extract(outputs[n]),
                )
                for n, (index, sample) in numbers.items()
            }
            score = self._score(sandbox, samples, context)
        generation = answers.generation(num_samples=self.num_samples)
        return replace(score, generation=generation, template_hash=prompts.template_hash)

    def score_file(self, path: Path) -> Score:
        """Run code from a samples file."""
        from wegeft_cli.evaluation.code.scoring import CODE_TIMEOUT, CodeSample
        from wegeft_cli.sandbox.run import open_sandbox

        problems = {row.index: row for row in self.problems.rows}
        counts = dict.fromkeys(problems, 0)
        samples: dict[int, CodeSample] = {}
        read = read_code_samples(path, self.problems)
        for index, text, is_completion in read:
            completion = text if is_completion else self.protocol.extract(text)
            samples[len(samples)] = CodeSample(problems[index], counts[index], "", text, completion)
            counts[index] += 1
        with open_sandbox(timeout=CODE_TIMEOUT) as sandbox:
            score = self._score(sandbox, samples, BenchmarkContext(1))
        if all(sample["detail"].startswith(_PARSE_ERRORS) for sample in score.samples):
            note = f"{NAME}: no sample is valid Python. "
            if any(is_completion for _, _, is_completion in read):
                note += "`completion` is code that continues the problem's prompt. "
            note += "Put answers with prose or code fences into `output`, with --protocol chat"
            return replace(score, notes=(note,))
        return score

    def _score(self, sandbox: Any, samples: Mapping[int, Any], context: BenchmarkContext) -> Score:
        from wegeft_cli.evaluation.code.scoring import run_samples, sample_record, summarise

        mine = {n: samples[n] for n in context.processes.shard(sorted(samples))}
        own = context.run_apart(lambda check: run_samples(sandbox, mine, lambda done: check()))
        outcomes = context.processes.merge(own)
        result = summarise(
            [samples[number] for number in sorted(samples)],
            [outcomes[number] for number in sorted(samples)],
        )
        if num_errors := result.outcomes["sandbox_error"]:
            reason = next(o.detail for o in outcomes.values() if o.kind == "sandbox_error")
            context.warn(
                f"{NAME}: {num_errors} samples could not be run ({reason}); the score excludes them"
            )
        records = [
            {**sample_record(samples[number], outcomes[number]), "index": number}
            for number in sorted(samples)
        ]
        return Score(
            task=NAME,
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

    def _warn_of_other_data(self, context: BenchmarkContext) -> None:
        if self.problems.is_published is False:
            context.warn(
                f"{NAME}: {self.problems.origin} is not the published file; its score is not "
                "comparable with published ones"
            )


def load_code_benchmark(name: str, request: EvaluationRequest) -> CodeBenchmark:
    """Load HumanEval; options: allow_code_execution, num_samples, temperature, seed.

    Raises:
        UserError: If running code was not allowed, the file is missing or damaged, or the settings
            contradict each other.
        ExceptionGroup: If there are several such faults.
    """
    if not request.options.get("allow_code_execution"):
        raise UserError(
            "HumanEval runs the code that a model writes",
            key="--allow-code-execution",
            hint="add this option; the code runs in a sandbox, see docs/code-and-judges.md",
        )
    settings = request.settings
    is_named = NAME in settings.tasks
    protocol_name = request.protocol
    if protocol_name is None and settings.protocol in CODE_PROTOCOLS:
        protocol_name = settings.protocol
    protocol = find_code_protocol(protocol_name)
    folder = request.data_dir
    if folder is None and (own := request.settings_dir) is not None:
        files = (own / FILE, own / FILE.removesuffix(".gz"))
        folder = own if any(file.is_file() for file in files) else None
    limit, length = request.limits(is_named=is_named)
    problems = load_problems(data_dir=folder, limit=limit)
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
            f"{num_samples} samples at temperature 0 are all the same",
            key="--num-samples",
            hint="add --temperature, such as 0.2 for pass@1 or 0.8 for pass@10 and more",
        )
    return CodeBenchmark(problems, protocol, decoding, num_samples)


def _check_protocol(name: str, protocol: str, must_fit: bool) -> None:
    if must_fit:
        find_code_protocol(protocol)


def _check_training(name: str, options: Mapping[str, Any]) -> None:
    if not options.get("allow_code_execution"):
        raise UserError(
            "HumanEval runs the code that a model writes",
            hint=f"set the environment variable {ALLOW_CODE_VARIABLE}=1 to allow it; the code runs "
            "in a sandbox, see docs/code-and-judges.md",
        )


def _list_tasks() -> list[dict[str, Any]]:
    return [
        {
            "name": NAME,
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
            "description": f"For {NAME}: {protocol.description}",
            "fixed": protocol.fixed,
            "task": NAME,
        }
        for protocol in CODE_PROTOCOLS.values()
    ]


FAMILY = BenchmarkFamily(
    "code",
    lambda name: NAME if name.lower() == NAME else None,
    load_code_benchmark,
    _list_tasks,
    _check_protocol,
    _check_training,
    _list_protocols,
)
