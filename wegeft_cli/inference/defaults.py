"""Decoding of `generate`, `chat` and `serve` where nothing else is set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import context_length
from wegeft_cli.inference.loaded_model import LoadedModel
from wegeft_cli.inference.prompt_format import PromptForm

DEFAULT_NEW_TOKENS = 512
GREEDY = Decoding(DEFAULT_NEW_TOKENS)


def default_new_tokens(model: Any) -> int:
    """Return the default length of an answer: 512 tokens, or half of a smaller context."""
    context = context_length(model)
    return DEFAULT_NEW_TOKENS if context is None else min(DEFAULT_NEW_TOKENS, max(1, context // 2))


def describe_target(opened: LoadedModel, path: str | Path, form: PromptForm) -> str:
    """Return one line about the model and its prompt format."""
    return f"{opened.kind} {path}, prompt format {form.name} ({form.why})"
