"""vLLM as the engine of an evaluation: our prompts as tokens in, its tokens out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.lora_files import SERVED_RANKS
from wegeft_cli.errors import UserError
from wegeft_cli.generation.completion import Generations, Written, decode_answer
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import fit_context
from wegeft_cli.generation.sampling import stream_seed
from wegeft_cli.generation.stopping import find_end_ids

_AT_ONCE = 1024  # vLLM schedules by itself; this many answers are lost at most by a kill


class VllmModel:
    """A base in vLLM, with or without a LoRA adapter.

    Args:
        config: The base's transformers config.
        generation_config: Its generation config, which may name tokens that end an answer.
        dtype: Of the weights, as vLLM is told: auto, float32, bfloat16, float16.
        llm: vLLM's engine.
        lora: The adapter that every request names; None asks the base.
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
        """The base alone, in the same engine."""
        return VllmModel(self.config, self.generation_config, self.dtype, self.llm, None)


def open_model(
    name_or_path: str,
    *,
    config: Any,
    generation_config: Any,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    lora_dir: Path | None = None,
    rank: int | None = None,
) -> VllmModel:
    """Start vLLM's engine on a base.

    Args:
        name_or_path: Folder or hub id.
        config: Its transformers config.
        generation_config: Its generation config.
        dtype: Type of the weights.
        revision: Hub revision.
        trust_remote_code: Run code that comes with the model.
        lora_dir: A LoRA adapter in PEFT's format.
        rank: Its rank.

    Returns:
        The model.

    Raises:
        UserError: If vLLM is not installed, or makes no room for such a rank.
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
    told: dict[str, Any] = {
        "model": name_or_path,
        "tokenizer": name_or_path,
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        # A hub's generation_config.json would add defaults of its own; its end tokens are named
        # with each prompt, where the protocol ends at them.
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
        told |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
        lora = LoRARequest("wegeft", 1, str(lora_dir))
    return VllmModel(config, generation_config, dtype, LLM(**told), lora)


def write_texts(
    model: VllmModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int,
    decoding: Decoding,
    numbers: Sequence[int] | None = None,
    add_special_tokens: bool = True,
    turn_ends: Sequence[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
    on_written: Callable[[Mapping[int, Written]], None] | None = None,
) -> Generations:
    """Continue prompts in vLLM, as `generate_texts` does in transformers.

    The engine is given tokens, so that templates, cuts and special tokens are those of the other
    engine.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Texts.
        batch_size: Only told: vLLM schedules by itself.
        decoding: How to write.
        numbers: Each prompt's number, of which its seed is made; None counts the prompts.
        add_special_tokens: Encode prompts with the tokenizer's own special tokens.
        turn_ends: Tokens that end a turn in the template that wrote the prompts.
        on_progress: Called with (prompts done, prompts in all).
        on_written: Called with answers as they come: place of the prompt -> answer.

    Returns:
        The texts and the settings.

    Raises:
        UserError: If the protocol writes in a way that vLLM does not have.
    """
    end_ids = find_end_ids(model, tokenizer, decoding, turn_ends)
    params = _sampling_params(
        decoding, numbers if numbers is not None else range(len(prompts)), end_ids
    )
    encoded = []
    if prompts:
        told = tokenizer(list(prompts), add_special_tokens=add_special_tokens)
        encoded = [list(ids) for ids in told["input_ids"]]
    prompt_ids, truncated = fit_context(model, tokenizer, encoded, decoding)
    written: dict[int, Written] = {}
    for start in range(0, len(prompts), _AT_ONCE):
        places = range(start, min(start + _AT_ONCE, len(prompts)))
        outputs = model.llm.generate(
            [{"prompt_token_ids": prompt_ids[place]} for place in places],
            [params[place] for place in places],
            lora_request=model.lora,
            use_tqdm=False,
        )
        answers = {}
        for place, output in zip(places, outputs, strict=True):
            ids = list(output.outputs[0].token_ids)
            answers[place] = decode_answer(
                tokenizer,
                prompt_ids[place],
                ids,
                decoding.stop,
                is_truncated=truncated[place],
                has_ended=output.outputs[0].finish_reason == "stop",
            )
        written |= answers
        if on_written is not None:
            on_written(answers)
        if on_progress is not None:
            on_progress(len(written), len(prompts))
    return Generations(
        [written[place] for place in range(len(prompts))],
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
    decoding: Decoding, numbers: Sequence[int], end_ids: Sequence[int]
) -> list[Any]:
    """One set of parameters a prompt: each draws from a stream of its own."""
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
            f"this protocol writes with {' and '.join(unknown)}, which vLLM's engine does not have",
            key="--backend",
            hint="leave --backend out",
        )
    from vllm import SamplingParams

    told: dict[str, Any] = {
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
        return [SamplingParams(**told)] * len(numbers)
    return [SamplingParams(**told, seed=stream_seed(decoding.seed, number)) for number in numbers]
