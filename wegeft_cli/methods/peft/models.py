"""PEFT's methods as baselines in the same recipe: build, save and merge by their PEFT names."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from wegeft_cli.artifacts.adapter_files import CONFIG_NAME
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.methods.layers.trained_modules import find_saved_modules
from wegeft_cli.methods.peft.support import ADDED_IN
from wegeft_cli.methods.wegeft.equations import default_alpha

# Recipe names that are settings of another method rather than methods of their own.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
}
# AdaLoRA needs its number of steps when it is built; `RankBudget` later sets the run's.
_UNKNOWN_STEPS = 2**31
# What a start from another adapter may differ in: the record, and what acts while training alone.
# The tensors determine the layers, for every way of naming them.
_FREE_TO_DIFFER = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "modules_to_save", "peft_type", "peft_version", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type",
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
        with _without_warnings():
            # On a model without weights nothing is drawn or computed from them (PiSSA's SVD).
            is_empty = any(parameter.is_meta for parameter in model.parameters())
            wrapped = peft.get_peft_model(model, config, low_cpu_mem_usage=is_empty)
    except (TypeError, ValueError) as error:
        if isinstance(error, TypeError) and "support" not in str(error):
            raise
        raise UserError(str(error).splitlines()[0], key="adapter.target_modules") from error
    _name_feedforward(config)
    _check_biases(wrapped, config)
    return wrapped


def _name_feedforward(config: Any) -> None:
    """Name IA3's feedforward layers in full where its targets are: PEFT reads no other."""
    targets, ends = config.target_modules, getattr(config, "feedforward_modules", None)
    if isinstance(targets, set) and isinstance(ends, set) and not ends <= targets:
        config.feedforward_modules = {name for name in targets if name.endswith(tuple(ends))}


def _check_biases(wrapped: nn.Module, config: Any) -> None:
    """Refuse BEFT on layers without a bias, into which PEFT could not merge it."""
    for name, module in wrapped.named_modules():
        if hasattr(module, "beft_bias") and module.get_base_layer().bias is None:
            raise UserError(
                f"{name.removeprefix('base_model.model.')!r} has no bias, and "
                f"{config.peft_type.value.lower()!r} could not be merged into it",
                key="adapter.target_modules",
                hint="name layers with a bias",
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
    # PEFT writes its sets in the order of this process's hashes.
    path = adapter_dir / CONFIG_NAME
    values = json.loads(path.read_text(encoding="utf-8"))
    for key, value in vars(model.peft_config[model.active_adapter]).items():
        if isinstance(value, set) and key in values:
            values[key] = sorted(value)
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


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


def _plain(value: Any) -> Any:
    """Return a setting as JSON keeps it, so that what was read equals what was written."""
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    return getattr(value, "value", value)


def _method_of(name: str) -> str:
    return _VARIANTS.get(name, (name, {}))[0]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep quiet that PEFT asks transformers by names that are on their way out.

    LN tuning also warns of each norm that it is no linear layer, and BEFT of layers that are then
    refused.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Unsupported layer type")
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias")
        yield


def import_peft() -> Any:
    """Import PEFT; raise UserError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "the baselines need the package peft",
            key="adapter.type",
            hint="pip install 'wegeft-cli[peft]'",
        ) from error
    return peft


def _no_such_method(name: str) -> UserError:
    import peft

    message = f"PEFT {peft.__version__} has no method {name!r}"
    since = ADDED_IN.get(name)
    hint = None if since is None else f"pip install 'peft>={since}'"
    return UserError(message, key="adapter.type", hint=hint)


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
    import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    method, preset = _VARIANTS.get(name, (name, {}))
    configs = {
        str(getattr(k, "value", k)).lower(): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if method not in configs:
        raise _no_such_method(name)
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
    if "alpha" in fields and alpha is not None:
        offered["alpha"] = alpha
    if method == "supertuning":  # alone it learns entries of W; a rank adds LoRA to them
        del offered["r"]
    if method == "oft":  # takes the one or the other
        offered |= {"r": 0} if options.get("oft_block_size") else {"oft_block_size": 0}
    values = {key: value for key, value in offered.items() if key in fields}
    try:
        return config_class(**{**values, **preset, **options})
    except (TypeError, ValueError) as error:
        raise UserError(str(error).splitlines()[0], key="adapter.peft") from error
