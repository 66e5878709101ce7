"""Prompts become texts: greedy, in left-padded batches, with every setting explicit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from wegeft_cli.errors import UserError


@dataclass(frozen=True)
class Generations:
    """What a model wrote, in the order of the prompts."""

    texts: list[str]
    """Prompt and new tokens decoded together, without special tokens."""
    new_texts: list[str]
    """The new tokens alone, without special tokens."""
    new_ids: list[list[int]]
    """The new tokens, up to and with the first end-of-text token."""
    settings: dict[str, Any]
    """All that the texts depend on besides model and prompts, as JSON values."""

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
) -> Generations:
    """Continue the prompts greedily; each text is what its prompt alone would give.

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

    Returns:
        The texts and the resolved settings.

    Raises:
        UserError: If a number is out of range, a prompt has no tokens, or the answer alone fills
            the model's context.
    """
    for key, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{value} is too small", key=key, hint="give 1 or more")
    encoded = []
    if prompts:
        told = tokenizer(list(prompts), add_special_tokens=add_special_tokens)
        encoded = [list(ids) for ids in told["input_ids"]]
    prompt_ids, num_truncated = _fit_context(model, tokenizer, encoded, max_new_tokens)
    config = _build_config(model, tokenizer, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompt_ids[index]))
    new_ids: list[list[int]] = [[] for _ in prompts]
    with _generating(model, config):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            answers = _generate_batch(model, [prompt_ids[index] for index in batch], config)
            for index, ids in zip(batch, answers, strict=True):
                new_ids[index] = ids
            if on_progress is not None:
                on_progress(start + len(batch), len(order))
    full_ids = [prompt + new for prompt, new in zip(prompt_ids, new_ids, strict=True)]
    return Generations(
        texts=[tokenizer.decode(ids, skip_special_tokens=True) for ids in full_ids],
        new_texts=[tokenizer.decode(ids, skip_special_tokens=True) for ids in new_ids],
        new_ids=new_ids,
        settings={
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "padding_side": "left",
            "batch_size": batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_truncated_prompts": num_truncated,
        },
    )


def _fit_context(
    model: Any, tokenizer: Any, encoded: list[list[int]], max_new_tokens: int
) -> tuple[list[list[int]], int]:
    """The prompts, cut from the left where context or answer demand it, and how many were cut."""
    empty = [index for index, ids in enumerate(encoded) if not ids]
    if empty:
        raise UserError(f"prompt {empty[0]} has no tokens", hint="give at least one character")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return encoded, 0
    room = context - max_new_tokens
    if room < 1:
        raise UserError(
            f"{max_new_tokens} new tokens leave no room for a prompt: the model reads {context}",
            key="max_new_tokens",
            hint=f"give at most {context - 1}",
        )
    fitted = [
        ids if len(ids) <= room else _cut_left(ids, room, tokenizer.bos_token_id) for ids in encoded
    ]
    return fitted, sum(len(ids) > room for ids in encoded)


def _cut_left(ids: list[int], room: int, bos_token_id: int | None) -> list[int]:
    if ids[0] == bos_token_id and room > 1:
        return [ids[0], *ids[-(room - 1) :]]
    return ids[-room:]


def _build_config(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding with nothing left open that a model's own config could fill."""
    eos_token_id = tokenizer.eos_token_id
    if eos_token_id is None:
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
    model: Any, prompts: list[list[int]], config: GenerationConfig
) -> list[list[int]]:
    """New tokens of each prompt, up to and with the first end-of-text token."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), config.pad_token_id, dtype=torch.long)
    # The mask comes from the lengths: a prompt may hold the padding token as a real one.
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=config,
    )
    eos_ids = set(config.eos_token_id or ())
    return [_until_eos(ids, eos_ids) for ids in output[:, width:].tolist()]


def _until_eos(ids: list[int], eos_ids: set[int]) -> list[int]:
    """Without the padding that follows a finished row."""
    end = next((position for position, token in enumerate(ids) if token in eos_ids), len(ids))
    return ids[: end + 1]
