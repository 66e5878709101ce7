"""`adapter.match_params`: a number of trainable parameters that chooses the rank."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wegeft_cli.recipe.keys import KeyPath
    from wegeft_cli.recipe.schema import AdapterSection

BUDGET_KEY = "adapter.match_params"
_SECTION, _BUDGET, _RANK, _ALPHA = "adapter", "match_params", "r", "alpha"
_PARAMS, _SCALE = "params", "scale"
_FORMS = "a whole number of at least 1, or the path of a recipe whose parameters are counted"


@dataclass(frozen=True)
class ParameterBudget:
    """What a recipe asks for.

    Args:
        params: The number of trainable parameters, or the recipe that has as many.
        scale: alpha / r at any rank; None leaves `adapter.alpha` as it is.
    """

    params: int | str
    scale: float | None = None


@dataclass(frozen=True)
class MatchedRank:
    """The rank that a budget has chosen, as run.json records it.

    Args:
        asked: The value of `adapter.match_params`.
        budget: The number of trainable parameters that it means.
        r: The rank of the nearest number.
        alpha: The value of `adapter.alpha` at that rank.
        trainable_parameters: The number at that rank.
    """

    asked: Any
    budget: int
    r: int
    alpha: float | None
    trainable_parameters: int

    def settle(self, section: AdapterSection) -> AdapterSection:
        """Return a recipe's `adapter` with the rank in place of the budget."""
        return replace(section, r=self.r, alpha=self.alpha, match_params=None)

    def to_json(self) -> dict[str, Any]:
        """Return the values for run.json."""
        return asdict(self)

    @classmethod
    def from_record(cls, values: object, asked: Any) -> MatchedRank | None:
        """Return what run.json records for this value of `adapter.match_params`, if it does."""
        if not isinstance(values, dict) or values.get("asked") != asked:
            return None
        try:
            return cls(**values)
        except TypeError:
            return None


def read_budget(value: Any) -> ParameterBudget:
    """Return a valid value of `adapter.match_params`, see `list_budget_faults`."""
    if isinstance(value, Mapping):
        return ParameterBudget(value[_PARAMS], value.get(_SCALE))
    return ParameterBudget(value)


def with_params(value: Any, params: int | str) -> Any:
    """Return a valid value with another number or path."""
    return {**value, _PARAMS: params} if isinstance(value, Mapping) else params


def list_budget_faults(adapter: AdapterSection, *, has_rank: bool) -> Iterator[tuple[str, str]]:
    """Yield message and hint of each rule that `adapter.match_params` breaks.

    `has_rank` is whether the method reads `adapter.r`.
    """
    value = adapter.match_params
    if value is None:
        return
    if not has_rank:
        yield (
            f"chooses a rank, and {adapter.type!r} has none",
            "remove it, or set another `adapter.type`",
        )
    if adapter.init_from is not None:
        message = "chooses a rank, and `adapter.init_from` keeps the rank of its adapter"
        yield message, "remove one of the two"
    scale = None
    if isinstance(value, Mapping):
        unknown = [str(name) for name in value if name not in (_PARAMS, _SCALE)]
        if unknown or _PARAMS not in value:
            yield f"got {dict(value)!r}", "as a map it has the keys `params` and `scale`"
            return
        value, scale = value[_PARAMS], value.get(_SCALE)
    if isinstance(value, str) and value.strip() and not value.strip().isdecimal():
        pass
    elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
        yield f"must be {_FORMS}; got {value!r}", _hint_number(value)
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0:
        yield f"`scale` must be above 0; got {scale!r}", "it is alpha / r at any rank"
    if adapter.scale_rule != "none":
        message = f"`scale` {scale} contradicts `adapter.scale_rule` {adapter.scale_rule!r}"
        yield message, "keep one of the two"
    if adapter.alpha is not None:
        message = f"`scale` {scale} contradicts `adapter.alpha` {adapter.alpha}"
        yield message, "keep one of the two"


def _hint_number(value: object) -> str:
    text = str(value).strip()
    if text.isdecimal() and int(text) > 0:
        return f"write {int(text)} without quotes"
    if isinstance(value, float) and value.is_integer() and value > 0:
        return f"write {int(value)}"
    return "such as 100000 or other.yaml"


class UnknownScaleError(ValueError):
    """The scale that a budget would keep is interpolated."""


def replace_rank(old: Any, new: dict[str, Any], chosen: Collection[KeyPath]) -> list[KeyPath]:
    """Let a later file or override choose the rank in the other of two ways.

    `adapter.match_params` replaces an earlier `adapter.r`, and the scale of that rank stays.
    `adapter.r` replaces an earlier `adapter.match_params`. Keys in `chosen` stay: the two
    contradict each other there.

    Args:
        old: The values of `adapter` so far, which are changed.
        new: The values of `adapter` that are merged next; a scale is added.
        chosen: Keys that an override has set.

    Returns:
        The keys that were removed.

    Raises:
        UnknownScaleError: If the rank or its alpha is interpolated, and the budget names no scale.
    """
    if not isinstance(old, dict):
        return []
    removed: list[str] = []
    if new.get(_RANK) is not None and _BUDGET not in new:
        removed.append(_BUDGET)
    elif new.get(_BUDGET) is not None and _RANK not in new and _RANK in old:
        if (_SECTION, _RANK) not in chosen:
            removed += [_RANK, *_keep_scale(old, new, (_SECTION, _ALPHA) in chosen)]
    elif new.get(_ALPHA) is not None and isinstance(old.get(_BUDGET), dict):
        old[_BUDGET].pop(_SCALE, None)
    found = [name for name in removed if name in old and (_SECTION, name) not in chosen]
    for name in found:
        del old[name]
    return [(_SECTION, name) for name in found]


def _keep_scale(old: Mapping[str, Any], new: dict[str, Any], is_alpha_chosen: bool) -> list[str]:
    """Turn an earlier alpha and rank into a scale; return the keys that it replaces."""
    rank, alpha, value = old[_RANK], old.get(_ALPHA), new[_BUDGET]
    if alpha is None or is_alpha_chosen or _ALPHA in new:
        return []
    if any(isinstance(each, str) and "${" in each for each in (rank, alpha)):
        if isinstance(value, dict) and value.get(_SCALE) is not None:
            return [_ALPHA]
        raise UnknownScaleError(
            f"replaces `adapter.r`, and the scale of r {rank!r} and alpha {alpha!r} is not known "
            "before they are interpolated"
        )
    if not all(isinstance(each, int | float) for each in (rank, alpha)) or rank <= 0:
        return []
    if not isinstance(value, dict):
        new[_BUDGET] = {_PARAMS: value, _SCALE: alpha / rank}
    elif value.get(_SCALE) is None:
        new[_BUDGET] = {**value, _SCALE: alpha / rank}
    return [_ALPHA]
