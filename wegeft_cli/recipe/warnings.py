"""Warnings about the values of a valid recipe: a very large learning rate, a secret."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from wegeft_cli.recipe.schema import Recipe

_LARGEST_USUAL_RATE = 1.0
# Hugging Face, OpenAI and Anthropic, GitHub, AWS, Google, Slack.
_SECRET = re.compile(
    r"\b(hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}"
    r"|AIza[\w-]{30,}|xox[abpr]-[\w-]{10,})"
)


def list_warnings(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence for each value that is allowed and probably a mistake."""
    rate = recipe.train.learning_rate
    if rate > _LARGEST_USUAL_RATE:
        yield f"train.learning_rate is {rate:g}, far above usual values such as 1e-4; is it a typo?"
    for key in _find_secrets(asdict(recipe)):
        yield (
            f"{key} looks like a secret key; recipe.yaml, reports and trackers will contain it. "
            "Remove it here, revoke it, and set secrets in the environment"
        )


def _find_secrets(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _find_secrets(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for position, each in enumerate(value):
            yield from _find_secrets(each, f"{key}[{position}]")
    elif isinstance(value, str) and _SECRET.search(value):
        yield key
