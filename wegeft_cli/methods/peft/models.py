"""PEFT's methods as baselines in the same recipe: build, save and load by their PEFT names."""

from __future__ import annotations

import difflib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.methods.wegeft.equations import default_alpha
from wegeft_cli.methods.wegeft.trained_modules import find_saved_modules
from wegeft_cli.models.file_names import current_names, rename_layers
from wegeft_cli.storage.safetensors_reader import load_tensors

# Recipe names that are settings of another method rather than methods of their own.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
}
_WRAPPER = "base_model.model."
# AdaLoRA needs its number of steps when it is built; `RankBudget` later sets the run's.
_UNKNOWN_STEPS = 2**31
# What a start from another adapter may differ in: the record, and what acts while training alone.
# The tensors determine the layers, for every way of naming them.
_FREE_TO_DIFFER = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type",
    "peft_version", "revision", "runtime_config", "target_modules", "task_type",
})  # fmt: skip


def first_rank(rank: int, options: Mapping[str, Any]) -> int:
    """Return the initial rank of every layer: `adapter.peft.init_r`, else 1.5 times `adapter.r`."""
    return options.get("init_r", (3 * rank + 1) // 2)


def inject_peft(model: nn.Module, config: Any, modules_to_save: Sequence[str] = ()) -> nn.Module:
    """Wrap a model in the PEFT method of a config, see `build_config`.

    Raises:
        UserError: If the method trains no module whole, or a module cannot be trained whole.
        ExceptionGroup: If several modules cannot.
    """
    import peft

    if modules_to_save:
        if not hasattr(config, "modules_to_save"):
            message = f"PEFT's {config.peft_type.value.lower()!r} trains no module whole"
            raise UserError(message, key="adapter.modules_to_save", hint="leave it empty")
        # Full names: PEFT takes any module whose name ends with the text, and says nothing of a
        # text that ends none, or of a tied module.
        config.modules_to_save = find_saved_modules(model, modules_to_save)

    try:
        with _without_future_warnings():
            # On a model without weights nothing is drawn or computed from them (PiSSA's SVD).
            is_empty = any(parameter.is_meta for parameter in model.parameters())
            return peft.get_peft_model(model, config, low_cpu_mem_usage=is_empty)
    except ValueError as error:
        raise UserError(str(error).splitlines()[0], key="adapter.target_modules") from error


def load_peft(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Load a PEFT adapter onto its base and return PEFT's model, in evaluation mode."""
    peft = _import_peft()
    folder = str(adapter.folder)
    if not adapter.weights_path.is_file():
        raise UserError("the adapter has no adapter_model.safetensors", file=folder)
    _check_runs_nothing(adapter)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with _named_as_in_model(model, adapter) as current:
                loaded = peft.PeftModel.from_pretrained(model, current).eval()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # odd values of the config raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"PEFT cannot load the adapter: {reason}", file=folder) from error
    # PEFT only warns of missing weights and keeps fresh ones.
    if any("missing adapter keys" in str(warning.message) for warning in caught):
        raise UserError(
            "the weights are not those that adapter_config.json speaks of",
            file=str(adapter.weights_path),
            hint="this file belongs to another adapter: copy both files again",
        )
    return loaded


@contextmanager
def _named_as_in_model(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    """Yield the adapter's folder, or a copy of it where transformers has renamed its modules."""
    config = dict(adapter.config)
    asked = {key: config.get(key) for key in ("target_modules", "modules_to_save")}
    current = {key: current_names(model, value) for key, value in asked.items() if value}
    if all(asked[key] == names for key, names in current.items()):
        yield str(adapter.folder)
        return
    tensors = load_tensors(adapter.weights_path)
    inner = {name.removeprefix(_WRAPPER): tensor for name, tensor in tensors.items()}
    renamed = rename_layers(model, inner)
    with tempfile.TemporaryDirectory(prefix="wegeft-peft-") as folder:
        (Path(folder) / CONFIG_NAME).write_text(json.dumps({**config, **current}))
        tensors = {_WRAPPER + renamed[name]: tensor for name, tensor in inner.items()}
        save_file(tensors, Path(folder) / WEIGHTS_NAME, metadata={"format": "pt"})
        yield folder


def _check_runs_nothing(adapter: Adapter) -> None:
    """Refuse settings by which PEFT imports a module, or runs a tokenizer's code, of a config."""
    for key in ("megatron_config", "tokenizer_kwargs"):
        if adapter.config.get(key):
            raise UserError(
                "by this setting code could run that the adapter names",
                file=str(adapter.config_path),
                key=key,
                hint="set it to null, if you trust the adapter",
            )


def save_peft(model: Any, adapter_dir: Path, *, base_model_name_or_path: str) -> None:
    """Write a PEFT model's adapter as PEFT does, into a folder that exists."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_model_name_or_path
    with warnings.catch_warnings():
        # AdaLoRA may leave a layer no rank at all; PEFT suspects an engine that shards.
        warnings.filterwarnings("ignore", r".*LoRA tensor\(s\) have invalid shape")
        # Embeddings are never trained here; "auto" would ask a hub whether they were resized.
        model.save_pretrained(
            str(adapter_dir), safe_serialization=True, save_embedding_layers=False
        )


def merge_peft(model: Any) -> tuple[nn.Module, int]:
    """Fold a PEFT model's adapter into its base, as PEFT does, and take PEFT off.

    Raises:
        UserError: If the method cannot be merged.
    """
    from peft.utils import ModulesToSaveWrapper

    num_folded = sum(
        hasattr(module, "merged_adapters") or isinstance(module, ModulesToSaveWrapper)
        for module in model.modules()
    )
    try:
        return model.merge_and_unload(safe_merge=True), num_folded
    except (ValueError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"PEFT cannot merge this method: {reason}") from error


def check_peft_start(
    name: str, *, rank: int, alpha: float | None, options: Mapping[str, Any], adapter_dir: Path
) -> None:
    """Check, before there is a model, that a method can start from an adapter.

    Raises:
        UserError: If the adapter is of another method, or a setting differs.
        ExceptionGroup: If several settings differ.
    """
    config = build_config(name, rank, alpha, "all-linear", options, "CAUSAL_LM")
    import peft

    try:
        theirs = peft.PeftConfig.from_pretrained(str(adapter_dir))
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"PEFT cannot read the adapter: {reason}", file=str(adapter_dir)) from error
    if theirs.peft_type != config.peft_type:
        raise UserError(
            f"{str(adapter_dir)!r} is a {theirs.peft_type.value} adapter, "
            f"and adapter.type is {name!r}",
            key="adapter.init_from",
        )
    keys = {"r": "adapter.r", f"{_method_of(name)}_alpha": "adapter.alpha"}
    raise_all(
        [
            UserError(
                f"{field} is {_plain(value)!r}, in the adapter of adapter.init_from "
                f"{_plain(getattr(theirs, field, None))!r}",
                key=keys.get(field, f"adapter.peft.{field}"),
                hint="a start from an adapter keeps its settings",
            )
            for field, value in vars(config).items()
            if field not in _FREE_TO_DIFFER
            and "dropout" not in field
            and _plain(value) != _plain(getattr(theirs, field, None))
        ]
    )


def start_from_peft(model: Any, adapter_dir: Path) -> None:
    """Put an adapter's tensors into a fresh PEFT model of the same settings.

    Raises:
        UserError: If the adapter is unreadable, or has other layers or shapes.
        ExceptionGroup: If several differ.
    """
    import peft

    try:
        tensors = peft.utils.load_peft_weights(str(adapter_dir), device="cpu")
    except (ValueError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"PEFT cannot load the adapter: {reason}", file=str(adapter_dir)) from error
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    names = sorted(own.keys() | tensors.keys())
    differing = [
        (name, [list(t[name].shape) if name in t else None for t in (own, tensors)])
        for name in names
    ]
    differing = [(name, shapes) for name, shapes in differing if shapes[0] != shapes[1]]
    if differing:
        name, (ours, theirs) = differing[0]
        raise UserError(
            f"{len(differing)} of {len(names)} tensors differ from those of {str(adapter_dir)!r}; "
            f"the first is {name}: {ours or 'not'} here, {theirs or 'not'} there",
            key="adapter.init_from",
            hint="give the same adapter.target_modules and adapter.modules_to_save",
        )
    peft.set_peft_model_state_dict(model, tensors)


def _plain(value: Any) -> Any:
    """Return a setting as JSON keeps it, so that what was read equals what was written."""
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    return getattr(value, "value", value)


def _method_of(name: str) -> str:
    return _VARIANTS.get(name, (name, {}))[0]


@contextmanager
def _without_future_warnings() -> Iterator[None]:
    """Keep quiet that PEFT asks transformers by names that are on their way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "the baselines need the package peft",
            key="adapter.type",
            hint="pip install 'wegeft-cli[peft]'",
        ) from error
    return peft


def build_config(
    name: str,
    rank: int,
    alpha: float | None,
    target_modules: str | Sequence[str],
    options: Mapping[str, Any],
    task_type: str | None,
) -> Any:
    """Return the config of a PEFT method (lora, adalora, ia3, vera, ...) or dora, rslora, pissa.

    `alpha` becomes `<method>_alpha` where the method has one. Default: 2 r.

    Raises:
        UserError: If PEFT is not installed, or has no such method or option.
    """
    _import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    method, preset = _VARIANTS.get(name, (name, {}))
    configs = {
        str(getattr(k, "value", k)).lower(): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if method not in configs:
        raise UserError(f"PEFT has no method {name!r}", key="adapter.type")
    config_class = configs[method]
    fields = config_class.__dataclass_fields__
    unknown = [key for key in options if key not in fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        raise UserError(
            f"{config_class.__name__} has no option {unknown[0]!r}",
            key=f"adapter.peft.{unknown[0]}",
            hint=f"did you mean `{near[0]}`?"
            if near
            else "its options: " + ", ".join(sorted(fields)),
        )
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    offered = {
        "r": rank,
        "target_modules": targets,
        "task_type": task_type,
        f"{method}_alpha": default_alpha(rank) if alpha is None else alpha,
    }
    if method == "adalora":
        offered |= {"target_r": rank, "init_r": first_rank(rank, options)}
        offered |= {"lora_alpha": offered["adalora_alpha"], "total_step": _UNKNOWN_STEPS}
        del offered["r"]  # it has none, and warns of one
    if method == "oft":  # takes the one or the other
        offered |= {"r": 0} if options.get("oft_block_size") else {"oft_block_size": 0}
    values = {key: value for key, value in offered.items() if key in fields}
    try:
        return config_class(**{**values, **preset, **options})
    except (TypeError, ValueError) as error:
        raise UserError(str(error).splitlines()[0], key="adapter.peft") from error
