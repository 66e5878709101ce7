"""What PEFT and vLLM read of a LoRA equivalent, checked before one of them reads it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.artifacts.adapter_files import SAVED_PREFIX, WEIGHTS_NAME
from wegeft_cli.artifacts.lora_files import SERVED_RANKS
from wegeft_cli.errors import UserError
from wegeft_cli.methods.wegeft.lora_equivalent.plan import LoraEquivalent, WrittenPair
from wegeft_cli.storage.safetensors_reader import load_tensors

# vLLM 0.32. Architectures that it serves without LoRA adapters.
_VLLM_WITHOUT_LORA = frozenset({
    "BloomForCausalLM", "Cohere2MoeForCausalLM", "DbrxForCausalLM", "DeepseekV4ForCausalLM",
    "FalconForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM",
    "Gemma3nForCausalLM", "Gemma3nForConditionalGeneration", "Mamba2ForCausalLM",
    "MambaForCausalLM", "StableLmForCausalLM", "Zamba2ForCausalLM",
})  # fmt: skip
# Fused layers that it knows by the names of their parts, in the order of their rows.
_VLLM_PARTS = {"Glm4ForCausalLM": {"gate_up_proj": ("gate_proj", "up_proj")}}

_MERGE = "merge the adapter: `wegeft merge`"


def check_peft(equivalent: LoraEquivalent, folder: Path, adapter_dir: Path) -> None:
    """Raise UserError unless PEFT puts every written pair on its own layer, and on no other.

    PEFT itself loads the written files onto the base without weights. Nothing is checked where PEFT
    is not installed.
    """
    if find_spec("peft") is None:
        return
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(equivalent.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = PeftModel.from_pretrained(
                model, str(folder), low_cpu_mem_usage=True, torch_device="cpu"
            )
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _unread(equivalent.members, adapter_dir, f"it says: {reason}") from error
    layers = {
        name: module
        for name, module in loaded.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    tensors = load_tensors(folder / WEIGHTS_NAME)
    lost = [name for name in equivalent.members if not _holds(layers.get(name), name, tensors)]
    extra = sorted(layers.keys() - set(equivalent.members))
    if lost:
        where = f"; it puts them on {', '.join(extra[:3])}" if extra else ""
        raise _unread(lost, adapter_dir, f"it rewrites the names of such layers{where}")
    if extra:
        raise _unread(extra, adapter_dir, "it adapts them though the adapter does not")


def _holds(layer: Any, name: str, tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether a layer of PEFT holds exactly the pair of the file."""
    if layer is None:
        return False
    for part, modules in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
        stored = tensors[f"{SAVED_PREFIX}{name}.{part}.weight"]
        weight = modules["default"].weight if "default" in modules else None
        if weight is None or weight.is_meta or not torch.equal(weight.to(stored.dtype), stored):
            return False
    return True


def _unread(names: Any, adapter_dir: Path, reason: str) -> UserError:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return UserError(
        f"PEFT does not read the LoRA pairs of {', '.join(names[:3])}{more}: {reason}",
        file=str(adapter_dir),
        hint=f"{_MERGE}, or write it for another reader: --for vllm",
    )


def prepare_for_vllm(equivalent: LoraEquivalent, adapter_dir: Path, *, key: str) -> LoraEquivalent:
    """Return an equivalent with the names by which vLLM knows its layers.

    `key` is the option that an error names.

    Raises:
        UserError: If vLLM refuses the adapter.
    """
    served = _served_class(equivalent)
    saved = equivalent.files.manifest.modules_to_save
    reasons = {
        f"it serves {served} without LoRA adapters": served in _VLLM_WITHOUT_LORA,
        f"it reads no modules that were trained whole ({', '.join(saved)})": bool(saved),
        f"it reads no changed biases ({', '.join(sorted(equivalent.biased)[:3])})": bool(
            equivalent.biased
        ),
        f"it serves ranks up to {SERVED_RANKS[-1]}": equivalent.rank > SERVED_RANKS[-1],
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UserError(
            f"vLLM refuses this adapter: {'; '.join(found)}",
            file=str(adapter_dir),
            key=key,
            hint=_MERGE,
        )
    written = [part for pair in equivalent.written for part in _split(equivalent, pair, served)]
    return replace(equivalent, written=tuple(written))


def _served_class(equivalent: LoraEquivalent) -> str:
    """Return the architecture that the base's config names, by which vLLM chooses its class."""
    named = getattr(equivalent.model.config, "architectures", None)
    return str(named[0]) if named else type(equivalent.model).__name__


def _split(equivalent: LoraEquivalent, pair: WrittenPair, served: str) -> list[WrittenPair]:
    parent, _, kind = pair.name.rpartition(".")
    parts = _VLLM_PARTS.get(served, {}).get(kind)
    if parts is None:
        return [pair]
    size = equivalent.shape_of(pair.member)[0] // len(parts)
    return [
        WrittenPair(f"{parent}.{part}", pair.member, (i * size, (i + 1) * size))
        for i, part in enumerate(parts)
    ]
