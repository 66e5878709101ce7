"""Logit differences of a LoRA export and of a merge from the original adapter."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import BaseModelError, MachineError
from wegeft_cli.methods.registry import method_of
from wegeft_cli.models.loading import load_model, load_tokenizer

PROMPTS = (
    "The capital of France is",
    "A farmer has 17 sheep and buys 25 more. How many sheep does the farmer have now?",
    "def add(a, b):\n    return",
    "Question: Why is the sky blue?\nAnswer:",
)
"""Default prompts of the parity report."""

_SPARE = 1.3  # logits, factors and the pairs of the export need room beside the model
_GIB = 2**30


def measure_parity(
    base_dir: Path,
    adapter: Adapter,
    lora_dir: Path,
    *,
    prompts: Sequence[str],
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Compare the logits of adapter, LoRA export (in stock PEFT) and merge on the same prompts.

    In float32, and in the base's own type where that is another and float32 is not all there is.
    """
    report: dict[str, Any] = {"is_measured": False, "prompts": list(prompts)}
    if find_spec("peft") is None:
        return report | {"reason": "the package peft is not installed"}
    try:
        tokenizer = load_tokenizer(str(base_dir), trust_remote_code=trust_remote_code)
        rows = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in prompts]
        rows = [row for row in rows if row.numel()]
        if not rows:
            return report | {"reason": "the prompts hold no token"}
        results: list[dict[str, Any]] = []
        effects: list[dict[str, Any]] = []
        stored: str | None = None
        for dtype in ("float32", "auto"):
            model = _load(base_dir, dtype, trust_remote_code)
            told = str(next(model.parameters()).dtype).removeprefix("torch.")
            if dtype == "auto" and told == "float32":
                break
            stored = told
            base, adapted, merged, lora = _compute(model, adapter, lora_dir, rows)
            effects.append({"dtype": told, "effect": float((adapted - base).abs().max())})
            results += [
                {"dtype": told, "pair": f"adapter and {name}", **_compare(adapted, other)}
                for name, other in (("LoRA equivalent in PEFT", lora), ("merged", merged))
            ]
            del model
    except (MachineError, BaseModelError) as error:
        return report | {"reason": error.message}
    report |= {
        "is_measured": True,
        "num_positions": sum(row.numel() for row in rows),
        "stored_dtype": stored,
        "effects": effects,
        "results": results,
    }
    return report


def _load(base_dir: Path, dtype: str, trust_remote_code: bool) -> nn.Module:
    num_bytes = sum(path.stat().st_size for path in base_dir.glob("*.safetensors"))
    needed = _SPARE * num_bytes * (2 if dtype == "float32" else 1)
    free = psutil.virtual_memory().available
    if needed > free:
        raise MachineError(
            f"the base needs about {needed / _GIB:.1f} GiB of memory, {free / _GIB:.1f} are free"
        )
    return load_model(str(base_dir), dtype=dtype, trust_remote_code=trust_remote_code)


def _compute(
    model: nn.Module, adapter: Adapter, lora_dir: Path, rows: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return float32 logits of base, adapter, merge and LoRA export, [positions, vocabulary]."""
    from wegeft_cli.methods.peft.loading import load_peft

    base = _logits(model, rows)
    peft_model: Any = load_peft(model, Adapter.open(lora_dir))
    lora = _logits(peft_model, rows)
    model = peft_model.unload()
    method = method_of(adapter)
    model = method.load(model, adapter, base_dir=None, warn=lambda text: None).eval()
    adapted = _logits(model, rows)
    model, _ = method.fold(model, adapter)
    return base, adapted, _logits(model, rows), lora


def _logits(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=row).logits[0].float() for row in rows])


def _compare(one: Tensor, two: Tensor) -> dict[str, float]:
    difference = (one - two).abs()
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "max_logit": float(one.abs().max()),
        "same_top_token": float((one.argmax(-1) == two.argmax(-1)).float().mean()),
    }
