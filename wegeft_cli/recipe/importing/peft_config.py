"""PEFT's adapter_config.json: the adapter of a recipe, without data and schedule."""

from __future__ import annotations

from typing import Any, get_args

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.importing.adapter_keys import set_targets
from wegeft_cli.recipe.importing.conversion import Conversion
from wegeft_cli.recipe.rules import METHOD_RULES, load_rules
from wegeft_cli.recipe.schema import PeftMethod

_NO_EFFECT = (
    "task_type",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "fan_in_fan_out",
    "lora_bias",
    "megatron_core",
    "megatron_config",
    "corda_config",
    "eva_config",
    "qalora_group_size",
)


def convert(at: Conversion, folder: Any) -> None:
    """Convert an adapter_config.json."""
    kind = str(at.take("peft_type")).lower()
    variants = {"use_dora": "dora", "use_rslora": "rslora"}
    chosen = [name for key, name in variants.items() if at.take(key)]
    if kind == "lora" and str(at.source.get("init_lora_weights")).startswith("pissa"):
        chosen.append("pissa")
        at.take("init_lora_weights")
    method = chosen[0] if chosen else kind
    if method not in get_args(PeftMethod):
        reason, hint = load_rules(METHOD_RULES).explain_name(kind) or ("", None)
        message = f"the method {kind!r} has no counterpart" + (f": {reason}" if reason else "")
        raise UserError(message, key="peft_type", hint=hint)
    at.set("adapter.type", method, "peft_type")
    at.rename({"r": "adapter.r", "lora_alpha": "adapter.alpha"})
    at.rename({"base_model_name_or_path": "model.name_or_path", "revision": "model.revision"})
    at.rename({"modules_to_save": "adapter.modules_to_save"})
    if (names := at.take("target_modules")) is not None:
        set_targets(at, "target_modules", sorted(names) if isinstance(names, list) else names)
    _convert_options(at)
    at.require("data.train", "set the training files: `train: [{path: FILE}]`")


def _convert_options(at: Conversion) -> None:
    """Pass the remaining settings that are not off to PEFT."""
    for key, value in at.source.items():
        if at.has_handled(key):
            continue
        is_off = value in (False, {}, [], "none", 0)
        if key in _NO_EFFECT or is_off or (key == "init_lora_weights" and value is True):
            at.skip((key,))
        else:
            at.set(f"adapter.peft.{key}", at.take(key), key)
