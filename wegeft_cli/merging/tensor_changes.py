"""What a merge does to each stored tensor that the adapters change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from wegeft_cli.artifacts.adapter import AdapterFiles
from wegeft_cli.errors import UserError
from wegeft_cli.methods.wegeft.equations import Side
from wegeft_cli.methods.wegeft.folding import FOLD_ROWS, merge_stored
from wegeft_cli.methods.wegeft.targets import Rows
from wegeft_cli.storage.safetensors_reader import block_rows


@dataclass(frozen=True)
class Pair:
    """What one group's pair does to a tensor.

    Args:
        phi: First factor.
        psi: Second factor.
        scale: s, times the adapter's weight.
        side: Which side is edited.
        rows: Adapted output rows; None are all.
        transposed: Whether the weight is stored as [d_in, d_out].
    """

    phi: Tensor
    psi: Tensor
    scale: float
    side: Side
    rows: Rows | None
    transposed: bool


@dataclass(frozen=True)
class Change:
    """How one stored tensor W changes: W + sum of w_i delta_i(W) over the adapters.

    Args:
        pairs: The generated changes, of all adapters.
        trained: (tensor trained in its place, weight): a change by weight * (tensor - W).
    """

    pairs: list[Pair] = field(default_factory=list)
    trained: list[tuple[Tensor, float]] = field(default_factory=list)

    def rows_at_once(self, shape: tuple[int, ...]) -> int:
        """Rows in one block; all where the change mixes the stored rows."""
        if any(pair.side == "output" or pair.transposed for pair in self.pairs):
            return shape[0]
        return min(FOLD_ROWS, shape[0]) if self.pairs else block_rows(shape)

    def __call__(self, block: Tensor, start_row: int) -> Tensor:
        """Give the changed block; what was given may be changed for it."""
        if not self.pairs and [weight for _, weight in self.trained] == [1.0]:
            return _rows_of(self.trained[0][0], block, start_row)
        # One change alone can be added in place: its own product with the block is taken first.
        is_alone = len(self.pairs) == 1 and not self.trained
        merged = block if is_alone else block.clone()
        for pair in self.pairs:
            inside = pair.rows
            if pair.rows is not None and not pair.transposed:
                inside = _rows_within(pair.rows, start_row, start_row + block.shape[0])
                if not inside:
                    continue
            merge_stored(
                block,
                pair.phi,
                pair.psi,
                pair.scale,
                pair.side,
                rows=inside,
                transposed=pair.transposed,
                into=merged,
            )
        for tensor, weight in self.trained:
            merged += weight * (_rows_of(tensor, block, start_row) - block)
        return merged


def build_edits(
    adapters: Sequence[tuple[AdapterFiles, float]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Change]:
    """Give the change of every stored tensor that some adapters change.

    Args:
        adapters: Each adapter with its weight.
        shapes: Tensor name in the base -> its shape; holds all that the adapters name.

    Returns:
        Tensor name -> its change.

    Raises:
        UserError: If a tensor has another shape than an adapter was trained on.
    """
    edits: dict[str, Change] = {}
    for files, weight in adapters:
        manifest = files.manifest
        side: Side = manifest.side  # type: ignore[assignment]
        scale = manifest.scale * weight
        for name, entries in manifest.modules.items():
            pairs = [
                Pair(*files.factors[e.group], scale, side, e.rows, e.transposed) for e in entries
            ]
            _check_shape(name, shapes[f"{name}.weight"], pairs)
            # The output side edits the whole output W x + b, so it maps the bias too.
            kinds = ("weight", "bias") if side == "output" else ("weight",)
            for full_name in (f"{name}.{kind}" for kind in kinds):
                if full_name in shapes:
                    edits.setdefault(full_name, Change()).pairs.extend(pairs)
        for name, tensor in files.saved_modules.items():
            if shapes[name] != tuple(tensor.shape):
                raise UserError(
                    f"{name} is {list(shapes[name])} in the base, "
                    f"{list(tensor.shape)} in the adapter",
                    key="modules_to_save",
                    hint="this adapter belongs to another base",
                )
            edits.setdefault(name, Change()).trained.append((tensor, weight))
    return edits


def _rows_of(tensor: Tensor, block: Tensor, start_row: int) -> Tensor:
    """Give the rows of a trained tensor that stand in for a block, in the block's type."""
    rows = tensor[start_row : start_row + block.shape[0]] if block.ndim else tensor
    return rows.to(block.device, block.dtype)


def _rows_within(rows: Rows, start: int, stop: int) -> Rows:
    cut = ((max(a, start) - start, min(b, stop) - start) for a, b in rows)
    return tuple((a, b) for a, b in cut if a < b)


def _check_shape(name: str, shape: tuple[int, ...], pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        width, num_rows = pair.phi.shape[0], 0
        if len(shape) == 2:
            d_out, d_in = (shape[1], shape[0]) if pair.transposed else shape
            rows = pair.rows if pair.rows is not None else ((0, d_out),)
            fits = all(stop <= d_out for _, stop in rows)
            num_rows = sum(stop - start for start, stop in rows) if fits else 0
        if num_rows == 0 or width != (d_in if pair.side == "input" else num_rows):
            raise UserError(
                f"{name}.weight is {list(shape)} in the base, the adapter's pair is {width} wide",
                key=f"modules.{name}",
                hint="this adapter belongs to another base",
            )
