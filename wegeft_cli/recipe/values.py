"""What each value of a recipe may be by itself: closed choices and ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from wegeft_cli.recipe.keys import find_nearest, parse_key
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.unsupported import explain_engine

Fault: TypeAlias = tuple[str, str, str | None]
"""Key, message, hint."""

CLASS_METRICS = ("accuracy", "f1", "f1_macro", "matthews_correlation")
REGRESSION_METRICS = ("pearson", "spearmanr")
METRICS = (*CLASS_METRICS, *REGRESSION_METRICS)
"""What `eval.metric` may name; higher is better in all of them."""

PEFT_TYPES = (
    "lora", "dora", "rslora", "pissa", "adalora", "ia3", "vera", "loha", "lokr", "oft", "boft",
    "hra", "fourierft", "vblora", "randlora", "c3a", "miss", "road", "delora", "waveft",
)  # fmt: skip
"""PEFT's methods that adapt linears by name: what `adapter.type` can be beside wegeft."""

INPLACE_TYPES = ("full", "bitfit", "linear_probe")
"""Methods that train some of the base's own parameters, or all of them."""

CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("causal_lm", "sequence_classification", "image_classification"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.quant_method": ("bitsandbytes", "torchao"),
    "adapter.type": ("wegeft", *INPLACE_TYPES, *PEFT_TYPES),
    "adapter.share": ("module_type", "input_dim", "none"),
    "adapter.side": ("input", "output"),
    "adapter.init": ("phi_zero", "psi_zero"),
    "adapter.view": ("auto", "activation", "weight"),
    "data.train[].format": (
        "auto", "instruction", "prompt_completion", "messages", "conversations", "text",
        "metamath", "codefeedback", "wizardlm",
    ),
    "data.loss_on": ("completion", "assistant", "all"),
    "data.packing": ("none", "bfd"),
    "data.problem_type": ("single_label_classification", "regression"),
    "data.image_transform": ("crop_flip", "crop", "resize"),
    "train.lr_scheduler_type": (
        "linear", "cosine", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
        "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "warmup_stable_decay",
    ),
    "train.optim": (
        "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop",
        "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
        "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
        "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
        "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    ),
    "train.mixed_precision": ("none", "bf16", "fp16"),
    "train.strategy": ("replicated", "fsdp2", "hsdp"),
    "eval.metric": ("auto", *METRICS),
}  # fmt: skip
"""Closed choices by key; `[]` stands for every position of a list."""
CHOICES["data.validation[].format"] = CHOICES["data.train[].format"]
CHOICES["data.test[].format"] = CHOICES["data.train[].format"]

OPTIMIZERS_ELSEWHERE: dict[str, str] = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_apex_fused": "apex",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "galore_adamw": "galore_torch",
    "galore_adamw_8bit": "galore_torch",
    "galore_adafactor": "galore_torch",
    "galore_adamw_layerwise": "galore_torch",
    "galore_adamw_8bit_layerwise": "galore_torch",
    "galore_adafactor_layerwise": "galore_torch",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free_radam": "schedulefree",
    "schedule_free_adamw": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "apollo_adamw": "apollo_torch",
    "apollo_adamw_layerwise": "apollo_torch",
    "stable_adamw": "torch_optimi",
}
"""Transformers' names of optimizers that this version does not build: name -> package needed."""

