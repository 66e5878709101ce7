"""`wegeft preview`: what a recipe makes of its rows, token by token, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from wegeft_cli.data.batches.layout import DEFAULT_TOKENS, Kind
from wegeft_cli.data.batches.packing import pack_rows
from wegeft_cli.data.batches.sampler import build_step_plan
from wegeft_cli.data.batches.text import build_source
from wegeft_cli.data.text.dataset import PreparedData, build_datasets
from wegeft_cli.data.text.statistics import SourceStatistics
from wegeft_cli.errors import UserError
from wegeft_cli.models.loading import build_skeleton, load_tokenizer_of, pad_token_id
from wegeft_cli.recipe.load import LoadedRecipe
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.tasks.support.flat_check import expect_flat
from wegeft_cli.tasks.support.histogram import count_lengths
from wegeft_cli.tasks.support.row_viewer import PreviewRow, RowWalker

_UNCUT_LENGTH = 2**20


@dataclass(frozen=True)
class TokenPreview:
    """Rows to look at, and what became of all of them.

    Args:
        rows: The rows asked for.
        sources: Of every training source: `path`, `num_rows` (as read), `num_truncated`,
            `num_empty`, `num_unmarked`, `num_cut_away`, `num_filtered`, `num_boundary_merged`,
            `template`, `template_hash`.
        num_rows: Training rows; of a stream, those looked at.
        num_tokens: Their tokens.
        num_label_tokens: Their learned tokens.
        loss_on: The recipe's `data.loss_on`.
        max_length: The recipe's `data.max_length`.
        lengths: Tokens per row: p50, p95, max.
        uncut_lengths: The same before the cut to `data.max_length`, of the rows excluded by it too;
            rows longer than 2^20 tokens count as 2^20.
        uncut_histogram: Rows by their length before the cut.
        histogram: Rows by length: `start`, `stop` (the first length that is too long), `rows`.
        template: Name of the prompt form; several are joined by commas.
        template_hash: Fingerprint of its text.
        setting: What the recipe does about padding: none, group_by_length or packing.
        waste: `padding_share`, `packed_sequences` and `head_share` of the planned batches, by
            setting; settings that the recipe's data cannot have are omitted.
        warnings: Sentences for the user.
    """

    kind: ClassVar = "tokens"
    rows: list[PreviewRow]
    sources: list[dict[str, Any]]
    num_rows: int
    num_tokens: int
    num_label_tokens: int
    loss_on: str
    max_length: int
    lengths: dict[str, int]
    uncut_lengths: dict[str, int]
    uncut_histogram: list[dict[str, int]]
    histogram: list[dict[str, int]]
    template: str
    template_hash: str
    setting: str
    waste: dict[str, dict[str, Any]]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the preview as a JSON object."""
        return asdict(self)


def preview_tokens(loaded: LoadedRecipe, num_rows: int, row: int | None) -> TokenPreview:
    """Read, render and tokenize the training rows, with statistics of all of them."""
    recipe, recipe_dir = loaded.recipe, loaded.path.parent
    tokenizer = load_tokenizer_of(recipe.model)
    # A look leaves nothing behind.
    section = replace(recipe.data, cache_dir=None)
    data = build_datasets(
        section, tokenizer=tokenizer, recipe_dir=recipe_dir, need_validation=False
    )
    report = data.report
    whole = data
    if report.num_truncated or any(source.encoded.num_cut_away for source in data.sources):
        uncut = replace(section, max_length=_UNCUT_LENGTH, packing="none")
        whole = build_datasets(
            uncut, tokenizer=tokenizer, recipe_dir=recipe_dir, need_validation=False
        )
    return TokenPreview(
        rows=_choose_rows(recipe, data.sources, tokenizer, recipe_dir, num_rows, row),
        sources=[_describe_source(source) for source in data.sources],
        num_rows=report.num_rows,
        num_tokens=report.num_tokens,
        num_label_tokens=report.num_label_tokens,
        loss_on=section.loss_on,
        max_length=section.max_length,
        lengths=report.lengths,
        uncut_lengths=whole.report.lengths,
        uncut_histogram=count_lengths(whole.train.lengths),
        histogram=count_lengths(data.train.lengths),
        template=report.template,
        template_hash=report.template_hash,
        setting=_find_setting(recipe),
        waste=_count_waste(recipe, data, pad_token_id(tokenizer)),
        warnings=report.warnings,
    )


def _choose_rows(
    recipe: Recipe,
    sources: Sequence[SourceStatistics],
    tokenizer: Any,
    recipe_dir: Path,
    num_rows: int,
    row: int | None,
) -> list[PreviewRow]:
    walker = RowWalker(recipe, tokenizer, recipe_dir)
    shown: list[PreviewRow] = []
    first = 0
    for position, report in enumerate(sources):
        encoded = report.encoded
        num_kept = report.num_rows + encoded.num_earlier - encoded.num_dropped
        num_kept -= report.num_filtered
        if row is None:
            shown += walker.take(position, first, num_rows)
        elif report.streaming or row < first + num_kept:
            found = walker.find(position, first, row)
            if found is not None:
                return [found]
        first += num_kept
    if row is not None:
        raise UserError(
            f"there is no row {row}: the training set has {first} rows, counted from 0",
            key="--row",
            hint=f"give 0 to {first - 1}",
        )
    return shown


def _describe_source(source: SourceStatistics) -> dict[str, Any]:
    name, digest = source.template
    encoded = source.encoded
    return {
        "path": source.source.path,
        "num_rows": source.num_rows,
        "num_truncated": encoded.num_truncated,
        "num_empty": encoded.num_empty,
        "num_unmarked": encoded.num_unmarked,
        "num_cut_away": encoded.num_cut_away,
        "num_filtered": source.num_filtered,
        "num_boundary_merged": encoded.num_boundary_merged,
        "template": name,
        "template_hash": digest,
    }


def _find_setting(recipe: Recipe) -> str:
    if recipe.data.packing != "none":
        return "packing"
    return "group_by_length" if recipe.train.group_by_length else "none"


def _count_waste(recipe: Recipe, data: PreparedData, pad: int) -> dict[str, dict[str, Any]]:
    """Count what each way to make batches computes for nothing."""
    waste = {}
    layout = _expect_layout(recipe)
    default = DEFAULT_TOKENS["cuda" if torch.cuda.is_available() else "cpu"]
    for setting in ("none", "group_by_length", "packing"):
        if setting != _find_setting(recipe) and (
            (recipe.data.streaming and setting != "none")
            or (data.mixture is not None and setting == "packing")
        ):
            continue
        grouped = replace(recipe.train, group_by_length=setting == "group_by_length")
        changed = replace(recipe, train=grouped)
        is_packed = setting == "packing"
        packs = pack_rows(data.train.lengths, recipe.data.max_length) if is_packed else None
        cut = replace(data, packs=packs)
        plan = build_step_plan(changed, cut, 1)
        source = build_source(changed, cut, plan, rank=0, pad_token_id=pad)
        source.use_layout(layout, recipe.train.max_tokens_per_pass or default)
        waste[setting] = source.padding_statistics()
    return waste


def _expect_layout(recipe: Recipe) -> Kind:
    """Return the layout of the batches by the base's configuration; padded without one."""
    try:
        _, skeleton = build_skeleton(recipe.model, None)
    except UserError:
        return "left"
    return "flat" if expect_flat(skeleton, recipe) is None else "left"
