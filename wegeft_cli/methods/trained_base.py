"""The base that an adapter was trained on: is it this one, and what if it cannot be loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from wegeft_cli.artifacts.adapter_files import CONFIG_NAME
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.errors import BaseModelError, UserError


class Fingerprinted(Protocol):
    """An adapter, or its manifest."""

    @property
    def base_fingerprint(self) -> str | None:
        """The base's fingerprint, None if unknown."""


class BaseRecord(Fingerprinted, Protocol):
    """What an adapter's manifest records of its base."""

    @property
    def base_model_name_or_path(self) -> str | None:
        """The base's name or path."""


def check_base(
    manifest: BaseRecord,
    base_dir: Path,
    adapter_dir: Path,
    *,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Refuse a base that differs from the one an adapter was trained on.

    Args:
        manifest: The adapter's manifest.
        base_dir: The base's folder.
        adapter_dir: The adapter's folder, for the message.
        warn: Callback for a warning where no comparison can be made.

    Raises:
        UserError: If both fingerprints are known and differ.
    """
    found = fingerprint_base(base_dir) if manifest.base_fingerprint is not None else None
    hint = f"give the right one with --base (it was {manifest.base_model_name_or_path!r})"
    base = f"the base in {str(base_dir)!r}"
    check_fingerprint(manifest, found, base, adapter_dir, hint=hint, warn=warn)


def check_fingerprint(
    manifest: Fingerprinted,
    found: str | None,
    base: str,
    adapter_dir: Path,
    *,
    hint: str,
    warn: Callable[[str], None],
) -> None:
    """Compare a base's fingerprint with the one that an adapter was trained on.

    Args:
        manifest: The adapter, or its manifest.
        found: The base's fingerprint; None if unknown.
        base: Words for the base, for the messages.
        adapter_dir: The adapter's folder, for the message.
        hint: What to do where they differ.
        warn: Callback for a warning where no comparison can be made.

    Raises:
        UserError: If both fingerprints are known and differ.
    """
    expected = manifest.base_fingerprint
    if expected is None or found is None:
        which = (
            "the adapter records no fingerprint" if expected is None else "it has no safetensors"
        )
        warn(f"whether {base} is the adapter's cannot be checked: {which}")
    elif expected != found:
        raise UserError(
            f"{base} is not the one that this adapter was trained on: "
            f"its fingerprint is {found[:19]}..., the adapter's {expected[:19]}...",
            file=str(adapter_dir),
            key="base_fingerprint",
            hint=hint,
        )


@contextmanager
def base_errors(base: str | None, adapter_dir: Path) -> Iterator[None]:
    """Report a base that cannot be loaded under `--base`, or under the adapter's record of it."""
    try:
        yield
    except BaseModelError as fault:
        if base is not None:
            fault.key = "--base"
        else:
            fault.file, fault.key = str(adapter_dir / CONFIG_NAME), "base_model_name_or_path"
            fault.hint = "name the base's folder or hub id with --base"
        raise
