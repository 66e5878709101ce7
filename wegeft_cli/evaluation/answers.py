"""Prompts are answered by the processes together; what was answered before is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from wegeft_cli.evaluation.benchmarks.base import Asked
from wegeft_cli.evaluation.score import TaskScore, score_outputs
from wegeft_cli.evaluation.text.loading import TaskData
from wegeft_cli.evaluation.text.protocol import EvalProtocol, with_length
from wegeft_cli.generation.completion import Generations, Written
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import generate_texts
from wegeft_cli.inference.prompt_format import write_chat_prompts


def write_answers(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[int, str],
    decoding: Decoding,
    asked: Asked,
    *,
    draws: Mapping[int, int] | None = None,
    add_special_tokens: bool = True,
    turn_ends: Sequence[int] = (),
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[int, Written], dict[str, Any]]:
    """Answer prompts, this process its share of them.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        prompts: Number -> prompt. The number says which answer it is in the log.
        decoding: How to write.
        asked: Batch size, log, share and engine.
        draws: Number -> the number of its stream of draws; None takes the same.
        add_special_tokens: Off for what a chat template wrote.
        turn_ends: Tokens that end a turn in that template.
        on_progress: Called with how many of these prompts are answered.

    Returns:
        Number -> answer, the same in every process, and the resolved settings.

    Raises:
        UserError: If the model cannot take such prompts or answers.
    """
    log, processes = asked.log, asked.processes
    known = processes.broadcast({} if log is None else log.read())
    done = {n: written_from_json(known[n]) for n in prompts if n in known}
    # The longest first and then dealt out like cards: even shares.
    left = sorted((n for n in prompts if n not in done), key=lambda n: (-len(prompts[n]), n))
    mine = processes.shard(left)
    on_progress(len(done))

    def keep(answers: Mapping[int, Written]) -> None:
        if log is not None:
            log.append({mine[place]: written_to_json(answer) for place, answer in answers.items()})

    generations = (asked.write or generate_texts)(
        model,
        tokenizer,
        [prompts[number] for number in mine],
        batch_size=asked.batch_size,
        decoding=decoding,
        numbers=mine if draws is None else [draws[number] for number in mine],
        add_special_tokens=add_special_tokens,
        turn_ends=turn_ends,
        on_progress=lambda n, total: on_progress(
            min(len(done) + n * processes.count, len(prompts))
        ),
        on_written=keep,
    )
    written = processes.merge(dict(zip(mine, generations.written, strict=True)))
    return dict(sorted((done | written).items())), generations.settings


@dataclass(frozen=True)
class Questions:
    """What is asked, and how.

    Args:
        data: The rows.
        protocol: Asks and reads.
        prompts: Row index -> text that the model continues.
        decoding: How answers are written.
        template_hash: Of the prompt's template.
        add_special_tokens: Whether the tokenizer adds its own: a chat template writes them itself.
        turn_ends: Tokens that end the model's turn in its chat template.
    """

    data: TaskData
    protocol: EvalProtocol
    prompts: dict[int, str]
    decoding: Decoding
    template_hash: str
    add_special_tokens: bool
    turn_ends: Sequence[int] = ()

    @staticmethod
    def build(
        data: TaskData, protocol: EvalProtocol, tokenizer: Any, max_new_tokens: int | None = None
    ) -> Questions:
        """Write the prompts.

        Args:
            data: The rows.
            protocol: It must score the task (`find_protocol`).
            tokenizer: Holds the chat template, where the protocol asks in it.
            max_new_tokens: Longest answer; None takes the protocol's.

        Returns:
            The questions.

        Raises:
            UserError: If the protocol asks in a chat template and there is none, or it refuses.
        """
        task = data.task
        prompts = {row.index: protocol.prompt(task, row) for row in data.rows}
        template_hash = protocol.template_hash(task)
        is_chat = protocol.rule(task).is_chat
        turn_ends: list[int] = []
        if is_chat:
            prompts, template_hash, turn_ends = write_chat_prompts(
                tokenizer,
                {index: [{"role": "user", "content": text}] for index, text in prompts.items()},
                protocol=protocol.name,
                other=task.default_protocol,
            )
        decoding = with_length(protocol.decoding(task), max_new_tokens)
        return Questions(data, protocol, prompts, decoding, template_hash, not is_chat, turn_ends)


def ask_questions(
    model: Any,
    tokenizer: Any,
    questions: Questions,
    *,
    batch_size: int,
    indices: list[int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_written: Callable[[Mapping[int, Written]], None] | None = None,
    write: Callable[..., Generations] = generate_texts,
) -> tuple[dict[int, Written], dict[str, Any]]:
    """Let a model answer.

    Args:
        model: A transformers causal language model, on any device.
        tokenizer: Its tokenizer.
        questions: What to ask.
        batch_size: Prompts at a time, at least 1.
        indices: Only these rows; None takes all.
        on_progress: Called with (rows done, rows in all).
        on_written: Called with answers as they come, by row index.
        write: Writes the texts; as `generate_texts`.

    Returns:
        Row index -> answer, and the resolved settings.

    Raises:
        UserError: If the model cannot take such prompts or answers.
    """
    asked = list(questions.prompts) if indices is None else indices

    def keep(answers: Mapping[int, Written]) -> None:
        if on_written is not None:
            on_written({asked[place]: answer for place, answer in answers.items()})

    generations = write(
        model,
        tokenizer,
        [questions.prompts[index] for index in asked],
        batch_size=batch_size,
        decoding=questions.decoding,
        numbers=asked,
        add_special_tokens=questions.add_special_tokens,
        turn_ends=questions.turn_ends,
        on_progress=on_progress,
        on_written=keep,
    )
    return dict(zip(asked, generations.written, strict=True)), generations.settings


def score_written(
    questions: Questions, written: tuple[Mapping[int, Written], Mapping[str, Any]]
) -> TaskScore:
    """Score the answers to all rows.

    Args:
        questions: What was asked.
        written: Row index -> answer, and the settings, as `ask_questions` gives them.

    Returns:
        The score, with the resolved generation settings and the number of tokens written.
    """
    answers, settings = written
    score = score_outputs(
        questions.protocol,
        questions.data,
        {index: answer.new_text for index, answer in answers.items()},
        full_texts={index: answer.text for index, answer in answers.items()},
        prompts=questions.prompts,
        template_hash=questions.template_hash,
    )
    return replace(
        score,
        generation={
            **settings,
            "num_truncated_prompts": sum(answer.is_truncated for answer in answers.values()),
            "num_new_tokens": sum(len(answer.new_ids) for answer in answers.values()),
        },
    )


def written_to_json(answer: Written) -> dict[str, Any]:
    """An answer as JSON values."""
    return asdict(answer)


def written_from_json(value: Mapping[str, Any]) -> Written:
    """The answer of such values."""
    return Written(**value)


def evaluate_task(
    model: Any,
    tokenizer: Any,
    data: TaskData,
    protocol: EvalProtocol,
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TaskScore:
    """Let a model answer a test set and score what it wrote.

    Args:
        model: A transformers causal language model, on any device.
        tokenizer: Its tokenizer.
        data: The rows to ask.
        protocol: How to ask and to score; it must score the task (`find_protocol`).
        batch_size: Prompts at a time, at least 1.
        max_new_tokens: Longest answer; None takes the protocol's.
        on_progress: Called with (rows done, rows in all) as rows are done.

    Returns:
        The score, with the resolved generation settings and the number of tokens written.

    Raises:
        UserError: If the model cannot take such prompts or answers.
    """
    questions = Questions.build(data, protocol, tokenizer, max_new_tokens)
    written = ask_questions(
        model, tokenizer, questions, batch_size=batch_size, on_progress=on_progress
    )
    return score_written(questions, written)
