"""What PEFT and vLLM read of a LoRA equivalent, checked before one of them reads it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import SAVED_PREFIX, WEIGHTS_NAME
from wegeft_cli.artifacts.served_ranks import SERVED_RANKS
from wegeft_cli.errors import UserError, name_first
from wegeft_cli.methods.lora_equivalent.plan import LoraEquivalent, WrittenPair
from wegeft_cli.storage.json_files import shorten
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

# Starts of PEFT's LoRA that leave the base as it is.
_VLLM_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})

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

    model = _copy_without_memory(equivalent.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = PeftModel.from_pretrained(
                model, str(folder), low_cpu_mem_usage=True, torch_device="cpu"
            )
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _refused(f"PEFT does not read this LoRA: {reason}", adapter_dir) from error
    layers = {
        name: module
        for name, module in loaded.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    tensors = load_tensors(folder / WEIGHTS_NAME)
    lost = [
        pair.member
        for pair in equivalent.written
        if not _holds(layers.get(pair.name), pair, tensors)
    ]
    extra = sorted(layers.keys() - {pair.name for pair in equivalent.written})
    if lost:
        owners = [name for name in extra if not name.endswith(".base_layer")]
        reason = (
            f"it takes their names for those of {name_first(owners, 3)}"
            if owners
            else "they are lost"
        )
        message = f"PEFT does not read the LoRA pairs of {name_first(lost, 3)}: {reason}"
        raise _refused(message, adapter_dir)
    if extra:
        raise _refused(f"PEFT would also adapt {name_first(extra, 3)}", adapter_dir)


def _copy_without_memory(model: nn.Module) -> nn.Module:
    """Copy a model on the meta device to the CPU: each tensor is one zero, repeated by its strides.

    PEFT moves the tensors of an adapter to the device and the type of the base. On the meta device
    they would lose their values, and in bfloat16 their last bits, so the copy is float32.
    """
    model = copy.deepcopy(model)
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_meta:
                continue
            if tensor not in made:
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                zeros = torch.zeros((), dtype=dtype).expand(tensor.shape)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[tensor] = nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros
            owner: Any = module._parameters if name in module._parameters else module._buffers
            owner[name] = made[tensor]
    return model


def _holds(layer: Any, pair: WrittenPair, tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether a layer of PEFT holds exactly the pair of the file."""
    name = pair.name
    if layer is None:
        return False
    if getattr(layer, "parameter_name", "weight") not in ("weight", pair.member.rpartition(".")[2]):
        return False
    for part, modules in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
        stored = tensors[f"{SAVED_PREFIX}{name}.{part}.weight"]
        weight = modules["default"].weight if "default" in modules else None
        if weight is None or not torch.equal(weight.to(stored.dtype), stored):
            return False
    return True


def _refused(message: str, adapter_dir: Path) -> UserError:
    hint = f"{_MERGE}, or write it for another reader: --for vllm"
    return UserError(message, file=str(adapter_dir), hint=hint)


def prepare_for_vllm(equivalent: LoraEquivalent, adapter_dir: Path, *, key: str) -> LoraEquivalent:
    """Return an equivalent with the names by which vLLM knows its layers.

    vLLM renames tensors as those of the base's files. So where the model is only the text model of
    the base, the names are those of the files. `key` is the option that an error names.

    Raises:
        UserError: If vLLM refuses the adapter.
    """
    served = equivalent.architecture
    saved = equivalent.pairs.modules_to_save
    experts = equivalent.experts
    reasons = {
        "it is not known to read the LoRA of stacked experts as PEFT stores it "
        f"({', '.join(experts[:3])})": bool(experts),
        f"it serves {served} without LoRA adapters": served in _VLLM_WITHOUT_LORA,
        f"it reads no modules that were trained whole ({', '.join(saved)})": bool(saved),
        f"it reads no changed biases ({', '.join(sorted(equivalent.pairs.biased)[:3])})": bool(
            equivalent.pairs.biased
        ),
        f"it serves ranks up to {SERVED_RANKS[-1]}": equivalent.rank > SERVED_RANKS[-1],
    }
    _refuse_for_vllm(reasons, adapter_dir, key=key)
    written = [part for pair in equivalent.written for part in _rename(equivalent, pair, served)]
    return replace(equivalent, written=tuple(written), is_for_peft=False)


def check_lora_for_vllm(adapter: Adapter) -> None:
    """Raise UserError for an adapter of PEFT that vLLM refuses, or reads only in part."""
    config = adapter.config
    saved = config.get("modules_to_save")
    start = config.get("init_lora_weights")
    reasons = {
        f"it reads LoRA alone, and this is {shorten(adapter.peft_type)}": (
            adapter.peft_type != "LORA"
        ),
        "it reads no DoRA": bool(config.get("use_dora")),
        f"it reads no modules that were trained whole ({shorten(saved)})": bool(saved),
        "it is not known to read LoRA of parameters as PEFT stores it "
        f"({shorten(config.get('target_parameters'))})": bool(config.get("target_parameters")),
        "it reads no changed biases": (
            bool(config.get("lora_bias")) or config.get("bias", "none") != "none"
        ),
        f"it reads no LoRA that changes its base at the start ({shorten(start)})": (
            isinstance(start, str) and start.lower() not in _VLLM_STARTS
        ),
    }
    _refuse_for_vllm(reasons, adapter.folder, key="--backend")


def _refuse_for_vllm(reasons: Mapping[str, bool], adapter_dir: Path, *, key: str) -> None:
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UserError(
            f"vLLM refuses this adapter: {'; '.join(found)}",
            file=str(adapter_dir),
            key=key,
            hint=_MERGE,
        )


def _rename(equivalent: LoraEquivalent, pair: WrittenPair, served: str) -> list[WrittenPair]:
    name = pair.name
    if equivalent.is_part:
        name = equivalent.file_names.get(f"{name}.weight", name).removesuffix(".weight")
    parent, _, kind = name.rpartition(".")
    parts = _VLLM_PARTS.get(served, {}).get(kind)
    if parts is None:
        return [replace(pair, name=name)]
    size = equivalent.shape_of(pair.member)[0] // len(parts)
    return [
        WrittenPair(f"{parent}.{part}", pair.member, (i * size, (i + 1) * size))
        for i, part in enumerate(parts)
    ]
