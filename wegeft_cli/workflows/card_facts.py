"""What a model card tells of a run and of a base, read from their files where they are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wegeft_cli.checkpoints.strict_json import read_json
from wegeft_cli.errors import UserError
from wegeft_cli.interop.secrets import mask_secrets
from wegeft_cli.models.base import find_base_folder
from wegeft_cli.recipe.load import recipe_to_yaml
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.workflows.run_folder import SCORES_END, find_recipe_of

_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter.

    Args:
        base: The base's name or path.
        revision: Its hub revision.
        recipe: The resolved recipe of its run.
        run: The run's run.json.
        scores: The results of `wegeft eval` on it, each with the base's score where it was asked.
    """

    base: str
    revision: str | None = None
    recipe: Recipe | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    scores: Sequence[Mapping[str, Any]] = ()

    @property
    def is_on_hub(self) -> bool:
        """Whether the base's name is one that others can use."""
        return not Path(self.base).expanduser().exists() and self.base.count("/") <= 1

    def find_licence(self) -> tuple[str | None, bool]:
        """Give the licence that the base's card states, and whether a licence lies beside it."""
        folder = find_base_folder(self.base, self.revision)
        if folder is None:
            return None, False
        has_file = any((folder / name).is_file() for name in _LICENCE_FILES)
        return _read_licence(folder / "README.md"), has_file

    def recipe_text(self) -> str:
        """Give the recipe as YAML, without secrets; empty where there is none."""
        return "" if self.recipe is None else mask_secrets(recipe_to_yaml(self.recipe))


def read_facts(adapter_dir: Path, base: str, revision: str | None) -> Facts:
    """Read what the run left that an adapter belongs to.

    Args:
        adapter_dir: The adapter's folder.
        base: The base's name or path.
        revision: Its hub revision.

    Returns:
        What is known.

    Raises:
        UserError: If the run's recipe is damaged.
    """
    recipe = find_recipe_of(adapter_dir)
    if recipe is None:
        return Facts(base, revision)
    run_dir = adapter_dir if (adapter_dir / "run.json").is_file() else adapter_dir.parent
    run = _read_object(run_dir / "run.json")
    scores: list[Mapping[str, Any]] = []
    for path in sorted((run_dir / "eval").glob(f"adapter*{SCORES_END}")):
        scores += _read_scores(_read_object(path))
    return Facts(base, revision, recipe, run, scores)


def _read_object(path: Path) -> dict[str, Any]:
    """A card must not fail for a damaged record."""
    try:
        values = read_json(path, allow_nan=True)
    except UserError:
        return {}
    return values if isinstance(values, dict) else {}


def _read_scores(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    results, bases = values.get("results"), values.get("base_results")
    if not isinstance(results, list):
        return []
    rows = [row for row in results if isinstance(row, dict) and "task" in row and "score" in row]
    told = {row["task"]: row["score"] for row in bases or [] if isinstance(row, dict)}
    return [{**row, "base_score": told.get(row["task"])} for row in rows]


def _read_licence(card: Path) -> str | None:
    from huggingface_hub import metadata_load

    try:
        values = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, TypeError):
        return None
    licence = values.get("license") if isinstance(values, dict) else None
    return licence if isinstance(licence, str) else None
