"""Rules of a recipe: valid values and no contradictions. They read no files and no network."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.grid import check_grid
from wegeft_cli.recipe.keys import KeyPath, find_nearest, find_similar, format_key
from wegeft_cli.recipe.parameter_budget import BUDGET_KEY, list_budget_faults
from wegeft_cli.recipe.schema import (
    PACKING_ATTENTION,
    SPECIAL_TOKENS,
    AdapterSection,
    ModelSection,
    Range,
    Recipe,
)
from wegeft_cli.recipe.schema_keys import explain_value, kind_at, section_kinds, strip_optional
from wegeft_cli.recipe.unsupported import explain_unsupported

Fault: TypeAlias = tuple[str, str, str | None]
"""Key, message, hint."""

_CORPORA = ("metamath", "codefeedback", "wizardlm")
TASK_RULES = "wegeft_cli.tasks.registry"
"""Module of the tasks: `check_recipe(recipe)`, `validation_metrics(recipe)`, `task_names()`."""
METHOD_RULES = "wegeft_cli.methods.registry"
"""Module with `check_recipe(recipe)`, `unread_keys(method)` and `explain_name(name)`: the methods.

`recipe` is below `tasks` and `methods`, so both are loaded by name, as plugins are.
"""
_METHODS_PAGE = "docs/methods.md lists the methods"
_GROUP_NAME = re.compile(r"[A-Za-z0-9_-]+")  # becomes a part of tensor names in the adapter file


def check_recipe(
    recipe: Recipe, *, where: Callable[[str], str | None], need_data: bool = True
) -> list[UserError]:
    """Return the fault of every rule that a recipe breaks.

    `where` returns the place where a dotted key was set. `need_data` requires training data.
    """
    rules = (check_values, _check_model, _check_adapter, _check_data, _check_train)
    others = (load_rules(METHOD_RULES).check_recipe, check_measuring)
    tasks = load_rules(TASK_RULES).check_recipe
    found = [fault for rule in (*rules, *others, tasks) for fault in rule(recipe)]
    found.extend(check_grid(recipe.sweep))
    if need_data and not recipe.data.train:
        hint = "set a file or a hub dataset: `data: {train: [{path: ...}]}`"
        found.append(("data.train", "is required and empty", hint))
    return [UserError(message, file=where(key), key=key, hint=hint) for key, message, hint in found]


def load_rules(module: str) -> Any:
    """Import `TASK_RULES` or `METHOD_RULES`."""
    return importlib.import_module(module)


def check_values(section: Any, prefix: str = "") -> Iterator[Fault]:
    """Yield the faults of values outside of their choices or ranges, in a section and below it."""
    for name, declared in section_kinds(section.__class__, with_ranges=True).items():
        key, value = f"{prefix}{name}", getattr(section, name)
        kind, _ = strip_optional(declared)
        if is_dataclass(value):
            yield from check_values(value, f"{key}.")
        elif isinstance(value, list):
            for position, item in enumerate(value):
                if is_dataclass(item):
                    yield from check_values(item, f"{key}[{position}].")
        elif get_origin(kind) is Literal and value not in (choices := list_choices(key, kind)):
            yield _explain_choice(key, value, choices)
        elif get_origin(kind) is Annotated and value is not None:
            allowed: Range = get_args(kind)[1]
            if not allowed.holds(value):
                yield key, f"must be {allowed.words}; got {value}", None


def list_values(path: KeyPath) -> tuple[str, ...]:
    """Return the values of a key that has a closed choice; empty for every other key."""
    kind, _ = strip_optional(kind_at(path))
    if kind is bool:
        return ("true", "false")
    return list_choices(format_key(path), kind) if get_origin(kind) is Literal else ()


def list_choices(key: str, kind: Any) -> tuple[str, ...]:
    """Return the choices of a key, with the methods and tasks that only a registry knows."""
    choices = get_args(kind)
    if key == "adapter.type":
        choices += load_rules(METHOD_RULES).method_names()
    elif key == "task":
        choices += load_rules(TASK_RULES).task_names()
    return tuple(dict.fromkeys(choices))


def _explain_choice(key: str, value: Any, choices: tuple[str, ...]) -> Fault:
    if key == "adapter.type" and (fault := explain_method(str(value))) is not None:
        return key, *fault
    one_of = f"one of {', '.join(choices)}"
    refused = explain_unsupported(str(value))
    if refused is not None:
        return key, f"`{value}` is not supported: {refused[0]}", f"use {one_of}"
    message = f"must be {one_of}; got {value!r}"
    known = explain_value(key, value)
    if known is not None:
        return key, message, known
    near = find_nearest(str(value), choices)
    return key, message, f"did you mean `{near}`?" if near else None


def explain_method(name: str) -> tuple[str, str] | None:
    """Return message and hint of an unknown `adapter.type`, of which there are too many to list."""
    methods = list_values(("adapter", "type"))
    if name in methods:
        return None
    known = load_rules(METHOD_RULES).explain_name(name)
    if known is not None:
        return f"`{name}` is not supported: {known[0]}", known[1]
    refused = explain_unsupported(name)
    if refused is not None:
        return f"`{name}` is not supported: {refused[0]}", _METHODS_PAGE
    message = f"{name!r} is not the name of a method"
    if (other := explain_value("adapter.type", name)) is not None:
        return message, other
    *others, last = [f"`{each}`" for each in find_similar(name.lower(), methods)] or [""]
    near = f"{', '.join(others)} or {last}" if others else last
    return message, (f"did you mean {near}? " if near else "") + _METHODS_PAGE


def _check_model(recipe: Recipe) -> Iterator[Fault]:
    if not recipe.model.name_or_path:
        yield "model.name_or_path", "is required and empty", "set a model folder or a hub id"
    if recipe.model.load_in_4bit and recipe.model.load_in_8bit:
        yield "model.load_in_8bit", "contradicts `model.load_in_4bit`", "keep one of the two"
    elif recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        yield from _check_quantized(recipe)
    elif recipe.model.quant_method != ModelSection.quant_method:
        message = f"{recipe.model.quant_method!r} requires `load_in_8bit`"
        yield "model.quant_method", message, "set `model.load_in_8bit: true`, or remove it"
    yield from _check_special_tokens(recipe.model)


def _check_special_tokens(model: ModelSection) -> Iterator[Fault]:
    for name, text in model.special_tokens.items():
        if name not in SPECIAL_TOKENS:
            message = f"has the key {name!r}; it can have {', '.join(SPECIAL_TOKENS)}"
            near = find_nearest(name, SPECIAL_TOKENS)
            yield "model.special_tokens", message, f"did you mean `{near}`?" if near else None
        elif not text:
            yield f"model.special_tokens.{name}", "is empty", "name a token, or remove the key"


def _check_quantized(recipe: Recipe) -> Iterator[Fault]:
    """A quantized base has no dense weight to multiply with."""
    model, adapter = recipe.model, recipe.adapter
    asked = "model.load_in_4bit" if model.load_in_4bit else "model.load_in_8bit"
    if model.load_in_4bit and model.quant_method == "torchao":
        message = "`torchao` quantizes to 8 bits, and `model.load_in_4bit` is set"
        yield "model.quant_method", message, "use `bitsandbytes`, or `model.load_in_8bit`"
    if model.name_or_path.endswith(".gguf"):
        message = (
            "the weights of a GGUF file are already quantized, and are loaded as dense weights"
        )
        yield asked, message, "use the base's folder or hub id"
    if adapter.view == "weight":
        message = f"`weight` multiplies with the dense weight, which `{asked}` does not keep"
        yield "adapter.view", message, f"use `auto` or `activation`, or remove `{asked}`"


def _check_adapter(recipe: Recipe) -> Iterator[Fault]:
    adapter = recipe.adapter
    yield from _check_targets(adapter)
    yield from _check_groups(adapter)
    if any(not name.strip() for name in adapter.modules_to_save):
        yield (
            "adapter.modules_to_save",
            "contains an empty name",
            "use module names such as `lm_head`",
        )
    has_rank = "adapter.r" not in load_rules(METHOD_RULES).unread_keys(adapter.type)
    for message, hint in list_budget_faults(adapter, has_rank=has_rank):
        yield BUDGET_KEY, message, hint
    if adapter.init_from is not None and not adapter.init_from.strip():
        yield "adapter.init_from", "is empty", "set an adapter or run folder, or remove it"
    if adapter.dropout > 0 and adapter.view == "activation":
        yield (
            "adapter.view",
            f"`activation` contradicts `adapter.dropout` {adapter.dropout}: "
            "dropout is applied to the entries of the weight",
            "use view `weight` or `auto`, or dropout 0",
        )


def _check_targets(adapter: AdapterSection) -> Iterator[Fault]:
    key, targets = "adapter.target_modules", adapter.target_modules
    hint = "use a list ([q_proj, v_proj]), one regular expression, or `all-linear`"
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            yield key, f"{targets!r} is not a regular expression: {error}", hint
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not is_list and not isinstance(targets, str):
        yield key, f"must be a list of module names or one text; got {targets!r}", hint
    elif not targets or (is_list and "" in targets):
        yield key, "selects no module", hint


def _check_groups(adapter: AdapterSection) -> Iterator[Fault]:
    if adapter.groups is None:
        return
    if adapter.share != AdapterSection.share:
        message = f"contradicts `adapter.share` {adapter.share!r}, which groups replace"
        yield "adapter.groups", message, "keep one of the two"
    if not adapter.groups:
        yield "adapter.groups", "has no group", "remove it, or add a group and its patterns"
    for name, patterns in adapter.groups.items():
        if not _GROUP_NAME.fullmatch(name):
            message = f"the group name {name!r} may contain only letters, digits, `_` and `-`"
            yield "adapter.groups", message, None
        if not patterns:
            message = f"the group {name!r} has no pattern"
            yield "adapter.groups", message, "add patterns over full module names"


def _check_data(recipe: Recipe) -> Iterator[Fault]:
    data = recipe.data
    for part in ("train", "validation", "test"):
        for position, source in enumerate(getattr(data, part)):
            if not source.path:
                key = f"data.{part}[{position}].path"
                yield key, "is required and empty", "set a file, a folder or a hub dataset"
    if data.validation and data.validation_fraction > 0:
        message = f"{data.validation_fraction} contradicts `data.validation`"
        yield "data.validation_fraction", message, "keep one of the two"
    if data.validation_split != "last" and data.validation_fraction == 0:
        message = f"{data.validation_split!r} has no effect: `data.validation_fraction` is 0"
        yield "data.validation_split", message, "set `data.validation_fraction`"
    yield from _check_weights(recipe)
    yield from _check_padding(recipe)
    if data.streaming:
        yield from _check_streaming(recipe)


def _check_weights(recipe: Recipe) -> Iterator[Fault]:
    data = recipe.data
    weighted = [source.weight is not None for source in data.train]
    if any(weighted) and not all(weighted):
        key = f"data.train[{weighted.index(False)}].weight"
        yield (
            key,
            "is missing: another training source has one",
            "set it for every source or for none",
        )
    for position, source in enumerate(data.validation):
        if source.weight is not None:
            key = f"data.validation[{position}].weight"
            yield key, "is only for training sources", "remove it"
    if any(weighted) and data.packing != "none":
        message = (
            f"contradicts `data.packing` {data.packing!r}: packs are equal in all epochs, "
            "a mixture does not"
        )
        yield "data.train[0].weight", message, "remove the weights, or set `data.packing: none`"


def _check_padding(recipe: Recipe) -> Iterator[Fault]:
    """Yield the faults of packing and of grouping by length."""
    data, attention = recipe.data, recipe.model.attn_implementation
    if data.packing != "none" and attention not in (None, *PACKING_ATTENTION):
        message = f"{data.packing!r} with {attention!r}, which may not separate packed rows"
        hint = f"set `model.attn_implementation` to one of {', '.join(PACKING_ATTENTION)}"
        yield "data.packing", message, hint
    if recipe.train.group_by_length:
        key = "train.group_by_length"
        if data.packing != "none":
            message = f"contradicts `data.packing` {data.packing!r}: packs have equal lengths"
            yield key, message, "keep one of the two"
        if not data.shuffle:
            message = "contradicts `data.shuffle: false`: grouping changes the order of the rows"
            yield key, message, "keep one of the two"


def _check_streaming(recipe: Recipe) -> Iterator[Fault]:
    """Streaming excludes settings that need all rows before the first step."""
    data = recipe.data
    if recipe.train.max_steps < 1:
        message = "is required with `data.streaming`: the number of rows is not known in advance"
        yield "train.max_steps", message, "set the number of optimizer steps"
    if data.validation_fraction > 0:
        message = (
            f"{data.validation_fraction} contradicts `data.streaming`: the last rows are not known "
            "in advance"
        )
        yield "data.validation_fraction", message, "set validation sources in `data.validation`"
    if data.packing != "none":
        message = f"{data.packing!r} contradicts `data.streaming`: packing needs all rows"
        yield "data.packing", message, "set it to `none`"
    for name in ("eval_strategy", "save_strategy"):
        if getattr(recipe.train, name) == "epoch":
            message = "`epoch` contradicts `data.streaming`: an epoch's steps are not known"
            yield f"train.{name}", message, "set it to `steps`"
    if recipe.train.group_by_length:
        message = "contradicts `data.streaming`: grouping needs all rows"
        yield "train.group_by_length", message, "set it to false"
    for position, source in enumerate(data.train):
        key = f"data.train[{position}]"
        if source.format in _CORPORA:
            message = f"{source.format!r} selects a published part of the whole dataset"
            yield f"{key}.format", message, "set `data.streaming: false`"
        if source.path.endswith(".json"):
            message = f"{source.path!r} is a JSON array, which cannot be streamed"
            yield f"{key}.path", message, "write it as JSONL, one object per line"


def _check_train(recipe: Recipe) -> Iterator[Fault]:
    train = recipe.train
    if train.warmup_ratio > 0 and train.warmup_steps > 0:
        message = f"{train.warmup_steps} contradicts `train.warmup_ratio` {train.warmup_ratio}"
        yield "train.warmup_steps", message, "keep one of the two"
    schedule, max_steps = train.lr_scheduler_steps, train.max_steps
    if schedule is not None and schedule < max_steps:
        message = f"{schedule} is less than `train.max_steps` {max_steps}"
        yield "train.lr_scheduler_steps", message, "the schedule covers the whole run"
    if train.fsdp_size is not None and train.strategy != "hsdp":
        message = f"{train.fsdp_size} requires `train.strategy: hsdp`"
        yield "train.fsdp_size", message, "set the strategy, or remove it"
    if train.activation_offload and train.gradient_checkpointing:
        message = (
            "contradicts `train.gradient_checkpointing`, which keeps no activations to offload"
        )
        yield "train.activation_offload", message, "keep one of the two"
    if train.compile and train.gradient_checkpointing:
        message = "contradicts `train.gradient_checkpointing`: recomputed layers are not compiled"
        yield "train.compile", message, "keep one of the two"
    if train.strategy != "replicated":
        yield from _check_sharded(recipe)


def _check_sharded(recipe: Recipe) -> Iterator[Fault]:
    """Sharded weights exclude settings that need a layer's whole weights at any time."""
    key, strategy = "train.strategy", recipe.train.strategy
    model, adapter = recipe.model, recipe.adapter
    whole = "set `train.strategy: replicated`"
    if model.load_in_4bit or model.load_in_8bit:
        message = f"`{strategy}` shards dense weights, and the base is quantized"
        yield key, message, f"{whole}: a quantized base is a quarter of its size"
    if model.name_or_path.endswith(".gguf"):
        message = f"`{strategy}` reads shards of safetensors files, and this is a GGUF file"
        yield "model.name_or_path", message, f"use the base's folder or hub id, or {whole}"
    if recipe.train.compile:
        message = f"contradicts `{key}` `{strategy}`: gathering a layer cannot be compiled"
        yield "train.compile", message, f"remove it, or {whole}"
    if recipe.train.activation_offload:
        message = f"contradicts `{key}` `{strategy}`: it would also offload gathered weights"
        yield "train.activation_offload", message, "use `train.gradient_checkpointing`"
    if adapter.modules_to_save:
        message = f"`{strategy}` shards the modules that are trained whole"
        yield "adapter.modules_to_save", message, f"remove it, or {whole}"


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""The trackers that `logging.report_to` accepts."""

_LOSS = "eval_loss"


def check_measuring(recipe: Recipe) -> Iterator[Fault]:
    """Yield the faults of validation, model selection and logging."""
    yield from _check_validation(recipe)
    yield from _check_watched(recipe)
    yield from _check_logging(recipe)


def _check_validation(recipe: Recipe) -> Iterator[Fault]:
    train = recipe.train
    measures = _has_rows(recipe) or train.eval_tasks or recipe.logging.sample_prompts
    hint = "set `data.validation`, `data.validation_fraction` or `train.eval_tasks`"
    if train.eval_steps > 0 and not measures:
        message = f"{train.eval_steps} requires validation data, and there are none"
        yield "train.eval_steps", message, hint
    if train.eval_strategy == "epoch" and not measures:
        message = "`epoch` requires validation data, and there are none"
        yield "train.eval_strategy", message, hint
    if train.eval_strategy == "epoch" and train.eval_steps > 0:
        message = f"{train.eval_steps} contradicts `train.eval_strategy: epoch`"
        yield "train.eval_steps", message, "keep one of the two"
    for position, name in enumerate(train.eval_tasks):
        if name in train.eval_tasks[:position]:
            yield f"train.eval_tasks[{position}]", f"contains {name!r} twice", "remove it"


def _check_watched(recipe: Recipe) -> Iterator[Fault]:
    train = recipe.train
    metric, key = train.metric_for_best_model, "train.metric_for_best_model"
    metrics = [_LOSS] * _has_rows(recipe) + [f"eval_{name}" for name in train.eval_tasks]
    if _has_rows(recipe):
        metrics += [f"eval_{name}" for name in load_rules(TASK_RULES).validation_metrics(recipe)]
    hint = "set `data.validation` or `data.validation_fraction`"
    # The names of benchmarks and the members of groups are checked elsewhere.
    if metric != _LOSS and metric not in metrics and not train.eval_tasks:
        # The common prefix eval_ would make all names similar.
        words = {name.removeprefix("eval_"): name for name in metrics}
        near = words.get(find_nearest(metric.removeprefix("eval_"), list(words)) or "")
        yield (
            key,
            f"{metric!r} is not measured; measured: {', '.join(metrics) or 'nothing'}",
            f"did you mean `{near}`?" if near else f"add its task to `train.eval_tasks`, or {hint}",
        )
    watching = {
        "train.early_stopping_patience": train.early_stopping_patience is not None,
        "train.load_best_model_at_end": train.load_best_model_at_end,
    }
    for name, is_set in watching.items():
        if is_set and metric == _LOSS and metric not in metrics:
            other = f", or set `{key}: {metrics[0]}`" if metrics else ""
            yield name, "requires validation data, and there are none", hint + other
        elif is_set and train.eval_steps == 0 and train.eval_strategy == "steps":
            message = "requires validation during training, and `train.eval_steps` is 0"
            hint = "set `train.eval_steps`, e.g. 0.1 for ten validations, or `eval_strategy: epoch`"
            yield name, message, hint


def _check_logging(recipe: Recipe) -> Iterator[Fault]:
    key, value = "logging.report_to", recipe.logging.report_to
    known = f"none, or a name or a list of names from {', '.join(TRACKERS)}"
    if not isinstance(value, str | list):
        yield key, f"must be {known}; got {value!r}", None
        return
    names = [value] if isinstance(value, str) else value
    allowed = TRACKERS if isinstance(value, list) and len(value) > 1 else ("none", *TRACKERS)
    for name in names:
        if name not in allowed:
            near = find_nearest(str(name), allowed)
            yield key, f"must be {known}; got {name!r}", f"did you mean `{near}`?" if near else None
    for position, prompt in enumerate(recipe.logging.sample_prompts):
        if not prompt.strip():
            yield f"logging.sample_prompts[{position}]", "is empty", "write a prompt, or remove it"


def _has_rows(recipe: Recipe) -> bool:
    return bool(recipe.data.validation) or recipe.data.validation_fraction > 0
