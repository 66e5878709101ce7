"""Unsupported distributed backends and their settings, with the reason and the alternative.

The reasons are explained in docs/decisions/0014-engines-that-are-refused.md.
"""

from __future__ import annotations

_NEVER_WRAPPED = (
    "the model is never wrapped in DDP: the gradients of factors that layers share are summed once "
    "per step"
)
_SHARED = "`train.strategy: fsdp2` shares a base that does not fit"
_REENTRANT = (
    "reentrant checkpointing silently computes wrong gradients for factors that layers share; "
    "checkpointing is never reentrant here",
    "remove it: `train.gradient_checkpointing: true` is the only setting",
)
_DDP = (_NEVER_WRAPPED, "remove it: there is nothing to set")
_STATIC = (
    "torch's static graph fails with accumulation and does not sum the gradients of factors that "
    "layers share; " + _NEVER_WRAPPED,
    _DDP[1],
)
_ZERO = (
    "DeepSpeed's ZeRO reduces the gradient of a shared factor after the first layer that uses it",
    f"remove it: {_SHARED}",
)
_FSDP = (
    "FSDP as configured by Trainer and Accelerate shards the factors with the base, in every layer "
    "that uses them",
    f"remove it: {_SHARED}, `train.fsdp_size` sets the number of processes",
)
_FORGETS = (
    "FSDP's own activation checkpointing does not restore the random state: with dropout its "
    "gradients are silently wrong",
    "use `train.gradient_checkpointing: true`",
)
_SPLIT = (
    "a layer split over processes sees a part of its inputs, and the factors need all of it",
    f"remove it: {_SHARED}",
)

_REASONS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("use_reentrant", "reentrant", "gradient_checkpointing_kwargs"), _REENTRANT),
    **dict.fromkeys(("gradient_checkpointing_use_reentrant", "activation_checkpointing_kwargs"),
                    _REENTRANT),
    **dict.fromkeys(("static_graph", "ddp_static_graph"), _STATIC),
    **dict.fromkeys(("ddp", "ddp_config", "ddp_kwargs", "ddp_bucket_cap_mb"), _DDP),
    **dict.fromkeys(("find_unused_parameters", "ddp_find_unused_parameters"), _DDP),
    **dict.fromkeys(("broadcast_buffers", "ddp_broadcast_buffers", "gradient_as_bucket_view"),
                    _DDP),
    **dict.fromkeys(("deepspeed", "deepspeed_config", "deepspeed_plugin"), _ZERO),
    **dict.fromkeys(("zero", "zero1", "zero2", "zero3", "zero_stage", "zero_optimization"), _ZERO),
    **dict.fromkeys(("fsdp", "fsdp1", "fsdp_config", "fsdp_plugin", "fsdp_version"), _FSDP),
    **dict.fromkeys(("fsdp_sharding_strategy", "fsdp_auto_wrap_policy", "fsdp_state_dict_type"),
                    _FSDP),
    **dict.fromkeys(("fsdp_transformer_layer_cls_to_wrap", "fsdp_min_num_params"), _FSDP),
    **dict.fromkeys(("fsdp_use_orig_params", "fsdp_final_state_dict_type"), _FSDP),
    "fsdp_activation_checkpointing": _FORGETS,
    **dict.fromkeys(("tensor_parallel", "tensor_parallel_size", "tp", "tp_size"), _SPLIT),
    **dict.fromkeys(("megatron_lm", "parallelism_config"), _SPLIT),
}  # fmt: skip


def explain_unsupported(name: str) -> tuple[str, str] | None:
    """Return why a backend or one of its settings is not supported, and the alternative.

    `name` is a key without its section or a value of `train.strategy`, as other tools spell it.
    Return None for any other name.
    """
    return _REASONS.get(name.lower().replace("-", "_"))
