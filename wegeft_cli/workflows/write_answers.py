"""Prompts are answered by the processes together; what was answered before is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wegeft_cli.evaluation.asking import written_from_json, written_to_json
from wegeft_cli.evaluation.decoding import Decoding
from wegeft_cli.evaluation.generate import generate_texts
from wegeft_cli.evaluation.written import Written
from wegeft_cli.workflows.jobs import Asked


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
    log, share = asked.log, asked.share
    known = share.agree({} if log is None else log.read())
    done = {n: written_from_json(known[n]) for n in prompts if n in known}
    # The longest first and then dealt out like cards: even shares.
    left = sorted((n for n in prompts if n not in done), key=lambda n: (-len(prompts[n]), n))
    mine = share.deal(left)
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
        on_progress=lambda n, total: on_progress(min(len(done) + n * share.count, len(prompts))),
        on_written=keep,
    )
    written = share.gather(dict(zip(mine, generations.written, strict=True)))
    return dict(sorted((done | written).items())), generations.settings
