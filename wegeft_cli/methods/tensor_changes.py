"""What a merge changes in each stored tensor of the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.stored_names import tensors_of_layer
from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.targets import Rows
from wegeft_cli.methods.wegeft.folding import FOLD_ROWS, LowRankChange, merge_stored
from wegeft_cli.recipe.schema import Side
from wegeft_cli.storage.safetensors_reader import block_rows
from wegeft_cli.storage.safetensors_writer import TensorEdit


@dataclass(frozen=True)
class TensorChange:
    """The change of one stored tensor W to W + sum of w_i delta_i(W) over the adapters.

    Args:
        low_rank: The generated changes, of all adapters.
        trained: (tensor trained in its place, weight w): a change by w (tensor - W).
        edited: (edit, weight w): a change by w (edit(W) - W).
    """

    low_rank: list[LowRankChange] = field(default_factory=list)
    trained: list[tuple[Tensor, float]] = field(default_factory=list)
    edited: list[tuple[TensorEdit, float]] = field(default_factory=list)

    def rows_at_once(self, shape: tuple[int, ...]) -> int:
        """Rows in one block; all where the change mixes the stored rows."""
        needed = [edit.rows_at_once(shape) for edit, _ in self.edited]
        if self.low_rank:
            needed.append(self._rows_of_pairs(shape))
        return max(needed, default=block_rows(shape))

    def _rows_of_pairs(self, shape: tuple[int, ...]) -> int:
        if len(shape) == 3:
            return 1  # one expert
        if any(pair.side == "output" or pair.transposed for pair in self.low_rank):
            return shape[0]
        return min(FOLD_ROWS, shape[0])

    def __call__(self, block: Tensor, start_row: int) -> Tensor:
        """Return the changed block; the given block may be overwritten."""
        others: list[tuple[Tensor | TensorEdit, float]] = [*self.trained, *self.edited]
        if not self.low_rank and [weight for _, weight in others] == [1.0]:
            return _changed(others[0][0], block, start_row)
        # One change alone can be added in place: its own product with the block is taken first.
        is_alone = len(self.low_rank) == 1 and not others
        merged = block if is_alone else block.clone()
        for pair in self.low_rank:
            inside = pair.rows
            if pair.rows is not None and not pair.transposed:
                inside = _rows_within(pair.rows, start_row, start_row + block.shape[0])
                if not inside:
                    continue
            merge_stored(block, replace(pair, rows=inside), into=merged)
        for change, weight in others:
            merged += weight * (_changed(change, block, start_row) - block)
        return merged


def generated_changes(
    files: AdapterFiles, weight: float, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorChange]:
    """Return the change of every stored tensor that a WeGeFT adapter changes.

    `shapes` maps the base's tensors to their shapes and contains all that the adapter names.
    Raise UserError if a tensor has another shape than the adapter was trained on.
    """
    changes: dict[str, TensorChange] = {}
    manifest = files.manifest
    side: Side = manifest.side
    scale = manifest.scale * weight
    for name, entries in manifest.modules.items():
        pairs = [
            LowRankChange(*files.factors[e.group], scale, side, e.rows, e.transposed)
            for e in entries
        ]
        if entries[0].experts:
            for full_name in tensors_of_layer(manifest, name, shapes):
                # A tensor of one expert is a linear's weight, which is never transposed.
                own = [p if full_name == name else replace(p, transposed=False) for p in pairs]
                _check_shape(full_name, shapes[full_name][-2:], own)
                changes.setdefault(full_name, TensorChange()).low_rank.extend(own)
            continue
        _check_shape(f"{name}.weight", shapes[f"{name}.weight"], pairs)
        # The output side edits the whole output W x + b, so it maps the bias too.
        kinds = ("weight", "bias") if side == "output" else ("weight",)
        for full_name in (f"{name}.{kind}" for kind in kinds):
            if full_name in shapes:
                changes.setdefault(full_name, TensorChange()).low_rank.extend(pairs)
    for name, tensor in files.saved_modules.items():
        if shapes[name] != tuple(tensor.shape):
            raise UserError(
                f"{name} is {list(shapes[name])} in the base, {list(tensor.shape)} in the adapter",
                key="modules_to_save",
                hint="this adapter belongs to another base",
            )
        changes.setdefault(name, TensorChange()).trained.append((tensor, weight))
    return changes


def sum_changes(changes: Iterable[Mapping[str, TensorChange]]) -> dict[str, TensorChange]:
    """Return the sum of several adapters' changes, tensor by tensor."""
    total: dict[str, TensorChange] = {}
    for each in changes:
        for name, change in each.items():
            summed = total.setdefault(name, TensorChange())
            summed.low_rank.extend(change.low_rank)
            summed.trained.extend(change.trained)
            summed.edited.extend(change.edited)
    return total


def _changed(change: Tensor | TensorEdit, block: Tensor, start_row: int) -> Tensor:
    """Return what replaces a block: an edit's result, or a trained tensor's rows in its type."""
    if not isinstance(change, Tensor):
        return change(block, start_row)
    rows = change[start_row : start_row + block.shape[0]] if block.ndim else change
    return rows.to(block.device, block.dtype)


def _rows_within(rows: Rows, start: int, stop: int) -> Rows:
    cut = ((max(a, start) - start, min(b, stop) - start) for a, b in rows)
    return tuple((a, b) for a, b in cut if a < b)


def _check_shape(name: str, shape: tuple[int, ...], pairs: Sequence[LowRankChange]) -> None:
    for pair in pairs:
        width, num_rows = pair.phi.shape[0], 0
        if len(shape) == 2:
            d_out, d_in = (shape[1], shape[0]) if pair.transposed else shape
            rows = pair.rows if pair.rows is not None else ((0, d_out),)
            fits = all(stop <= d_out for _, stop in rows)
            num_rows = sum(stop - start for start, stop in rows) if fits else 0
        if num_rows == 0 or width != (d_in if pair.side == "input" else num_rows):
            raise UserError(
                f"{name} is {list(shape)} in the base, the adapter's pair is {width} wide",
                key=f"modules.{name.removesuffix('.weight')}",
                hint="this adapter belongs to another base",
            )
