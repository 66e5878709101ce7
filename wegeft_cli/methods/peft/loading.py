"""Load PEFT's adapters from their files: every tensor is checked and has a place in the model."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import CONFIG_NAME, WEIGHTS_NAME, load_finite_tensors
from wegeft_cli.errors import UserError, name_first
from wegeft_cli.methods.peft.models import import_peft
from wegeft_cli.models.file_names import current_names, file_names, rename_layers
from wegeft_cli.time_limit import time_limit

_WRAPPER = "base_model.model."
_NAME = "default"
_MATCH_SECONDS = 10.0
_LEAST_RANK_LIMIT = 4096
# PEFT reads a text of its config as an expression in one of these ways.
_EXPRESSIONS = ("{}", "(.*\\.)?({})$", "(?:^|.*?\\.){}\\.(?P<idx>\\d+)\\.", "(^|.*\\.){}($|\\..*)")
_REPEATS = re.compile(r"[*+{]")
_RANKS = ("r", "init_r", "target_r")


def load_peft(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Load a PEFT adapter onto its base and return PEFT's model, in evaluation mode.

    Raises:
        UserError: If a file is missing or damaged, a value is NaN or infinite, or a tensor is
            missing, misshapen, or has no place in the model.
    """
    tensors = load_finite_tensors(adapter.weights_path)
    _check_config(model, adapter)
    loaded: Any = None
    try:
        with warnings.catch_warnings(), _named_as_in_model(model, adapter, tensors) as current:
            warnings.simplefilter("ignore")
            loaded = _wrap(model, current)
            result = loaded.load_adapter(
                current, _NAME, key_mapping=getattr(model, "_checkpoint_conversion_mapping", {})
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # odd values of the config raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        if loaded is not None and (fault := _find_misfit(loaded, tensors, adapter, reason)):
            raise fault from error
        message = f"PEFT cannot load the adapter: {reason}"
        raise UserError(message, file=str(adapter.folder)) from error
    needed = {_without_name(name) for name in _list_needed(loaded)}
    lacks = any(_without_name(name) in needed for name in result.missing_keys)
    if lacks or result.unexpected_keys:
        # PEFT keeps fresh values for what lacks, and drops what has no place.
        reason = "it would load a part of the adapter"
        fault = _find_misfit(loaded, tensors, adapter, reason)
        names = [*result.missing_keys, *result.unexpected_keys]
        raise fault or UserError(f"{reason}: {names[0]} does not fit", file=str(adapter.folder))
    evaluated: nn.Module = loaded.eval()
    return evaluated


def _wrap(model: nn.Module, folder: str) -> Any:
    """Return PEFT's model of an adapter's config, with fresh values."""
    peft = import_peft()
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = True
    wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
    return wrapper(model, config, _NAME)


def start_from_peft(model: Any, start: Adapter) -> None:
    """Put an adapter's tensors into a fresh PEFT model of the same settings.

    Raises:
        UserError: If the adapter is unreadable, or has other layers or shapes.
    """
    peft = import_peft()
    tensors = load_finite_tensors(start.weights_path)
    own = _list_needed(model)
    names = sorted(own.keys() | tensors.keys())
    differing = [
        (name, [list(t[name].shape) if name in t else None for t in (own, tensors)])
        for name in names
    ]
    differing = [(name, shapes) for name, shapes in differing if shapes[0] != shapes[1]]
    if differing:
        name, (ours, theirs) = differing[0]
        raise UserError(
            f"{len(differing)} of {len(names)} tensors differ from those of {str(start.folder)!r}; "
            f"the first is {name}: {ours or 'not'} here, {theirs or 'not'} there",
            key="adapter.init_from",
            hint="give the same adapter.target_modules and adapter.modules_to_save",
        )
    peft.set_peft_model_state_dict(model, tensors)


@contextmanager
def _named_as_in_model(
    model: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """Yield the adapter's folder, or a copy of it where transformers has renamed its modules."""
    config = dict(adapter.config)
    asked = {key: config.get(key) for key in ("target_modules", "modules_to_save")}
    current = {key: current_names(model, value) for key, value in asked.items() if value}
    if all(asked[key] == names for key, names in current.items()):
        yield str(adapter.folder)
        return
    inner = {name.removeprefix(_WRAPPER): tensor for name, tensor in tensors.items()}
    renamed = rename_layers(model, inner)
    with tempfile.TemporaryDirectory(prefix="wegeft-peft-") as folder:
        (Path(folder) / CONFIG_NAME).write_text(json.dumps({**config, **current}))
        copies = {_WRAPPER + renamed[name]: tensor for name, tensor in inner.items()}
        save_file(copies, Path(folder) / WEIGHTS_NAME, metadata={"format": "pt"})
        yield folder


def _check_config(model: nn.Module, adapter: Adapter) -> None:
    """Refuse settings that run code, never end, or need more memory than any adapter."""
    file = str(adapter.config_path)
    # By these PEFT imports a module, or runs a tokenizer's code.
    for key in ("megatron_config", "tokenizer_kwargs"):
        if adapter.config.get(key):
            raise UserError(
                "by this setting code could run that the adapter names",
                file=file,
                key=key,
                hint="set it to null, if you trust the adapter",
            )
    widths = (min(p.shape) for p in model.parameters() if p.ndim > 1)
    limit = max([_LEAST_RANK_LIMIT, *widths])
    for key, rank in _list_ranks(adapter.config):
        if rank > limit and adapter.peft_type != "LOKR":  # reads it as "as large as possible"
            message = f"must be at most {limit} on this base, got {rank}"
            raise UserError(message, file=file, key=key)
    modules = [name for name, _ in model.named_modules() if name]
    modules += file_names(model).layers.values()
    for key, value in adapter.config.items():
        slow = UserError(
            f"matching the base's module names takes more than {_MATCH_SECONDS:.0f} seconds",
            file=file,
            key=key,
            hint="this expression backtracks without end: list the module names instead",
        )
        with time_limit(_MATCH_SECONDS, slow):
            for text in _list_expressions(value):
                _match(text, modules)


def _list_ranks(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    pattern = config.get("rank_pattern")
    ranks = [(key, config.get(key)) for key in _RANKS]
    if isinstance(pattern, Mapping):
        ranks += [(f"rank_pattern.{name}", rank) for name, rank in pattern.items()]
    yield from ((key, rank) for key, rank in ranks if isinstance(rank, int))


def _list_expressions(value: Any) -> Iterator[str]:
    """Yield the texts of a config's value that repeat something."""
    if isinstance(value, str) and _REPEATS.search(value):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value:
            yield from _list_expressions(part)


def _match(text: str, modules: list[str]) -> None:
    """Match module names as PEFT will."""
    for form in _EXPRESSIONS:
        try:
            expression = re.compile(form.replace("{}", text, 1))
        except (re.error, OverflowError, RecursionError):
            continue  # PEFT reports it where it reads it
        for name in modules:
            expression.fullmatch(name)
            expression.match(name)


def _list_needed(model: Any) -> dict[str, Tensor]:
    """Return what PEFT would save of a model, by the names in a file."""
    peft = import_peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AdaLoRA may leave a layer no rank
        tensors: dict[str, Tensor] = peft.get_peft_model_state_dict(
            model, save_embedding_layers=False
        )
    return tensors


def _without_name(name: str) -> str:
    return name.replace(f".{_NAME}", "").replace(".modules_to_save", "")


def _find_misfit(
    loaded: Any, tensors: Mapping[str, Tensor], adapter: Adapter, reason: str
) -> UserError | None:
    """Return what differs between the tensors that the model needs and those of the file."""
    needed = {name: list(tensor.shape) for name, tensor in _list_needed(loaded).items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    missing = [name for name in needed if name not in found]
    unexpected = [name for name in found if name not in needed]
    misshapen = [name for name in found if needed.get(name, found[name]) != found[name]]
    empty = [name for name in misshapen if 0 in found[name]]
    parts = []
    if missing:
        parts.append(f"{_first(missing)} missing")
    if unexpected:
        parts.append(f"{_first(unexpected)} not in this model")
    if misshapen:
        name = misshapen[0]
        parts.append(f"{_first(misshapen)} of shape {found[name]} instead of {needed[name]}")
    if not parts:
        return None
    if empty:
        hint = (
            "a sharded run (DeepSpeed ZeRO-3, FSDP) saved empty tensors: gather the weights before "
            "saving, or take another checkpoint"
        )
    elif pair := _find_moved(missing, unexpected):
        hint = (
            f"the adapter was saved under another module tree: {pair[1]} is probably {pair[0]} "
            "here; name the base that it was trained on, or rename its tensors"
        )
    elif misshapen:
        hint = "the adapter belongs to another base, or its two files do not belong together"
    else:
        hint = "the two files belong to different adapters, or to another base: copy both again"
    message = f"the weights do not fit the model: {'; '.join(parts)} (PEFT: {reason})"
    return UserError(message, file=str(adapter.weights_path), hint=hint)


def _first(names: list[str]) -> str:
    return f"{name_first(names, 1)} {'are' if names[1:] else 'is'}"


def _find_moved(missing: list[str], unexpected: list[str]) -> tuple[str, str] | None:
    """Return a missing and an unexpected tensor of which one name ends as the other does."""
    for wanted in missing:
        own = wanted.removeprefix(_WRAPPER)
        for name in unexpected:
            other = name.removeprefix(_WRAPPER)
            if own.endswith(f".{other}") or other.endswith(f".{own}"):
                return wanted, name
            ends = [text.rpartition("layers.")[2] for text in (own, other)]
            if ends[0] == ends[1] != own:
                return wanted, name
    return None
