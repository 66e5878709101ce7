"""Generation with vLLM, as an alternative to transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.served_ranks import SERVED_RANKS
from wegeft_cli.errors import UserError
from wegeft_cli.generation.completion import Completion, GenerationResult, decode_completion
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import NO_EVENTS, GenerationEvents, Prompts, fit_context
from wegeft_cli.generation.sampling import sample_seed
from wegeft_cli.generation.stopping import stop_token_ids

_AT_ONCE = 1024  # vLLM schedules by itself; a kill loses at most this many answers


class VllmModel:
    """A base in vLLM, with or without a LoRA adapter.

    Args:
        config: The base's transformers config.
        generation_config: Its generation config, which may list stop tokens.
        dtype: Type of the weights as vLLM names it.
        llm: vLLM's engine.
        lora: The adapter of every request; None is the base.
    """

    def __init__(
        self, config: Any, generation_config: Any, dtype: str, llm: Any, lora: Any | None
    ) -> None:
        self.config = config
        self.generation_config = generation_config
        self.dtype = dtype
        self.llm = llm
        self.lora = lora

    def without_lora(self) -> VllmModel:
        """Return the base alone, in the same engine."""
        return VllmModel(self.config, self.generation_config, self.dtype, self.llm, None)


def open_model(
    name_or_path: str,
    *,
    config: Any,
    generation_config: Any,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    lora_dir: Path | None = None,
    rank: int | None = None,
) -> VllmModel:
    """Start vLLM's engine on a base, with a PEFT LoRA adapter of a rank if one is given.

    Raises:
        UserError: If vLLM is not installed, or does not support the rank.
    """
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError(
            f"vLLM is not installed: {error}",
            key="--backend",
            hint="pip install 'wegeft-cli[vllm]', on a machine with a GPU",
        ) from error
    params: dict[str, Any] = {
        "model": name_or_path,
        "tokenizer": name_or_path,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        # Not the hub's generation_config.json, which adds defaults. Its stop tokens are passed with
        # each prompt.
        "generation_config": "vllm",
        "seed": 0,
    }
    lora = None
    if lora_dir is not None:
        room = next((size for size in SERVED_RANKS if size >= (rank or 1)), None)
        if room is None:
            raise UserError(
                f"vLLM serves ranks up to {SERVED_RANKS[-1]}, and this adapter has {rank}",
                key="--backend",
                hint="use the transformers backend, or merge the adapter first",
            )
        params |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
        lora = LoRARequest("wegeft", 1, str(lora_dir))
    return VllmModel(config, generation_config, dtype, LLM(**params), lora)


def check_decoding(decoding: Decoding, protocol: str = "this protocol") -> None:
    """Raise UserError for a way of decoding that vLLM does not have."""
    unknown = [
        words
        for words, is_asked in (
            (f"{decoding.num_beams} beams", decoding.num_beams > 1),
            ("no_repeat_ngram_size", decoding.no_repeat_ngram_size > 0),
        )
        if is_asked
    ]
    if unknown:
        raise UserError(
            f"{protocol} uses {' and '.join(unknown)}, which vLLM does not support",
            key="--backend",
            hint="leave --backend out",
        )


def generate_in_vllm(
    model: VllmModel,
    tokenizer: Any,
    prompts: Prompts,
    decoding: Decoding,
    *,
    batch_size: int,
    events: GenerationEvents = NO_EVENTS,
) -> GenerationResult:
    """Continue prompts in vLLM; arguments and result as of `engine.generate_texts`.

    The engine gets tokens, so that templates, truncation and special tokens are the same as in
    transformers. `batch_size` is only recorded: vLLM schedules by itself.
    """
    end_ids = stop_token_ids(model, tokenizer, decoding, prompts.end_of_turn_ids)
    total = len(prompts.texts)
    sample_ids = range(total) if prompts.sample_ids is None else prompts.sample_ids
    params = _sampling_params(decoding, sample_ids, end_ids)
    prompt_ids, truncated = fit_context(model, tokenizer, prompts.encode(tokenizer), decoding)
    completions: dict[int, Completion] = {}
    for start in range(0, total, _AT_ONCE):
        places = range(start, min(start + _AT_ONCE, total))
        outputs = model.llm.generate(
            [{"prompt_token_ids": prompt_ids[place]} for place in places],
            [params[place] for place in places],
            lora_request=model.lora,
            use_tqdm=False,
        )
        new = {
            place: decode_completion(
                tokenizer,
                prompt_ids[place],
                list(output.outputs[0].token_ids),
                decoding.stop,
                is_truncated=truncated[place],
                has_ended=output.outputs[0].finish_reason == "stop",
            )
            for place, output in zip(places, outputs, strict=True)
        }
        completions |= new
        events.report(new, len(completions), total)
    return GenerationResult(
        [completions[place] for place in range(total)],
        {
            **decoding.settings(),
            "engine": "vllm",
            "eos_token_id": end_ids or None,
            "dtype": model.dtype,
            "batch_size": batch_size,
            "num_truncated_prompts": sum(truncated),
        },
    )


def _sampling_params(
    decoding: Decoding, sample_ids: Sequence[int], end_ids: Sequence[int]
) -> list[Any]:
    """Return each prompt's sampling parameters; each has its own random stream."""
    check_decoding(decoding)
    from vllm import SamplingParams

    params: dict[str, Any] = {
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "min_p": decoding.min_p,
        "repetition_penalty": decoding.repetition_penalty,
        "stop": list(decoding.stop),
        "stop_token_ids": list(end_ids),
    }
    if not decoding.do_sample:
        return [SamplingParams(**params)] * len(sample_ids)
    return [SamplingParams(**params, seed=sample_seed(decoding.seed, n)) for n in sample_ids]
