"""Test sets from the hub, with every failure of the way there told as one error."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.rows import PlacedRow


@dataclass(frozen=True)
class HubSource:
    """Where a set lies on the hub; the split is the one that the published numbers use."""

    path: str
    split: str
    name: str | None = None

    def __str__(self) -> str:
        return "/".join(part for part in (self.path, self.name, self.split) if part)


def load_hub_rows(source: HubSource, *, layout: str) -> tuple[list[PlacedRow], str]:
    """The rows of a set on the hub (or in its local cache); no code from there is run.

    Args:
        source: The set.
        layout: What the user can do without the hub.

    Returns:
        The rows, and the SHA-256 of the rows as JSON lines with sorted keys.

    Raises:
        UserError: If the set cannot be had, for whatever reason.
    """
    import datasets

    try:
        table = datasets.load_dataset(source.path, source.name, split=source.split)
        values = [dict(row) for row in table]
    except Exception as error:
        # The hub's client and its HTTP library raise errors of many unrelated types, and whatever
        # went wrong, the way out is the same.
        raise UserError(
            f"could not be loaded from the hub: {error}",
            file=str(source),
            key="--data-dir",
            hint=f"without the hub, {layout}",
        ) from error
    digest = hashlib.sha256()
    for value in values:
        line = json.dumps(value, sort_keys=True, default=str) + "\n"
        digest.update(line.encode())
    rows = [PlacedRow(f"{source}: row {index}", value) for index, value in enumerate(values)]
    return rows, digest.hexdigest()
