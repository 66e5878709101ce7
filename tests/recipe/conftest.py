"""What the tests of recipes share: a folder to write in, and every fault of a load as a list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.load import load_recipe

Write = Callable[..., Path]
FaultsOf = Callable[..., list[UserError]]

SOUND = """\
model: {name_or_path: some/model}
data:
  train:
    - path: rows.json
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file; on request with what every sound recipe needs above it."""

    def write_file(text: str, name: str = "recipe.yaml", *, sound: bool = False) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((SOUND if sound else "") + text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def faults_of() -> FaultsOf:
    """Load a recipe that is at fault and give all of its faults."""

    def load_and_catch(path: Path | str, *overrides: str, **options: bool) -> list[UserError]:
        with pytest.raises((UserError, ExceptionGroup)) as caught:
            load_recipe(path, overrides, **options)
        error = caught.value
        if isinstance(error, UserError):
            return [error]
        faults = list(error.exceptions)
        assert all(isinstance(fault, UserError) for fault in faults)
        return faults

    return load_and_catch
