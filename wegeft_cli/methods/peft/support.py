"""Which of PEFT's methods a recipe can name, since which PEFT, and why the others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import Recipe

ADDED_IN = {
    **dict.fromkeys(("adamss", "gralora", "peanut", "psoft", "pvera", "tinylora"), "0.19"),
    **dict.fromkeys(("beft", "deft", "frod", "glora", "hira", "unilora"), "0.20"),
    "supertuning": "0.21",
}
"""Method -> the first PEFT that has it, where that is newer than the oldest supported one."""

_PROMPT = "it learns a prompt in front of the rows, which no weight can hold and no merge can fold"
UNSUPPORTED = {
    "prompt_tuning": (_PROMPT, "lora"),
    "multitask_prompt_tuning": (_PROMPT, "lora"),
    "p_tuning": (_PROMPT, "lora"),
    "prefix_tuning": (_PROMPT, "lora"),
    "cpt": (_PROMPT, "lora"),
    "cartridge": (_PROMPT, "lora"),
    "adaption_prompt": (_PROMPT, "lora"),
    "poly": ("each row needs the id of its task, which rows do not state", "lora"),
    "xlora": (
        "it mixes adapters that are trained already, by a gate that cannot be merged",
        "lora",
    ),
    "lily": ("PEFT cannot merge it", "vblora"),
    "shadow": ("it runs a second network beside the base, which cannot be merged", "lora"),
    "bone": ("PEFT 0.19 removed it in favor of `miss`", "miss"),
    "trainable_tokens": (
        "it trains rows of the embedding, and no linear layer",
        "lora` with `adapter.peft.trainable_token_indices`, or `adapter.modules_to_save: "
        "[embed_tokens]",
    ),
}
"""Type of PEFT -> (why it is refused, what to use instead)."""

_DENSE_ONLY = frozenset({
    "adamss", "beft", "deft", "frod", "glora", "gralora", "osf", "peanut", "psoft", "shira",
    "supertuning", "tinylora", "unilora",
})  # fmt: skip
# Options that need a call after each step, which PEFT's own Trainer callback makes.
_OPTIONS = {
    "use_asa": "chooses subspaces by a callback of transformers' Trainer",
    "target_svd_config": "is built from the weights, which a recipe does not hold",
}


def explain_name(name: str) -> tuple[str, str] | None:
    """Return why PEFT's method is refused and the nearest alternative; None for another name."""
    found = UNSUPPORTED.get(name.lower())
    return None if found is None else (found[0], f"use `{found[1]}`")


def check_support(recipe: Recipe) -> Iterator[Fault]:
    """Yield options and bases that a method of PEFT is refused with."""
    adapter = recipe.adapter
    for name, reason in _OPTIONS.items():
        if adapter.peft.get(name):
            yield f"adapter.peft.{name}", reason, "remove it"
    if adapter.type in _DENSE_ONLY:
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(recipe.model, name):
                message = f"PEFT's {adapter.type!r} does not adapt quantized layers"
                hint = "remove it, or use `adapter.type: lora`"
                yield f"model.{name}", message, hint


NEED_WEIGHTS = frozenset({"adamss", "frod", "shira"})
"""Methods that PEFT cannot build on a model without weights, see `count_layer`."""


def count_layer(name: str, config: Any, d_in: int, d_out: int) -> int:
    """Return what one of `NEED_WEIGHTS` learns of one layer.

    Raises:
        UserError: If the rank is too large for the layer.
    """
    if name == "shira":
        if config.r * (d_in + d_out) > d_in * d_out:
            raise UserError(
                f"rank {config.r} trains more entries than a layer of {d_out} x {d_in} has",
                key="adapter.r",
                hint=f"at most {d_in * d_out // (d_in + d_out)}",
            )
        return int(config.r * (d_in + d_out))
    if name == "frod":
        rate, off_diagonal = config.sparse_rate, d_in * (d_in - 1)
        entries = min(int(d_in * d_in * rate), off_diagonal)
        return d_in + (max(1, entries) if rate > 0 and off_diagonal else entries)
    spaces, width = min(config.num_subspaces, d_out), min(config.r, d_in, d_out)
    return int(config.subspace_rank * (d_out + spaces * width))
