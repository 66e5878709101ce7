"""Merging more than changes of linears: a classifier, or the base's own weights, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.adapter import read_adapter_type
from wegeft_cli.artifacts.head_file import read_head
from wegeft_cli.artifacts.in_place_files import load_inplace_files
from wegeft_cli.artifacts.manifest import INPLACE_TYPE, PEFT_TYPE
from wegeft_cli.methods.wegeft.folding import fold_generators
from wegeft_cli.methods.wegeft.inject import remove_generators
from wegeft_cli.models.loading import load_model
from wegeft_cli.recipe.schema import ModelSection
from wegeft_cli.reporter import Reporter


def is_whole(adapter_dir: Path) -> bool:
    """Tell whether an adapter has a head, or is the base's own parameters.

    Args:
        adapter_dir: The adapter's folder.

    Returns:
        Whether it is merged by `fold_whole`.

    Raises:
        UserError: If the folder is no adapter, or its head.json is damaged.
    """
    kind, *_ = read_adapter_type(adapter_dir)
    return kind == INPLACE_TYPE or read_head(adapter_dir) is not None


def fold_whole(
    section: ModelSection, adapter_dir: Path, dtype: str | None, reporter: Reporter
) -> tuple[Any, Any, int]:
    """Fold such an adapter into its base, in memory.

    Args:
        section: Where the base lies.
        adapter_dir: The adapter's folder.
        dtype: The type that the result will be stored in; None is the base's, or float32 where the
            base's own weights were trained, which 16 bits would round.
        reporter: Told where nothing can tell whether the base is the adapter's.

    Returns:
        The model, its tokenizer or image processor, and how many of its tensors were changed.

    Raises:
        UserError: If the adapter is damaged, or belongs to another base.
    """
    # What a whole model needs is imported with it: a merge by streaming asks `is_whole` alone.
    from wegeft_cli.inference.loaded_classifier import read_head_spec
    from wegeft_cli.methods.registry import put_adapter
    from wegeft_cli.models.heads import pad_as_tokenizer
    from wegeft_cli.tasks.classification import load_processor

    kind, *_ = read_adapter_type(adapter_dir)
    head = None if read_head(adapter_dir) is None else read_head_spec(adapter_dir)[0]
    model: Any = load_model(
        section.name_or_path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        head=head,
    )
    processor = load_processor(section, "causal_lm" if head is None else head.task)
    if head is not None:
        pad_as_tokenizer(model, processor)
    if kind == INPLACE_TYPE:
        model = model.float() if dtype is None else model
        model = put_adapter(model, adapter_dir, section, warn=reporter.warn)
        return model, processor, len(load_inplace_files(adapter_dir)[1])
    model = put_adapter(model, adapter_dir, section, warn=reporter.warn)
    if kind == PEFT_TYPE:
        num_folded = fold_generators(model, keep_base=False)
        remove_generators(model)
        return model, processor, num_folded
    from wegeft_cli.methods.peft.models import merge_peft

    merged, num_folded = merge_peft(model)
    return merged, processor, num_folded
