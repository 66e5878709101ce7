"""Rules of a recipe: each value by itself, and what contradicts what; no files, no network."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.grid import check_grid
from wegeft_cli.recipe.keys import find_nearest
from wegeft_cli.recipe.schema import AdapterSection, ModelSection, Recipe
from wegeft_cli.recipe.values import (
    PACKING_ATTENTION,
    Fault,
    check_values,
    find_values,
)

_CORPORA = ("metamath", "codefeedback", "wizardlm")
TASK_RULES = "wegeft_cli.recipe.classification_rules"
"""Module with `check_recipe(recipe)` and `validation_metrics(recipe)`, the rules of the tasks."""
METHOD_RULES = "wegeft_cli.methods.registry"
"""Module with `check_recipe(recipe)` and `unread_keys(method)`, the rules of the methods.

`recipe` is below `tasks` and `methods`, so both are loaded by name, as plugins are.
"""
_GROUP_NAME = re.compile(r"[A-Za-z0-9_-]+")  # becomes a part of tensor names in the adapter file


def check_recipe(
    recipe: Recipe, *, where: Callable[[str], str | None], need_data: bool = True
) -> list[UserError]:
    """Check the rules that one recipe's values must keep.

    Args:
        recipe: The typed recipe.
        where: Tells for a dotted key where it was set: `file:line:column`, an override, or None.
        need_data: Whether training data are required, as they are for a command that trains.

    Returns:
        Every rule that is broken, in the order of the schema's sections; empty if all hold.
    """
    rules = (check_values, _check_model, _check_adapter, _check_data, _check_train)
    others = (load_rules(METHOD_RULES).check_recipe, check_measuring)
    tasks = load_rules(TASK_RULES).check_recipe
    found = [fault for rule in (*rules, *others, tasks) for fault in rule(recipe)]
    found.extend(check_grid(recipe.sweep))
    if need_data and not recipe.data.train:
        hint = "name a file or a hub data set: `data: {train: [{path: ...}]}`"
        found.append(("data.train", "is required and empty", hint))
    return [UserError(message, file=where(key), key=key, hint=hint) for key, message, hint in found]


def load_rules(module: str) -> Any:
    """Import `TASK_RULES` or `METHOD_RULES`."""
    return importlib.import_module(module)


def _check_model(recipe: Recipe) -> Iterator[Fault]:
    if not recipe.model.name_or_path:
        yield "model.name_or_path", "is required and empty", "name a model folder or a hub id"
    if recipe.model.load_in_4bit and recipe.model.load_in_8bit:
        yield "model.load_in_8bit", "contradicts `model.load_in_4bit`", "keep one of the two"
    elif recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        yield from _check_quantised(recipe)
    elif recipe.model.quant_method != ModelSection.quant_method:
        message = f"{recipe.model.quant_method!r} is read with `load_in_8bit` alone"
        yield "model.quant_method", message, "set `model.load_in_8bit: true`, or remove it"


def _check_quantised(recipe: Recipe) -> Iterator[Fault]:
    """A quantised base has no weight entries to drop or to multiply with."""
    model, adapter = recipe.model, recipe.adapter
    asked = "model.load_in_4bit" if model.load_in_4bit else "model.load_in_8bit"
    if model.load_in_4bit and model.quant_method == "torchao":
        message = "`torchao` quantises to 8 bits here, and `model.load_in_4bit` is set"
        yield "model.quant_method", message, "use `bitsandbytes`, or `model.load_in_8bit`"
    if model.name_or_path.endswith(".gguf"):
        message = "a GGUF file's weights are quantised already, and are read as dense ones"
        yield asked, message, "give the base's folder or hub id"
    if adapter.view == "weight":
        message = f"`weight` multiplies with the weight, which `{asked}` leaves none of"
        yield "adapter.view", message, f"use `auto` or `activation`, or remove `{asked}`"


def _check_adapter(recipe: Recipe) -> Iterator[Fault]:
    adapter = recipe.adapter
    yield from _check_targets(adapter)
    yield from _check_groups(adapter)
    if any(not name.strip() for name in adapter.modules_to_save):
        yield "adapter.modules_to_save", "holds an empty name", "name modules such as `lm_head`"
    if adapter.init_from is not None and not adapter.init_from.strip():
        yield "adapter.init_from", "is empty", "name an adapter or run folder, or leave it out"
    if adapter.dropout > 0 and adapter.view == "activation":
        yield (
            "adapter.view",
            f"`activation` contradicts `adapter.dropout` {adapter.dropout}: "
            "dropout acts on the weight's entries",
            "use view `weight` or `auto`, or dropout 0",
        )


def _check_targets(adapter: AdapterSection) -> Iterator[Fault]:
    key, targets = "adapter.target_modules", adapter.target_modules
    hint = "name them ([q_proj, v_proj]), write one regular expression, or `all-linear`"
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            yield key, f"{targets!r} is no regular expression: {error}", hint
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not is_list and not isinstance(targets, str):
        yield key, f"must be a list of module names or one text; got {targets!r}", hint
    elif not targets or (is_list and "" in targets):
        yield key, "names no module", hint


def _check_groups(adapter: AdapterSection) -> Iterator[Fault]:
    if adapter.groups is None:
        return
    if adapter.share != AdapterSection.share:
        message = f"contradicts `adapter.share` {adapter.share!r}: groups replace it"
        yield "adapter.groups", message, "keep one of the two"
    if not adapter.groups:
        yield "adapter.groups", "holds no group", "remove it, or name a group and its patterns"
    for name, patterns in adapter.groups.items():
        if not _GROUP_NAME.fullmatch(name):
            message = f"the group name {name!r} may hold only letters, digits, `_` and `-`"
            yield "adapter.groups", message, None
        if not patterns:
            message = f"the group {name!r} holds no pattern"
            yield "adapter.groups", message, "list patterns over full module names"


def _check_data(recipe: Recipe) -> Iterator[Fault]:
    data = recipe.data
    for pattern in ("data.train[].path", "data.validation[].path", "data.test[].path"):
        for key, path in find_values(recipe, pattern):
            if not path:
                yield key, "is required and empty", "name a file, a folder or a hub data set"
    if data.validation and data.validation_fraction > 0:
        message = f"{data.validation_fraction} contradicts `data.validation`"
        yield "data.validation_fraction", message, "keep one of the two"
    yield from _check_weights(recipe)
    yield from _check_padding(recipe)
    if data.streaming:
        yield from _check_streaming(recipe)


def _check_weights(recipe: Recipe) -> Iterator[Fault]:
    data = recipe.data
    weighted = [source.weight is not None for source in data.train]
    if any(weighted) and not all(weighted):
        key = f"data.train[{weighted.index(False)}].weight"
        yield key, "is missing: another training source has one", "give every source one, or none"
    for position, source in enumerate(data.validation):
        if source.weight is not None:
            key = f"data.validation[{position}].weight"
            yield key, "weights mix what is learned from, not validation", "remove it"
    if any(weighted) and data.packing != "none":
        message = (
            f"contradicts `data.packing` {data.packing!r}: a pack has the same rows in every "
            "epoch, a mixture has not"
        )
        yield "data.train[0].weight", message, "remove the weights, or set `data.packing: none`"


def _check_padding(recipe: Recipe) -> Iterator[Fault]:
    """What is done against padding: packing, or steps of rows of one length."""
    data, attention = recipe.data, recipe.model.attn_implementation
    if data.packing != "none" and attention not in (None, *PACKING_ATTENTION):
        message = f"{data.packing!r} with {attention!r}: it is not known to keep packed rows apart"
        hint = f"set `model.attn_implementation` to one of {', '.join(PACKING_ATTENTION)}"
        yield "data.packing", message, hint
    if recipe.train.group_by_length:
        key = "train.group_by_length"
        if data.packing != "none":
            message = f"contradicts `data.packing` {data.packing!r}: packs are of one length"
            yield key, message, "keep one of the two"
        if not data.shuffle:
            message = "contradicts `data.shuffle: false`: grouping changes the order of the rows"
            yield key, message, "keep one of the two"


def _check_streaming(recipe: Recipe) -> Iterator[Fault]:
    """What needs all rows before the first step does not go with reading them while training."""
    data = recipe.data
    if recipe.train.max_steps < 1:
        message = "is needed with `data.streaming`: how many rows there are is not known beforehand"
        yield "train.max_steps", message, "set the number of optimizer steps"
    if data.validation_fraction > 0:
        message = (
            f"{data.validation_fraction} contradicts `data.streaming`: which rows are the last is "
            "not known beforehand"
        )
        yield "data.validation_fraction", message, "name validation rows in `data.validation`"
    if data.packing != "none":
        message = f"{data.packing!r} contradicts `data.streaming`: packing chooses among all rows"
        yield "data.packing", message, "set it to `none`"
    if recipe.train.group_by_length:
        message = "contradicts `data.streaming`: grouping chooses among all rows"
        yield "train.group_by_length", message, "set it to false"
    for position, source in enumerate(data.train):
        key = f"data.train[{position}]"
        if source.format in _CORPORA:
            message = f"{source.format!r} takes a published part of the whole set"
            yield f"{key}.format", message, "set `data.streaming: false`"
        if source.path.endswith(".json"):
            message = f"{source.path!r} is read as a whole: a JSON array cannot be streamed"
            yield f"{key}.path", message, "write it as JSONL, one object per line"


def _check_train(recipe: Recipe) -> Iterator[Fault]:
    train = recipe.train
    if train.warmup_ratio > 0 and train.warmup_steps > 0:
        message = f"{train.warmup_steps} contradicts `train.warmup_ratio` {train.warmup_ratio}"
        yield "train.warmup_steps", message, "keep one of the two"
    if train.fsdp_size is not None and train.strategy != "hsdp":
        message = f"{train.fsdp_size} is read with `train.strategy: hsdp` alone"
        yield "train.fsdp_size", message, "set the strategy, or remove it"
    if train.activation_offload and train.gradient_checkpointing:
        message = "contradicts `train.gradient_checkpointing`, which leaves nothing to be moved"
        yield "train.activation_offload", message, "keep one of the two"
    if train.compile and train.gradient_checkpointing:
        message = "contradicts `train.gradient_checkpointing`: recomputed layers stay as they are"
        yield "train.compile", message, "keep one of the two"
    if train.strategy != "replicated":
        yield from _check_sharded(recipe)


def _check_sharded(recipe: Recipe) -> Iterator[Fault]:
    """What needs a layer's weights whole and at any time does not go with sharing them."""
    key, strategy = "train.strategy", recipe.train.strategy
    model, adapter = recipe.model, recipe.adapter
    whole = "set `train.strategy: replicated`"
    if model.load_in_4bit or model.load_in_8bit:
        message = f"`{strategy}` shares dense weights, and the base is quantised"
        yield key, message, f"{whole}: a quantised base is a quarter of its size"
    if model.name_or_path.endswith(".gguf"):
        message = f"`{strategy}` reads each process's share of safetensors, and this is a GGUF file"
        yield "model.name_or_path", message, f"give the base's folder or hub id, or {whole}"
    if recipe.train.compile:
        message = f"contradicts `{key}` `{strategy}`: what gathers a layer is not compiled"
        yield "train.compile", message, f"leave it out, or {whole}"
    if recipe.train.activation_offload:
        message = f"contradicts `{key}` `{strategy}`: it would move gathered weights too"
        yield "train.activation_offload", message, "use `train.gradient_checkpointing`"
    if adapter.modules_to_save:
        message = f"`{strategy}` shares the modules that are to be trained whole"
        yield "adapter.modules_to_save", message, f"leave it out, or {whole}"


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""What `logging.report_to` may name."""

_LOSS = "eval_loss"


def check_measuring(recipe: Recipe) -> Iterator[Fault]:
    """Check what a run measures, and what it watches of that.

    Args:
        recipe: The typed recipe.

    Yields:
        Each rule that is broken.
    """
    yield from _check_validation(recipe)
    yield from _check_watched(recipe)
    yield from _check_logging(recipe)


def _check_validation(recipe: Recipe) -> Iterator[Fault]:
    train = recipe.train
    measures = _has_rows(recipe) or train.eval_tasks or recipe.logging.sample_prompts
    if train.eval_steps > 0 and not measures:
        message = f"{train.eval_steps} asks for a validation loss, and there are no validation data"
        hint = "set `data.validation` or `data.validation_fraction`, or name `train.eval_tasks`"
        yield "train.eval_steps", message, hint
    for position, name in enumerate(train.eval_tasks):
        if name in train.eval_tasks[:position]:
            yield f"train.eval_tasks[{position}]", f"names {name!r} a second time", "remove it"


def _check_watched(recipe: Recipe) -> Iterator[Fault]:
    train = recipe.train
    metric, key = train.metric_for_best_model, "train.metric_for_best_model"
    metrics = [_LOSS] * _has_rows(recipe) + [f"eval_{name}" for name in train.eval_tasks]
    if _has_rows(recipe):
        metrics += [f"eval_{name}" for name in load_rules(TASK_RULES).validation_metrics(recipe)]
    hint = "set `data.validation` or `data.validation_fraction`"
    # What the sets of `train.eval_tasks` are called, and which a group has, is known elsewhere.
    if metric != _LOSS and metric not in metrics and not train.eval_tasks:
        # All begin with eval_: what follows tells them apart.
        words = {name.removeprefix("eval_"): name for name in metrics}
        near = words.get(find_nearest(metric.removeprefix("eval_"), list(words)) or "")
        yield (
            key,
            f"{metric!r} is not measured: there is {' and '.join(metrics) or 'nothing'}",
            f"did you mean `{near}`?"
            if near
            else f"name its task in `train.eval_tasks`, or {hint}",
        )
    watching = {
        "train.early_stopping_patience": train.early_stopping_patience is not None,
        "train.load_best_model_at_end": train.load_best_model_at_end,
    }
    for name, is_set in watching.items():
        if is_set and metric == _LOSS and metric not in metrics:
            other = f", or set `{key}: {metrics[0]}`" if metrics else ""
            yield name, "needs validation, and there are no validation data", hint + other
        elif is_set and train.eval_steps == 0:
            message = "needs validation while training, and `train.eval_steps` is 0"
            yield name, message, "set `train.eval_steps`, e.g. 0.1 for ten times"


def _check_logging(recipe: Recipe) -> Iterator[Fault]:
    key, value = "logging.report_to", recipe.logging.report_to
    known = f"none, or a name or a list of names out of {', '.join(TRACKERS)}"
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
