"""Which adapters can be added up into one, and the settings of their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from wegeft_cli.interop.peft_tuner.config import WegeftConfig

if TYPE_CHECKING:
    from wegeft_cli.interop.peft_tuner.model import WegeftModel


def sum_configs(
    tuner: WegeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> WegeftConfig:
    """Return the settings of a weighted sum of adapters: the ranks add up, the scale is 1.

    Raises:
        ValueError: If the adapters cannot be added up as pairs of factors.
    """
    known = list(tuner.peft_config)
    unknown = [name for name in adapters if name not in known]
    if unknown or not adapters:
        raise ValueError(f"Adapter(s) {unknown or 'none'} not found in {known}")
    if adapter_name in known:
        raise ValueError(f"Adapter with name {adapter_name!r} already exists")
    if len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters, but {len(weights)} weights")
    if combination_type != "cat":
        raise ValueError(
            f"`combination_type` must be 'cat', got {combination_type!r}: a sum of pairs is no "
            "pair of the same rank, and pairs cannot be averaged factor by factor"
        )
    configs = [tuner.peft_config[name] for name in adapters]
    groups = [tuner.groups_of(name) for name in adapters]
    if any(other != groups[0] for other in groups) or len({c.side for c in configs}) > 1:
        raise ValueError(
            f"the adapters {list(adapters)} differ in their layers, groups or `side` and have no "
            "common pairs: merge them one by one instead"
        )
    if any(config.modules_to_save for config in configs):
        raise ValueError("adapters with `modules_to_save` cannot be added up")
    rank = sum(config.r for config in configs)
    made = replace(configs[0], r=rank, alpha=float(rank), scale=None, dropout=0.0, init_from=None)
    made.is_searched = configs[0].is_searched
    return made
