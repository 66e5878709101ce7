"""PEFT's methods as baselines in the same recipe: build, save and load by their PEFT names."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from wegeft_cli.errors import UserError

# Recipe names that are settings of another method rather than methods of their own.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
}


def inject_peft(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float | None,
    target_modules: str | Sequence[str],
    options: Mapping[str, Any],
    task_type: str = "CAUSAL_LM",
) -> nn.Module:
    """Wrap a model in a PEFT method.

    Args:
        model: The base model.
        name: A PEFT method (lora, adalora, ia3, vera, ...) or dora, rslora, pissa.
        rank: Given as `r` (`init_r` and `target_r` for AdaLoRA) where the method has one.
        alpha: Given as `<method>_alpha` where the method has one; None takes 2 r.
        target_modules: As in a recipe; `all-linear` is PEFT's word too.
        options: Keys of the method's own config; they win over the ones above.
        task_type: PEFT's name of the task.

    Returns:
        The PEFT model, in training order.

    Raises:
        UserError: If PEFT is not installed, or knows no such method or option.
    """
    config = _build_config(name, rank, alpha, target_modules, options, task_type)
    import peft

    try:
        with _without_future_warnings():
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(str(error).splitlines()[0], key="adapter.target_modules") from error


def load_peft(model: nn.Module, adapter_dir: Path) -> nn.Module:
    """Put a PEFT adapter from its folder onto a base model.

    Args:
        model: The base model.
        adapter_dir: A folder with adapter_config.json and adapter_model.safetensors.

    Returns:
        The PEFT model in evaluation mode.

    Raises:
        UserError: If PEFT is not installed or cannot read the folder.
    """
    peft = _import_peft()
    if not (adapter_dir / "adapter_model.safetensors").is_file():
        raise UserError("the adapter has no adapter_model.safetensors", file=str(adapter_dir))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = peft.PeftModel.from_pretrained(model, str(adapter_dir)).eval()
    except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"PEFT cannot load the adapter: {reason}", file=str(adapter_dir)) from error
    # Of weights that are not there PEFT only warns, and would go on with fresh ones.
    if any("missing adapter keys" in str(warning.message) for warning in caught):
        raise UserError(
            "the weights are not those that adapter_config.json speaks of",
            file=str(adapter_dir / "adapter_model.safetensors"),
            hint="this file belongs to another adapter: copy both files again",
        )
    return loaded


def save_peft(model: Any, adapter_dir: Path, *, base_model_name_or_path: str) -> None:
    """Write a PEFT model's adapter as PEFT does, into a folder that exists."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_model_name_or_path
    # Embeddings are never trained here; "auto" would ask a hub whether they were resized.
    model.save_pretrained(str(adapter_dir), safe_serialization=True, save_embedding_layers=False)


def merge_peft(model: Any) -> tuple[nn.Module, int]:
    """Fold a PEFT model's adapter into its base, as PEFT does, and take PEFT off.

    Args:
        model: The PEFT model.

    Returns:
        The base with folded weights, and how many layers were folded.

    Raises:
        UserError: If the method cannot be merged.
    """
    num_folded = sum(1 for module in model.modules() if hasattr(module, "merged_adapters"))
    try:
        return model.merge_and_unload(safe_merge=True), num_folded
    except (ValueError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"PEFT cannot merge this method: {reason}") from error


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


def _build_config(
    name: str,
    rank: int,
    alpha: float | None,
    target_modules: str | Sequence[str],
    options: Mapping[str, Any],
    task_type: str,
) -> Any:
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
        f"{method}_alpha": 2 * rank if alpha is None else alpha,
    }
    if method == "adalora":
        offered |= {"init_r": rank, "target_r": rank, "lora_alpha": offered["adalora_alpha"]}
    values = {key: value for key, value in offered.items() if key in fields}
    try:
        return config_class(**{**values, **preset, **options})
    except (TypeError, ValueError) as error:
        raise UserError(str(error).splitlines()[0], key="adapter.peft") from error
