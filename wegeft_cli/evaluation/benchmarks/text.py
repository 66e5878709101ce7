"""Benchmarks with text answers: a test set and the protocol that scores it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.data.text.template_settings import TemplateSettings
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import (
    BenchmarkContext,
    BenchmarkFamily,
    EvaluationRequest,
)
from wegeft_cli.evaluation.benchmarks.groups import expand_groups
from wegeft_cli.evaluation.score import Score
from wegeft_cli.evaluation.text.loading import (
    TEST_SETS,
    Questions,
    TestSet,
    find_test_set,
    load_questions,
)
from wegeft_cli.evaluation.text.protocol_registry import PROTOCOLS, EvalProtocol, find_protocol
from wegeft_cli.evaluation.text.scoring import read_samples, score_outputs
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.inference.prompt_format import RenderedPrompts, render_user_prompts
from wegeft_cli.recipe.schema import EvalSection


@dataclass(frozen=True)
class TextBenchmark:
    """One test set under one protocol.

    Args:
        data: The rows.
        protocol: Prompt, decoding and scoring rules.
        max_new_tokens: Longest answer. Default: the protocol's.
        seed: Sampling seed.
    """

    data: Questions
    protocol: EvalProtocol
    max_new_tokens: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The test set's name."""
        return self.data.test_set.name

    @property
    def protocol_name(self) -> str:
        """The protocol's name."""
        return self.protocol.name

    @property
    def template(self) -> str:
        """The template of the prompts, as in `data.template`."""
        return self.protocol.template_name(self.data.test_set)

    @property
    def num_examples(self) -> int:
        """Number of rows."""
        return len(self.data.rows)

    @property
    def decoding(self) -> Decoding:
        """The protocol's decoding with this benchmark's length and seed."""
        decoding = self.protocol.decoding(self.data.test_set)
        length = self.max_new_tokens or decoding.max_new_tokens
        return replace(decoding, max_new_tokens=length, seed=self.seed)

    def cache_key(self) -> dict[str, Any]:
        """Return everything that the answers depend on besides the model."""
        return {
            "task": self.name,
            "protocol": self.protocol_name,
            "template_hash": self.protocol.template_hash(self.data.test_set),
            "data_sha256": self.data.sha256,
            "decoding": self.protocol.decoding(self.data.test_set).settings(),
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }

    def prompts(self, tokenizer: Any, settings: TemplateSettings | None = None) -> RenderedPrompts:
        """Render the prompts; UserError if the protocol needs a chat template and there is none."""
        test_set = self.data.test_set
        texts = {row.index: self.protocol.prompt(test_set, row) for row in self.data.rows}
        if self.protocol.rule(test_set).is_chat:
            return render_user_prompts(
                tokenizer,
                texts,
                protocol=self.protocol.name,
                other=test_set.default_protocol,
                settings=settings,
            )
        return RenderedPrompts(texts, self.protocol.template_hash(test_set))

    def run(self, model: Any, context: BenchmarkContext) -> Score:
        """Generate the answers and score them."""
        from wegeft_cli.evaluation.answers import generate_answers

        if self.data.complaint is not None:
            # Without the benchmark's name: parts of one file warn once.
            context.warn(
                f"{self.data.origin} is not the published set: {self.data.complaint}; its scores "
                "are not comparable with published ones"
            )
        prompts = self.prompts(model.tokenizer, model.chat_settings)
        answers = generate_answers(
            model,
            prompts,
            self.decoding,
            context,
            on_progress=lambda done: context.on_progress(done, self.num_examples),
        )
        score = score_outputs(
            self.protocol,
            self.data,
            {n: answer.new_text for n, answer in answers.completions.items()},
            full_texts={n: answer.text for n, answer in answers.completions.items()},
            prompts=prompts.texts,
            template_hash=prompts.template_hash,
        )
        return replace(score, generation=answers.generation())

    def score_file(self, path: Path) -> Score:
        """Score outputs from a file."""
        return score_outputs(self.protocol, self.data, read_samples(path, self.data, self.protocol))


def choose_protocol(test_set: TestSet, from_recipe: str) -> str | None:
    """Return the recipe's protocol if it scores the test set; None is the set's own or default."""
    protocol = PROTOCOLS.get(from_recipe)
    if protocol is not None and not protocol.scores(test_set):
        return None
    # The schema's default does not replace the default protocol of a set.
    is_default = from_recipe == EvalSection().protocol
    return None if is_default and test_set.default_protocol != from_recipe else from_recipe


def load_text_benchmark(name: str, request: EvaluationRequest) -> TextBenchmark:
    """Load a test set and choose its protocol.

    The request wins. The recipe's settings apply to the benchmarks that `eval.tasks` names; for
    others its data folder applies if it contains the set, and its protocol if it scores the set.

    Raises:
        UserError: If a name is unknown, the set is missing or damaged, or has known train/test
            overlap without `allow_leaky`.
        ExceptionGroup: If there are several such faults.
    """
    settings = request.settings
    test_set = find_test_set(name)
    if test_set.leak is not None and not request.options.get("allow_leaky"):
        raise UserError(
            f"`{test_set.name}` leaks: {test_set.leak}",
            key="task",
            hint="--allow-leaky scores it anyway, and the result reports the leak",
        )
    names = {name.lower() for name in expand_groups(settings.tasks)}
    is_named = test_set.name in names or (
        test_set.part is None and test_set.folder.lower() in names
    )
    protocol = find_protocol(
        request.protocol or choose_protocol(test_set, settings.protocol), test_set
    )
    folder = request.data_dir
    if folder is None and (own := request.settings_dir) is not None:
        folder = own if is_named or _has_set(own, test_set) else None
    limit, max_new_tokens = request.limits(is_named=is_named)
    data = load_questions(test_set, data_dir=folder, limit=limit)
    protocol.check_data(data)
    return TextBenchmark(data, protocol, max_new_tokens, int(request.options.get("seed") or 0))


def _has_set(data_dir: Path, test_set: TestSet) -> bool:
    return any((data_dir / name).is_dir() for name in (test_set.folder, test_set.name))


def _find_name(name: str) -> str | None:
    try:
        return find_test_set(name).name
    except UserError:
        return None


def _list_tasks() -> list[dict[str, Any]]:
    return [
        {
            "name": test_set.name,
            "file": test_set.file,
            "kind": test_set.kind,
            "num_rows": test_set.num_published,
            "protocols": [
                name for name, protocol in PROTOCOLS.items() if protocol.scores(test_set)
            ],
            "leak": test_set.leak,
            "part": None if test_set.part is None else test_set.part.description,
        }
        for test_set in TEST_SETS.values()
    ]


def _list_protocols() -> list[dict[str, Any]]:
    return [
        {"name": protocol.name, "description": protocol.description, "fixed": protocol.fixed}
        for protocol in PROTOCOLS.values()
    ]


def _check_protocol(name: str, protocol: str, must_fit: bool) -> None:
    test_set = find_test_set(name)
    find_protocol(protocol if must_fit else choose_protocol(test_set, protocol), test_set)


FAMILY = BenchmarkFamily(
    "text",
    _find_name,
    load_text_benchmark,
    _list_tasks,
    check_protocol=_check_protocol,
    list_protocols=_list_protocols,
)
