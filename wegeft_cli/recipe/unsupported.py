"""Keys of engines that are refused: why factors that layers share stand none of them, and the way.

The reasons are those of docs/decisions/0014-engines-that-are-refused.md.
"""

from __future__ import annotations

_NEVER_WRAPPED = (
    "the model is never wrapped in DDP: the gradients of factors that layers share are summed once "
    "a step"
)
_SHARED = "`train.strategy: fsdp2` shares a base that does not fit"
_REENTRANT = (
    "reentrant checkpointing gives wrong gradients for factors that layers share, in silence; "
    "checkpointing is never reentrant here",
    "remove it: `train.gradient_checkpointing: true` is all there is to set",
)
_DDP = (_NEVER_WRAPPED, "remove it: there is nothing to set")
_STATIC = (
    "torch's static graph fails with accumulation, and stops summing gradients of factors that "
    "layers share; " + _NEVER_WRAPPED,
    _DDP[1],
)
_ZERO = (
    "DeepSpeed's ZeRO reduces a factor that many layers share when the first of them is done",
    f"remove it: {_SHARED}",
)
_FSDP = (
    "FSDP as Trainer and Accelerate set it up shards the factors with the base, wherever a layer "
    "refers to them",
    f"remove it: {_SHARED}, `train.fsdp_size` over how many processes",
)
_FORGETS = (
    "FSDP's own activation checkpointing forgets the random state: with dropout its gradients are "
    "wrong, in silence",
    "use `train.gradient_checkpointing: true`",
)
_SPLIT = (
    "layers that are split over processes see a part of their inputs, which the factors need whole",
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


def explain_engine(name: str) -> tuple[str, str] | None:
    """Tell why an engine, or a setting of one, is refused.

    Args:
        name: A key without its section, or a value of `train.strategy`, as other tools spell it.

    Returns:
        The reason and what to write instead; None for any other name.
    """
    return _REASONS.get(name.lower().replace("-", "_"))
