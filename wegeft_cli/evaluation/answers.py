"""Generation of a benchmark's answers: sharded over the processes, cached, interruptible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from wegeft_cli.distributed.separate_work import raise_together
from wegeft_cli.evaluation.benchmarks.base import BenchmarkContext
from wegeft_cli.generation.completion import Completion
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import GenerationEvents, Prompts, generate_texts
from wegeft_cli.inference.prompt_format import RenderedPrompts


@dataclass(frozen=True)
class Answers:
    """The completions by the prompts' numbers, and the resolved generation settings."""

    completions: dict[int, Completion]
    settings: dict[str, Any]

    def generation(self, **more: Any) -> dict[str, Any]:
        """Return the `generation` entry of a result: the settings and the counts of tokens."""
        completions = self.completions.values()
        return {
            **self.settings,
            **more,
            "num_truncated_prompts": sum(answer.is_truncated for answer in completions),
            "num_new_tokens": sum(len(answer.new_ids) for answer in completions),
        }


def generate_answers(
    model: Any,
    prompts: RenderedPrompts,
    decoding: Decoding,
    context: BenchmarkContext,
    *,
    sample_ids: Mapping[int, int] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Generate the answers to all prompts, this process its shard of them.

    Cached answers are not generated again. With `context.check_stop` the prompts are answered in
    rounds of one batch per process.

    Args:
        sample_ids: Sample ids by number. Default: the number itself.

    Raises:
        UserError: If the model cannot take such prompts or answers.
    """
    cache, processes = context.cache, context.processes
    cached = processes.broadcast({} if cache is None else cache.read())
    done = {n: Completion(**cached[n]) for n in prompts.texts if n in cached}
    # Longest first, then dealt round-robin: even shards, and a batch too large fails at once.
    left = sorted(
        (n for n in prompts.texts if n not in done), key=lambda n: (-len(prompts.texts[n]), n)
    )
    on_progress(len(done))
    new: dict[int, Completion] = {}
    settings: dict[str, Any] = {}
    num_done = len(done)
    for position, numbers in enumerate(_rounds(left, context)):
        if position and context.check_stop is not None:
            context.check_stop()
        mine = processes.shard(numbers)
        # In lockstep a process without rows takes part in the passes of the others.
        asked = mine or (numbers[:1] if context.in_lockstep else [])

        def store(completions: Mapping[int, Completion], mine: Sequence[int] = mine) -> None:
            if cache is not None and mine:
                cache.append({mine[n]: asdict(answer) for n, answer in completions.items()})

        def report(n: int, total: int, before: int = num_done) -> None:
            on_progress(min(before + n * processes.count, len(prompts.texts)))

        generate = partial(
            model.write or generate_texts,
            model.model,
            model.tokenizer,
            Prompts(
                [prompts.texts[n] for n in asked],
                asked if sample_ids is None else [sample_ids[n] for n in asked],
                prompts.add_special_tokens,
                prompts.end_of_turn_ids,
            ),
            decoding,
            batch_size=context.batch_size,
            events=GenerationEvents(on_progress=report, on_completed=store),
        )
        # In lockstep the passes themselves are collectives: an error ends the process instead.
        result = generate() if context.in_lockstep else raise_together(processes, generate)
        settings = result.settings
        if result.note is not None:
            context.warn(result.note)
        new |= dict(zip(asked, result.completions, strict=True)) if mine else {}
        num_done += len(numbers)
    return Answers(dict(sorted((done | processes.merge(new)).items())), settings)


def _rounds(numbers: list[int], context: BenchmarkContext) -> list[list[int]]:
    if context.check_stop is None:
        return [numbers]
    size = context.batch_size * context.processes.count
    return [numbers[start : start + size] for start in range(0, len(numbers), size)] or [[]]
