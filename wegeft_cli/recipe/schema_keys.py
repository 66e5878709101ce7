"""Keys of the schema: their types, spellings of other tools, and the nearest valid key."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from wegeft_cli.recipe.keys import (
    LEAST_LIKENESS,
    SWEEP,
    KeyPath,
    format_key,
    format_pattern,
    parse_key,
)
from wegeft_cli.recipe.schema import Recipe

ALIASES = {
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "torch_dtype": "model.dtype",
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.target_modules",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "micro_batch_size": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "num_epochs": "train.num_train_epochs",
    "epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "num_warmup_steps": "train.warmup_steps",
    "lr_warmup_steps": "train.warmup_steps",
    "optimizer": "train.optim",
    "out_dir": "output_dir",
}
"""Other tools' spellings of exactly one key, read with a note at the top level and in the key's
section."""

_ALSO_READ_IN = {"data.max_length": ("model", "train")}
"""Further sections in which other tools have the key."""

POINTERS = {
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_on_input": "data.loss_on",
    "train_on_inputs": "data.loss_on",
    "mask_prompt": "data.loss_on",
    "completion_only_loss": "data.loss_on",
    "assistant_only_loss": "data.loss_on",
    "sample_packing": "data.packing",
    "packed": "data.packing",
    "val_size": "data.validation_fraction",
    "val_set_size": "data.validation_fraction",
    "validation_percent": "data.validation_fraction",
    "chat_template": "data.template",
    "prompt_template": "data.template",
    "bf16": "train.mixed_precision",
    "fp16": "train.mixed_precision",
    "precision": "train.mixed_precision",
    "batch_size": "train.per_device_train_batch_size",
    "clip_grad_norm": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "scale": "adapter.alpha",
    "lora_target": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules",
    "lora_modules_to_save": "adapter.modules_to_save",
    "additional_target": "adapter.modules_to_save",
    "lora_model_dir": "adapter.init_from",
    "adapter_name_or_path": "adapter.init_from",
    "max_samples": "data.train[0].limit",
    "system_prompt": "data.system",
    "system_message": "data.system",
    "default_system": "data.system",
    "default_system_message": "data.system",
    "eval_dataset": "data.validation",
    "test_datasets": "data.validation",
    "dataset_prepared_path": "data.cache_dir",
    "tokenized_path": "data.cache_dir",
    "buffer_size": "data.shuffle_buffer_size",
    "eval_strategy": "train.eval_strategy",
    "evaluation_strategy": "train.eval_strategy",
    "evals_per_epoch": "train.eval_steps",
    "save_strategy": "train.save_strategy",
    "saves_per_epoch": "train.save_steps",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "quantization": "model.load_in_4bit",
    "quantization_bit": "model.load_in_4bit",
    "flash_attention": "model.attn_implementation",
    "flash_attn": "model.attn_implementation",
    "sdp_attention": "model.attn_implementation",
    "wandb_project": "logging.project",
    "wandb_name": "logging.run_name",
    "peft_type": "adapter.type",
    "finetuning_type": "adapter.type",
}
"""Other tools' spellings whose values differ: refused with the key to use."""
_SECTION_POINTERS = {
    "model.name": "model.name_or_path",
    "model.path": "model.name_or_path",
    "model.id": "model.name_or_path",
    "data.path": "data.train[0].path",
    "data.format": "data.train[0].format",
    "data.columns": "data.train[0].columns",
    "data.split": "data.train[0].split",
    "data.train[].type": "data.train[].format",
    "data.train[].file": "data.train[].path",
    "data.train[].data_files": "data.train[].path",
    "data.train[].config": "data.train[].name",
    "data.train[].subset": "data.train[].name",
    "data.train[].max_samples": "data.train[].limit",
}
"""Keys that mean another key in their section, without list positions."""
_NO_COUNTERPART = {
    "strict": "remove it: an unknown key is always an error",
    "stage": "remove it: `task` and `adapter` select what is trained",
    "do_train": "remove it: the command selects what is done",
    "tokens": "remove it: the vocabulary is not extended; add the tokens to a copy of the base "
    "(docs/data.md, special tokens)",
    "special_tokens": "write it under `model`: `model.special_tokens`",
    "bos_token": "write `model.special_tokens: {bos_token: ...}`",
    "eos_token": "write `model.special_tokens: {eos_token: ...}`",
    "tokenizer": "remove it: the base's own tokenizer is used; `model.special_tokens` chooses its "
    "end and padding tokens, other changes need a copy of the base (docs/data.md, special tokens)",
    "pad_token": "write `model.special_tokens: {pad_token: ...}`, or remove it: masks come from "
    "lengths, so any token pads",
    "lora_plus_lr_ratio": "remove it: `train.lr_ratio` is WeGeFT's ratio",
    "loraplus_lr_ratio": "remove it: `train.lr_ratio` is WeGeFT's ratio",
    "pad_to_sequence_len": "remove it: a batch is padded to its longest row",
    "dataloader_num_workers": "remove it: rows are tokenized before training",
    "resume_from_checkpoint": "use the option `--resume auto`",
    "push_to_hub": "use the option `--push-to-hub REPO`",
    "overwrite_output_dir": "use the option `--overwrite`",
}
"""Keys of other tools that no key replaces, with what to do."""
_VALUES = {
    "data.train[].format": {
        "alpaca": "write instruction",
        "sharegpt": "write conversations",
        "chat": "write messages",
        "chatml": "write messages",
        "chat_template": "write messages",
        "openai": "write messages",
        "completion": "write text, or prompt_completion for rows with a prompt and a completion",
    },
    "adapter.type": {
        "qlora": "write lora, and set `model.load_in_4bit: true`",
        "none": "write full to train every weight",
    },
    "train.optim": {"adamw": "write adamw_torch", "adam": "write adamw_torch"},
    "train.mixed_precision": {
        "no": "write none",
        "fp32": "write none",
        "bfloat16": "write bf16",
        "float16": "write fp16",
    },
    "train.eval_strategy": {
        "no": "remove it: without validation rows nothing is validated, and `train.eval_steps: 0` "
        "validates at the end alone",
    },
    "train.save_strategy": {
        "no": "remove it, and set `train.save_steps: 0` to save at the end alone"
    },
    "model.dtype": {"bf16": "write bfloat16", "fp16": "write float16", "fp32": "write float32"},
}
"""Other tools' values of a key, with what to write instead."""
_NEVER_SWEPT = ("output_dir", "extends", SWEEP)
_SAME_SECTION_BONUS = 0.1  # prefers the same section among equally near keys
_LEAST_LIKENESS_ELSEWHERE = 0.75  # of a key in another section


