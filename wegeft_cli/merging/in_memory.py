"""Merging in memory: load the base, put the adapter on it, fold, and return the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.methods.registry import load_onto, method_of
from wegeft_cli.models.base_folder import special_token_files
from wegeft_cli.models.loading import load_model, load_tokenizer_of, quiet_transformers
from wegeft_cli.recipe.schema import ModelSection
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.storage.atomic import atomic_folder, check_free_space
from wegeft_cli.storage.safetensors_reader import list_tensors

_MAX_SHARD = "50GB"  # transformers' default


@dataclass(frozen=True)
class OutputFormat:
    """How a merged model is written.

    Args:
        folder: The folder.
        dtype: Type of all floating tensors. Default: the base's.
        max_shard_size: Largest size of a file's tensors, such as 5GB.
        texts: File name -> text of a file that is written beside the weights.
        chat_template: Chat template of the folder. Default: the base's.
        special_tokens: Special tokens of the folder that replace the base's.
    """

    folder: Path
    dtype: str | None = None
    max_shard_size: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def is_whole(adapter: Adapter) -> bool:
    """Return whether an adapter has a head, or is the base's own parameters."""
    return method_of(adapter).trains_in_place or adapter.head is not None


def fold_onto(
    model: Any, adapter: Adapter, section: ModelSection, reporter: Reporter | None = None
) -> tuple[Any, int]:
    """Load an adapter onto its base and fold it; return the model and the number of changes."""
    reporter = reporter or SilentReporter()
    model = load_onto(model, adapter, section, warn=reporter.warn)
    return method_of(adapter).fold(model, adapter)


def fold_whole(
    section: ModelSection, adapter: Adapter, dtype: str | None, reporter: Reporter
) -> tuple[Any, Any, int]:
    """Fold an adapter with a head, or of the base's own parameters, into its base.

    Args:
        dtype: The type that the result will be stored in; None is the base's, or float32 where the
            base's own weights were trained, which 16 bits would round.

    Raises:
        UserError: If the adapter is damaged, or belongs to another base.
    """
    # Imported here, so that a streamed merge does not load them.
    from wegeft_cli.inference.loaded_model import head_of
    from wegeft_cli.models.heads import check_provided
    from wegeft_cli.tasks.registry import task_of_head

    head = head_of(adapter)
    model: Any = load_model(
        section.name_or_path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        head=head,
    )
    if head is not None:
        check_provided(model, section.name_or_path, adapter.list_whole_tensors())
    task = task_of_head(head)
    processor = task.load_processor(section)
    task.prepare_base(model, head, processor)
    if method_of(adapter).trains_in_place and dtype is None:
        model = model.float()
    model, num_folded = fold_onto(model, adapter, section, reporter)
    return model, processor, num_folded


def load_dense(section: ModelSection) -> tuple[Any, Any]:
    """Load a language model in its stored type, and its tokenizer."""
    model = load_model(section.name_or_path, trust_remote_code=section.trust_remote_code)
    return model, load_tokenizer_of(section)


def write_model(model: Any, processor: Any, form: OutputFormat) -> int:
    """Write a model with its tokenizer or image processor and return its number of tensors."""
    if form.dtype is not None:
        model = model.to(getattr(torch, form.dtype))
    if form.chat_template is not None:
        processor.chat_template = form.chat_template
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    check_free_space(form.folder, num_bytes, "the merged model")
    with atomic_folder(form.folder) as temporary, quiet_transformers():
        model.save_pretrained(str(temporary), max_shard_size=form.max_shard_size or _MAX_SHARD)
        processor.save_pretrained(str(temporary))
        texts = dict(form.texts)
        if form.special_tokens:
            texts |= special_token_files(temporary, processor, form.special_tokens)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        return len(list_tensors(temporary))