PACKING_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Attention kernels (transformers' names) that tell packed rows apart by their positions."""
"""Key, message, hint."""

_Range: TypeAlias = tuple[str, Callable[[float], bool]]

_COUNT: _Range = ("at least 1", lambda value: value >= 1)
_ABOVE_ZERO: _Range = ("above 0", lambda value: value > 0)
_NOT_NEGATIVE: _Range = ("at least 0", lambda value: value >= 0)
_SHARE: _Range = ("between 0 and 1", lambda value: 0 <= value <= 1)
_BELOW_ONE: _Range = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_EVERY: _Range = (
    "0, a share of the steps below 1, or a whole number of steps",
    lambda value: 0 <= value < 1 or (value >= 1 and value == int(value)),
)
_RANGES: dict[str, _Range] = {
    "seed": ("between 0 and 4294967295", lambda value: 0 <= value < 2**32),
    "adapter.r": _COUNT,
    "adapter.alpha": _ABOVE_ZERO,
    "adapter.dropout": _BELOW_ONE,
    "data.train[].limit": _COUNT,
    "data.validation[].limit": _COUNT,
    "data.test[].limit": _COUNT,
    "data.image_size": _COUNT,
    "model.drop_path_rate": _BELOW_ONE,
    "data.validation_fraction": _BELOW_ONE,
    "data.max_length": _COUNT,
    "data.train[].weight": _ABOVE_ZERO,
    "data.shuffle_buffer_size": _COUNT,
    "train.per_device_train_batch_size": _COUNT,
    "train.per_device_eval_batch_size": _COUNT,
    "train.gradient_accumulation_steps": _COUNT,
    "train.num_train_epochs": _ABOVE_ZERO,
    "train.max_steps": ("-1 or at least 1", lambda value: value == -1 or value >= 1),
    "train.learning_rate": _ABOVE_ZERO,
    "train.lr_ratio": _ABOVE_ZERO,
    "train.neftune_noise_alpha": _ABOVE_ZERO,
    "train.ema_decay": ("above 0 and below 1", lambda value: 0 < value < 1),
    "train.max_skipped_steps": _NOT_NEGATIVE,
    "train.warmup_ratio": _SHARE,
    "train.warmup_steps": _NOT_NEGATIVE,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.max_grad_norm": _NOT_NEGATIVE,
    "train.adam_beta1": _BELOW_ONE,
    "train.adam_beta2": _BELOW_ONE,
    "train.adam_epsilon": _ABOVE_ZERO,
    "train.eval_steps": _EVERY,
    "train.save_steps": _EVERY,
    "train.save_total_limit": _COUNT,
    "train.ddp_timeout": _COUNT,
    "train.fsdp_size": _COUNT,
    "train.check_steps": _NOT_NEGATIVE,
    "train.logging_steps": _COUNT,
    "train.early_stopping_patience": _COUNT,
    "eval.batch_size": _COUNT,
    "eval.max_new_tokens": _COUNT,
    "eval.limit": _COUNT,
}


def find_values(recipe: Recipe, pattern: str) -> Iterator[tuple[str, Any]]:
    """Go through the values that a key pattern stands for, with their keys.

    Args:
        recipe: The typed recipe.
        pattern: A dotted key; `[]` stands for every entry of a list.

    Yields:
        Each key with its value.
    """
    if "[]" not in pattern:
        yield pattern, _get_value(recipe, pattern)
        return
    head, _, name = pattern.partition("[].")
    for position, item in enumerate(_get_value(recipe, head)):
        yield f"{head}[{position}].{name}", getattr(item, name)


def _get_value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in parse_key(key):
        value = getattr(value, str(part))
    return value


def check_values(recipe: Recipe) -> Iterator[Fault]:
    """Check choices and ranges, each by itself.

    Args:
        recipe: The typed recipe.

    Yields:
        Key, message and hint of each value that is none of its choices or out of its range.
    """
    for pattern, choices in CHOICES.items():
        for key, value in find_values(recipe, pattern):
            if key == "train.optim" and value in OPTIMIZERS_ELSEWHERE:
                package = OPTIMIZERS_ELSEWHERE[value]
                message = f"`{value}` is a transformers name that needs {package}; it is not "
                yield key, message + "available in this version", f"use one of {', '.join(choices)}"
            elif key == "train.strategy" and (refused := explain_engine(value)) is not None:
                reason, _ = refused
                yield key, f"`{value}` is refused: {reason}", f"use one of {', '.join(choices)}"
            elif value not in choices:
                near = find_nearest(value, choices)
                hint = f"did you mean `{near}`?" if near else None
                yield key, f"must be one of {', '.join(choices)}; got {value!r}", hint
    for pattern, (words, holds) in _RANGES.items():
        for key, value in find_values(recipe, pattern):
            if value is not None and not holds(value):
                yield key, f"must be {words}; got {value}", None


"""Key, message, hint."""