def strip_optional(kind: Any) -> tuple[Any, bool]:
    """Return a type without `| None`, and whether null is allowed."""
    if get_origin(kind) in (Union, types.UnionType):
        inner = [part for part in get_args(kind) if part is not type(None)]
        return inner[0], True
    return kind, kind is Any


@cache
def section_kinds(section: type, *, with_ranges: bool = False) -> dict[str, Any]:
    """Return each key of a section with its type, with its range as `Annotated` on request."""
    hints = get_type_hints(section, include_extras=with_ranges)
    return {field.name: hints[field.name] for field in fields(section)}


def kind_at(path: KeyPath) -> Any | None:
    """Return the type of the value at a key path, or None if the schema has no such key."""
    kind: Any = Recipe
    for part in path:
        kind, _ = strip_optional(kind)
        if kind is Any:
            return Any
        if isinstance(part, int):
            kind = get_args(kind)[0] if get_origin(kind) is list else None
        elif get_origin(kind) is dict:
            kind = _swept_kind(part) if path[0] == SWEEP else get_args(kind)[1]
        else:
            is_section = is_dataclass(kind) and isinstance(kind, type)
            kind = section_kinds(kind).get(part) if is_section else None
        if kind is None:
            return None
    return kind


def find_alias(path: KeyPath) -> KeyPath | None:
    """Return the key for another tool's spelling, such as `("data", "cutoff_len")`, or None."""
    if path[0] == SWEEP and len(path) == 2:
        right = _find_swept_alias(str(path[1]))
        return None if right is None else (SWEEP, format_key(right))
    target = ALIASES.get(str(path[-1]))
    if target is None or len(path) > 2 or kind_at(path) is not None:
        return None
    right = parse_key(target)
    homes = {right[:-1], (), *((section,) for section in _ALSO_READ_IN.get(target, ()))}
    return right if path[:-1] in homes else None


