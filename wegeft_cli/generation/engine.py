"""Prompts become texts: batches that stay full, every setting explicit, every row as if alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from wegeft_cli.errors import UserError
from wegeft_cli.generation.completion import Generations, Written, decode_answer
from wegeft_cli.generation.continuous_batching import Writer
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.kv_cache import Reading
from wegeft_cli.generation.stopping import find_end_ids
from wegeft_cli.generation.streaming import TextStream


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    decoding: Decoding | None = None,
    numbers: Sequence[int] | None = None,
    add_special_tokens: bool = True,
    turn_ends: Sequence[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
    on_written: Callable[[Mapping[int, Written]], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    reading: Reading | None = None,
) -> Generations:
    """Continue the prompts; each text is what its prompt alone would give.

    The longest prompts go first, so that a batch too large for the memory fails at once, and rows
    of about one length stand together. An answer that has ended leaves the batch and a waiting
    prompt takes its place (`rounds.py`); beams, and models whose cache cannot be parted, go batch
    by batch. A prompt that leaves no room for the answer in the model's context loses tokens from
    its left, after the begin-of-text token; `settings["num_truncated_prompts"]` counts these. The
    model's own generation config is put aside meanwhile: transformers would fill the gaps of ours
    from it, and so let a hub file switch on a repetition penalty. Config, training mode and
    tokenizer are left as they were.

    Args:
        model: A transformers causal language model, on any device.
        tokenizer: Its tokenizer; a missing padding token is no hindrance.
        prompts: Texts.
        batch_size: Prompts at a time, at least 1.
        max_new_tokens: Longest answer of greedy decoding, at least 1; or give `decoding`.
        decoding: How to write; None is greedy.
        numbers: Each prompt's number, which with the seed gives its stream of draws; None counts
            the prompts. Two answers to one prompt need two numbers.
        add_special_tokens: Encode them with the special tokens that the tokenizer adds by itself;
            off for what a chat template wrote, which holds them already.
        turn_ends: Tokens that end a turn in the template that wrote the prompts; they end an
            answer besides the tokenizer's end of text and those of the model's generation config.
        on_progress: Called with (prompts done, prompts in all) whenever some are done.
        on_written: Called with answers as they come: place of the prompt -> answer.
        on_text: Takes the text of a single prompt piece by piece, as it is written.
        reading: What this same model has read before, of which a single prompt may be the
            continuation; what it reads now is left there. Nothing is kept where the model's cache
            does not hold every position.

    Returns:
        The texts and the resolved settings.

    Raises:
        UserError: If a number is out of range, a prompt has no tokens, or the answer alone fills
            the model's context.
    """
    if decoding is None:
        if max_new_tokens is None:
            raise TypeError("give max_new_tokens or decoding")
        decoding = Decoding(max_new_tokens)
    if batch_size < 1:
        raise UserError(f"{batch_size} is too small", key="batch_size", hint="give 1 or more")
    if len(prompts) != 1 and (on_text is not None or reading is not None):
        raise ValueError(f"{len(prompts)} prompts: one at a time is streamed, or goes on")
    encoded = []
    if prompts:
        told = tokenizer(list(prompts), add_special_tokens=add_special_tokens)
        encoded = [list(ids) for ids in told["input_ids"]]
    prompt_ids, truncated = fit_context(model, tokenizer, encoded, decoding)
    end_ids = find_end_ids(model, tokenizer, decoding, turn_ends)
    config = _build_config(tokenizer, decoding, end_ids)
    stream = None if on_text is None else TextStream(tokenizer, decoding.stop, on_text)
    written: dict[int, Written] = {}
    order = sorted(range(len(prompts)), key=lambda index: -len(prompt_ids[index]))
    writer = Writer(model, tokenizer, config, decoding, prompt_ids, numbers, stream, reading)
    with _generating(model, config):
        for ended in writer.run(order, batch_size):
            answers = {
                index: decode_answer(
                    tokenizer,
                    prompt_ids[index],
                    ids,
                    decoding.stop,
                    is_truncated=truncated[index],
                    has_ended=ids[-1] in end_ids,
                )
                for index, ids in ended.items()
            }
            written |= answers
            if on_written is not None:
                on_written(answers)
            if on_progress is not None:
                on_progress(len(written), len(prompts))
    if stream is not None:
        stream.finish(written[0].new_text)
    return Generations(
        [written[index] for index in range(len(prompts))],
        {
            **decoding.settings(),
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "padding_side": "left",
            "batch_size": batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_truncated_prompts": sum(truncated),
        },
    )


def fit_context(
    model: Any, tokenizer: Any, encoded: list[list[int]], decoding: Decoding
) -> tuple[list[list[int]], list[bool]]:
    """The prompts, cut where protocol, context or answer demand it, and whether each was cut.

    Args:
        model: Its config tells the context.
        tokenizer: Its begin-of-text token stays where the left is cut.
        encoded: The prompts' tokens.
        decoding: Tells the longest prompt and answer.

    Returns:
        The prompts, and for each whether it lost tokens.

    Raises:
        UserError: If a prompt has no tokens, or the answer alone fills the context.
    """
    empty = [index for index, ids in enumerate(encoded) if not ids]
    if empty:
        raise UserError(f"prompt {empty[0]} has no tokens", hint="give at least one character")
    fitted = [ids[: decoding.max_prompt_tokens] for ids in encoded]
    context = find_context(model)
    if context is not None:
        room = context - decoding.max_new_tokens
        if room < 1:
            raise UserError(
                f"{decoding.max_new_tokens} new tokens leave no room for a prompt: the model reads "
                f"{context}",
                key="max_new_tokens",
                hint=f"give at most {context - 1}",
            )
        fitted = [
            ids if len(ids) <= room else _cut_left(ids, room, tokenizer.bos_token_id)
            for ids in fitted
        ]
    return fitted, [len(ids) < len(whole) for ids, whole in zip(fitted, encoded, strict=True)]


def find_context(model: Any) -> int | None:
    """How many tokens a model reads, answer included; None where nothing bounds them."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _cut_left(ids: list[int], room: int, bos_token_id: int | None) -> list[int]:
    if ids[0] == bos_token_id and room > 1:
        return [ids[0], *ids[-(room - 1) :]]
    return ids[-room:]


def _build_config(tokenizer: Any, decoding: Decoding, end_ids: list[int]) -> GenerationConfig:
    """Nothing is left open that a model's own config could fill; draws are made in `RowWise`."""
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        # For padding only, which the attention mask hides: any token that exists would do.
        pad_token_id = end_ids[0] if end_ids else 0
    return GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=end_ids or None,
        pad_token_id=pad_token_id,
        use_cache=True,
        return_dict_in_generate=True,
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
