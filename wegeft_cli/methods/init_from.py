"""Starting from an earlier adapter instead of fresh initial values: `adapter.init_from`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from wegeft_cli.artifacts.adapter import Adapter, resolve_adapter_dir
from wegeft_cli.data.sources.paths import find_local
from wegeft_cli.errors import UserError
from wegeft_cli.methods.registry import describe, find_method, method_of
from wegeft_cli.recipe.schema import AdapterSection

_KEY = "adapter.init_from"


def check_init_from(
    section: AdapterSection,
    skeleton: nn.Module,
    recipe_dir: Path,
    *,
    base_dir: Path | None = None,
) -> None:
    """Check, before any weight is loaded, that a recipe can start from its adapter.

    Settings that determine the first step must be equal: it begins where the adapter ended.
    Dropout and view may differ, and `init` has no effect.

    Raises:
        UserError: If there is no such adapter, it is damaged or of another kind, its base is
            another one, or one setting differs.
        ExceptionGroup: If several settings differ.
    """
    if section.init_from is None:
        return
    method, start = find_method(section.type), _open_adapter(section.init_from, recipe_dir)
    _check_method(section.type, start)
    method.check_start(skeleton, section, start, base_dir)


def init_from_adapter(
    model: nn.Module,
    path: str | Path,
    section: AdapterSection,
    *,
    base_fingerprint: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Copy an earlier adapter into a freshly injected model, see `check_init_from`."""
    start = _open_adapter(str(path), None)
    _check_method(section.type, start)
    find_method(section.type).start_from(model, start, base_fingerprint, warn)


def _open_adapter(path: str, recipe_dir: Path | None) -> Adapter:
    try:
        folder = resolve_adapter_dir(find_local(path, recipe_dir) or Path(path).expanduser())
    except UserError as fault:
        fault.key = _KEY
        raise
    return Adapter.open(folder)


def _check_method(name: str, start: Adapter) -> None:
    """Refuse a start across WeGeFT and PEFT; PEFT itself compares its own methods."""
    if method_of(start).has_generators != find_method(name).has_generators:
        raise UserError(
            f"{str(start.folder)!r} is {describe(start)}, and adapter.type is {name!r}",
            key=_KEY,
            hint="give an adapter of the same method, or leave it out",
        )