def explain_swept(name: str) -> tuple[str, str | None]:
    """Return why a name under `sweep` is not a key to sweep, and a hint."""
    try:
        path = parse_key(name)
    except ValueError:
        return f"{name!r} is not a dotted key", "write one such as `train.learning_rate`"
    if path[0] in _NEVER_SWEPT:
        return f"`{path[0]}` cannot be swept", "each run gets its own folder in `output_dir`"
    kind, _ = strip_optional(kind_at(path))
    if is_dataclass(kind) and isinstance(kind, type):
        first = next(iter(section_kinds(kind)))
        return f"`{name}` is a section", f"name one of its keys, such as `{name}.{first}`"
    near = find_nearest_key(path)
    return f"the recipe has no key `{name}`", f"did you mean `{near}`?" if near else None


def is_swept(name: str) -> bool:
    """Return whether `sweep` may have a key of this name."""
    return _swept_kind(name) is not None


def _swept_kind(name: str | int) -> Any | None:
    """Return the type of a key under `sweep`: a list of the key's own type."""
    try:
        path = parse_key(str(name))
    except ValueError:
        return None
    kind = None if path[0] in _NEVER_SWEPT else kind_at(path)
    inner, _ = strip_optional(kind)
    return None if kind is None or is_dataclass(inner) else list[kind]  # type: ignore[valid-type]


def _find_swept_alias(name: str) -> KeyPath | None:
    try:
        return find_alias(parse_key(name))
    except ValueError:
        return None


def find_nearest_key(path: KeyPath) -> str | None:
    """Return the valid key, in any section, that is most similar to an unknown one, or None."""
    name = str(path[-1]).lower().replace("-", "_")
    parent = format_pattern(path[:-1])
    entries = parent.replace("data.validation[]", "data.train[]")
    nearby = _SECTION_POINTERS.get(f"{entries}.{name}")
    if nearby is not None:
        is_entry = "[]" in nearby
        return format_key((*path[:-1], nearby.rpartition(".")[2])) if is_entry else nearby
    foreign = ALIASES.get(name) or POINTERS.get(name)
    if foreign is not None:
        return foreign
    best, best_likeness = None, 0.0
    for candidate in list_keys():
        likeness = difflib.SequenceMatcher(None, name, str(candidate[-1])).ratio()
        same_section = format_pattern(candidate[:-1]) == parent
        if likeness < (LEAST_LIKENESS if same_section else _LEAST_LIKENESS_ELSEWHERE):
            continue
        likeness += _SAME_SECTION_BONUS if same_section else 0.0
        if likeness > best_likeness:
            best = (*path[:-1], candidate[-1]) if same_section else candidate
            best_likeness = likeness
    return format_key(best) if best else None


def explain_no_counterpart(name: str) -> str | None:
    """Return what to do with another tool's key that no key replaces, or None."""
    return _NO_COUNTERPART.get(name.lower().replace("-", "_"))


def explain_value(key: str, value: object) -> str | None:
    """Return what to write instead of another tool's value of a dotted key, or None."""
    pattern = re.sub(r"\[\d*\]", "[]", key).replace("data.validation[", "data.train[")
    return _VALUES.get(pattern, {}).get(str(value).lower())


@cache
def list_keys() -> tuple[KeyPath, ...]:
    """Return every key of the schema, with position 0 for entries of lists."""
    return tuple(_walk_schema(Recipe, ()))


def _walk_schema(section: type, path: KeyPath) -> Iterator[KeyPath]:
    for name, declared in section_kinds(section).items():
        here = (*path, name)
        yield here
        kind, _ = strip_optional(declared)
        if is_dataclass(kind) and isinstance(kind, type):
            yield from _walk_schema(kind, here)
        elif get_origin(kind) is list and is_dataclass(get_args(kind)[0]):
            yield from _walk_schema(get_args(kind)[0], (*here, 0))
