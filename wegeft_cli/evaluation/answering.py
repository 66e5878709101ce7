"""Prompts become texts, in left-padded batches, with every setting explicit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.sampling import (
    GREEDY,
    Decoding,
    StopTexts,
    TextStream,
    cut_at_stop,
    derive_seed,
)


@dataclass(frozen=True)
class Generations:
    """What a model wrote, in the order of the prompts."""

    texts: list[str]
    """Prompt and new tokens decoded together, without special tokens."""
    new_texts: list[str]
    """The new tokens alone, without special tokens."""
    new_ids: list[list[int]]
    """The new tokens, up to and with the first end-of-text token or the end of a stopping text."""
    settings: dict[str, Any]
    """All that the texts depend on besides model and prompts, as JSON values."""
    finish_reasons: list[str]
    """`stop` where the model or a stopping text ended the answer, `length` where its room did."""
    truncated: list[bool]
    """Whether the prompt lost tokens from its left."""

    @property
    def num_new_tokens(self) -> int:
        """Tokens written, over all prompts."""
        return sum(len(ids) for ids in self.new_ids)


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    add_special_tokens: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    decoding: Decoding = GREEDY,
    seeds: Sequence[int] | None = None,
    end_ids: Sequence[int] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generations:
    """Continue the prompts; each text is what its prompt alone would give, drawn or not.

    The longest prompts go first, so that a batch too large for the memory fails at once. A prompt
    that leaves no room for the answer in the model's context loses tokens from its left, after the
    begin-of-text token; `settings["num_truncated_prompts"]` counts these. The model's own
    generation config is put aside meanwhile: transformers would fill the gaps of ours from it, and
    so let a hub file switch on a repetition penalty. Config, training mode and tokenizer are left
    as they were.

    Args:
        model: A transformers causal language model, on any device.
        tokenizer: Its tokenizer; a missing padding token is no hindrance.
        prompts: Texts.
        max_new_tokens: Longest answer, at least 1.
        batch_size: Prompts at a time, at least 1.
        add_special_tokens: Encode them with the special tokens that the tokenizer adds by itself;
            off for what a chat template wrote, which holds them already.
        on_progress: Called with (prompts done, prompts in all) after every batch.
        decoding: How the next token is chosen; greedy if left out.
        seeds: Of each prompt's draw; None derives them from the prompts' positions.
        end_ids: Tokens that end a text; None takes the tokenizer's end of text, or where it has
            none the model's.
        on_text: Takes the text of a single prompt piece by piece, as it is written.

    Returns:
        The texts and the resolved settings.

    Raises:
        UserError: If a number is out of range, a prompt has no tokens, or the answer alone fills
            the model's context.
    """
    if on_text is not None and len(prompts) != 1:
        raise ValueError(f"{len(prompts)} prompts: one text is streamed at a time")
    decoding.check()
    seeds = [derive_seed(0, index) for index in range(len(prompts))] if seeds is None else seeds
    for key, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{value} is too small", key=key, hint="give 1 or more")
    encoded = []
    if prompts:
        told = tokenizer(list(prompts), add_special_tokens=add_special_tokens)
        encoded = [list(ids) for ids in told["input_ids"]]
    prompt_ids = _fit_context(model, tokenizer, encoded, max_new_tokens)
    truncated = [len(ids) < len(whole) for ids, whole in zip(prompt_ids, encoded, strict=True)]
    config = _build_config(model, tokenizer, max_new_tokens, end_ids)
    stream = None if on_text is None else TextStream(tokenizer, decoding.stop, on_text)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompt_ids[index]))
    new_ids: list[list[int]] = [[] for _ in prompts]
    reasons = ["length" for _ in prompts]
    with _generating(model, config):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            answers = _generate_batch(
                model,
                tokenizer,
                [prompt_ids[index] for index in batch],
                config,
                decoding,
                [seeds[index] for index in batch],
                stream,
            )
            for index, (ids, reason) in zip(batch, answers, strict=True):
                new_ids[index], reasons[index] = ids, reason
            if on_progress is not None:
                on_progress(start + len(batch), len(order))
    full_ids = [prompt + new for prompt, new in zip(prompt_ids, new_ids, strict=True)]
    new_texts = [
        cut_at_stop(tokenizer.decode(ids, skip_special_tokens=True), decoding.stop)
        for ids in new_ids
    ]
    if stream is not None:
        stream.finish(new_texts[0])
    return Generations(
        texts=[tokenizer.decode(ids, skip_special_tokens=True) for ids in full_ids],
        new_texts=new_texts,
        new_ids=new_ids,
        finish_reasons=reasons,
        truncated=truncated,
        settings={
            **decoding.to_json(),
            "num_beams": 1,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "padding_side": "left",
            "batch_size": batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_truncated_prompts": sum(truncated),
        },
    )


def _fit_context(
    model: Any, tokenizer: Any, encoded: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """The prompts, cut from the left where context or answer demand it."""
    empty = [index for index, ids in enumerate(encoded) if not ids]
    if empty:
        raise UserError(f"prompt {empty[0]} has no tokens", hint="give at least one character")
    context = find_context(model)
    if context is None:
        return encoded
    room = context - max_new_tokens
    if room < 1:
        raise UserError(
            f"{max_new_tokens} new tokens leave no room for a prompt: the model reads {context}",
            key="max_new_tokens",
            hint=f"give at most {context - 1}",
        )
    return [
        ids if len(ids) <= room else _cut_left(ids, room, tokenizer.bos_token_id) for ids in encoded
    ]


def find_context(model: Any) -> int | None:
    """Give how many tokens a model reads, answer included; None where nothing bounds them.

    Args:
        model: A transformers causal language model, or PEFT's around one.

    Returns:
        Tokens.
    """
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _cut_left(ids: list[int], room: int, bos_token_id: int | None) -> list[int]:
    if ids[0] == bos_token_id and room > 1:
        return [ids[0], *ids[-(room - 1) :]]
    return ids[-room:]


def _build_config(
    model: Any, tokenizer: Any, max_new_tokens: int, end_ids: Sequence[int] | None
) -> GenerationConfig:
    """Take the best token each time, with nothing left open that a model's config could fill.

    A draw is made among the processors, which leave one token as the best.
    """
    eos_token_id = tokenizer.eos_token_id if end_ids is None else (list(end_ids) or None)
    if eos_token_id is None and end_ids is None:
        eos_token_id = model.generation_config.eos_token_id
    eos_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        # For padding only, which the attention mask hides: any token that exists would do.
        pad_token_id = eos_ids[0] if eos_ids[0] is not None else 0
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=None if eos_token_id is None else eos_ids,
        pad_token_id=pad_token_id,
        use_cache=True,
    )


@contextmanager
def _generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """The model in eval mode under `config` alone; both as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    # Wrappers (PEFT's) pass their inner model's config on: it is replaced wherever one is kept.
    configs = [
        (module, vars(module)["generation_config"])
        for module in model.modules()
        if "generation_config" in vars(module)
    ]
    try:
        for module, _ in configs:
            module.generation_config = config
        model.eval()
        yield
    finally:
        for module, kept in configs:
            module.generation_config = kept
        for module, training in modes:
            module.training = training


def _generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    config: GenerationConfig,
    decoding: Decoding,
    seeds: list[int],
    stream: TextStream | None,
) -> list[tuple[list[int], str]]:
    """New tokens of each prompt up to and with what ended them, and what that was."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), config.pad_token_id, dtype=torch.long)
    # The mask comes from the lengths: a prompt may hold the padding token as a real one.
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    stops = StopTexts(tokenizer, decoding.stop, width)
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=config,
        logits_processor=decoding.build_processors(
            [len(ids) for ids in prompts], seeds, model.device
        ),
        stopping_criteria=StoppingCriteriaList([stops] if decoding.stop else []),
        streamer=stream,
    )
    eos_ids = set(config.eos_token_id or ())
    return [
        _find_end(ids, eos_ids, stops.ends.get(row))
        for row, ids in enumerate(output[:, width:].tolist())
    ]


def _find_end(ids: list[int], eos_ids: set[int], stop: int | None) -> tuple[list[int], str]:
    """Without the padding that follows a finished row, and why it finished."""
    ids = ids[:stop]
    end = next((position for position, token in enumerate(ids) if token in eos_ids), None)
    if end is None:
        return ids, "length" if stop is None else "stop"
    return ids[: end + 1], "stop"
