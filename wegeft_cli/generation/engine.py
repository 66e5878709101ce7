"""Generation with transformers: explicit settings, and each row as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from wegeft_cli.data.batches.lockstep import is_sharded
from wegeft_cli.errors import UserError
from wegeft_cli.generation.completion import Completion, GenerationResult, decode_completion
from wegeft_cli.generation.continuous_batching import BatchScheduler
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.kv_cache import PrefixCache
from wegeft_cli.generation.padding_check import NOTES, find_batching
from wegeft_cli.generation.stopping import stop_token_ids
from wegeft_cli.generation.streaming import TextStreamer
from wegeft_cli.models.context import check_token_ids, find_context, fitting_pad_id


@dataclass(frozen=True)
class Prompts:
    """Texts to continue.

    Args:
        texts: The texts.
        sample_ids: Each prompt's sample id. Default: its position. Two answers to one prompt need
            two ids.
        add_special_tokens: Whether the tokenizer adds its special tokens; off for the text of a
            chat template, which contains them already.
        end_of_turn_ids: Tokens that end a turn in the chat template. They end an answer too.
        use_rows: Called with the positions of a batch's prompts; the batch runs in its context.
    """

    texts: Sequence[str]
    sample_ids: Sequence[int] | None = None
    add_special_tokens: bool = True
    end_of_turn_ids: Sequence[int] = ()
    use_rows: Callable[[Sequence[int]], AbstractContextManager[None]] | None = None

    def encode(self, tokenizer: Any) -> list[list[int]]:
        """Return the tokens of each text."""
        if not self.texts:
            return []
        encoded = tokenizer(list(self.texts), add_special_tokens=self.add_special_tokens)
        return [list(ids) for ids in encoded["input_ids"]]


@dataclass(frozen=True)
class GenerationEvents:
    """Callbacks of a generation.

    Args:
        on_progress: Called with (prompts done, prompts in all) whenever some are done.
        on_completed: Called with {position of the prompt: its completion} as answers end.
        on_text: Called with the text of a single prompt piece by piece.
    """

    on_progress: Callable[[int, int], None] | None = None
    on_completed: Callable[[Mapping[int, Completion]], None] | None = None
    on_text: Callable[[str], None] | None = None

    def report(self, completions: Mapping[int, Completion], done: int, total: int) -> None:
        """Call `on_completed` and `on_progress`."""
        if self.on_completed is not None:
            self.on_completed(completions)
        if self.on_progress is not None:
            self.on_progress(done, total)


NO_EVENTS = GenerationEvents()


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Prompts | Sequence[str],
    decoding: Decoding,
    *,
    batch_size: int,
    events: GenerationEvents = NO_EVENTS,
    prefix_cache: PrefixCache | None = None,
) -> GenerationResult:
    """Continue the prompts; each answer is the one that its prompt alone would get.

    The longest prompts go first, so that a batch that is too large for the memory fails at once.
    Finished answers leave their batch (`continuous_batching`). A model whose answers depend on
    padding gets batches of equal lengths, or of one prompt (`padding_check`).

    A prompt that leaves no room for the answer in the model's context loses tokens from its left,
    after the begin-of-text token; `settings["num_truncated_prompts"]` counts these. The model's own
    generation config is replaced during the call: transformers would fill gaps from it, such as a
    repetition penalty. Config, training mode and tokenizer are restored.

    Args:
        batch_size: Prompts at a time, at least 1.

    Raises:
        UserError: If a number is out of range, a prompt has no tokens, or the answer alone fills
            the model's context.
    """
    prompts = prompts if isinstance(prompts, Prompts) else Prompts(prompts)
    total = len(prompts.texts)
    if batch_size < 1:
        raise UserError(f"{batch_size} is too small", key="batch_size", hint="give 1 or more")
    if total != 1 and (events.on_text is not None or prefix_cache is not None):
        raise ValueError(f"{total} prompts: streaming and the prefix cache take one")
    prompt_ids, truncated = fit_context(model, tokenizer, prompts.encode(tokenizer), decoding)
    end_ids = stop_token_ids(model, tokenizer, decoding, prompts.end_of_turn_ids)
    config = _build_config(tokenizer, decoding, end_ids)
    config.pad_token_id = fitting_pad_id(model, config.pad_token_id)
    scheduler = BatchScheduler(model, tokenizer, config, decoding, prompt_ids, prompts.sample_ids)
    scheduler.prefix_cache = prefix_cache
    scheduler.use_rows = prompts.use_rows
    if events.on_text is not None:
        scheduler.streamer = TextStreamer(tokenizer, decoding.stop, events.on_text)
    completions: dict[int, Completion] = {}
    order = sorted(range(total), key=lambda index: -len(prompt_ids[index]))
    with _generating(model, config):
        if batch_size > 1 and (total > 1 or is_sharded(model)):
            scheduler.batching = find_batching(model, tokenizer)
        for ended in scheduler.run(order, batch_size):
            new = {
                index: decode_completion(
                    tokenizer,
                    prompt_ids[index],
                    ids,
                    decoding.stop,
                    is_truncated=truncated[index],
                    has_ended=ids[-1] in end_ids,
                )
                for index, ids in ended.items()
            }
            completions |= new
            events.report(new, len(completions), total)
    if scheduler.streamer is not None:
        scheduler.streamer.finish(completions[0].new_text)
    settings = {
        **decoding.settings(),
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "padding_side": "left" if scheduler.batching == "left" else "none",
        "batch_size": 1 if scheduler.batching == "single" else batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_truncated_prompts": sum(truncated),
    }
    answers = [completions[index] for index in range(total)]
    return GenerationResult(answers, settings, NOTES.get(scheduler.batching))


def fit_context(
    model: Any, tokenizer: Any, encoded: list[list[int]], decoding: Decoding
) -> tuple[list[list[int]], list[bool]]:
    """Truncate prompts to the protocol's limit and the model's context.

    Args:
        encoded: The prompts' tokens.

    Raises:
        UserError: If a prompt has no tokens, or the answer alone fills the context.
    """
    empty = [index for index, ids in enumerate(encoded) if not ids]
    if empty:
        raise UserError(f"prompt {empty[0]} has no tokens", hint="give at least one character")
    check_token_ids(model, max((max(ids) for ids in encoded), default=0), key="--prompt")
    fitted = [ids[: decoding.max_prompt_tokens] for ids in encoded]
    context = context_length(model)
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


def context_length(model: Any) -> int | None:
    """Return the model's context length in tokens, answer included; None if unlimited."""
    return find_context(model)


def _cut_left(ids: list[int], room: int, bos_token_id: int | None) -> list[int]:
    if ids[0] == bos_token_id and room > 1:
        return [ids[0], *ids[-(room - 1) :]]
    return ids[-room:]


def _build_config(tokenizer: Any, decoding: Decoding, end_ids: list[int]) -> GenerationConfig:
    """Build a config without gaps that the model's own could fill; `PerSequenceSampler` samples."""
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        # The attention mask hides padding, so any valid token works.
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
    """Set eval mode and `config` alone inside the block; restore both afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    # PEFT's wrappers forward their inner model's config: replace it wherever one is stored.
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
        for module, original in configs:
            module.generation_config = original
        for module, training in modes:
            module.training = training
