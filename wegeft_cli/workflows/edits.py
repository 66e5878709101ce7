"""What a streaming merge does to each stored tensor that an adapter changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from wegeft_cli.checkpoints.adapter import AdapterFiles
from wegeft_cli.checkpoints.manifest import ModuleEntry
from wegeft_cli.checkpoints.stream import TensorEdit, block_rows
from wegeft_cli.errors import UserError
from wegeft_cli.generators.equations import Side
from wegeft_cli.generators.fold import FOLD_ROWS, merge_stored
from wegeft_cli.generators.targets import Rows


@dataclass(frozen=True)
class FoldEdit:
    """How one stored tensor changes: every adapted row range by its group's pair.

    Args:
        parts: (phi, psi, rows, transposed) of each entry.
        scale: s.
        side: Which side is edited.
    """

    parts: Sequence[tuple[Tensor, Tensor, Rows | None, bool]]
    scale: float
    side: Side

    def rows_at_once(self, shape: tuple[int, ...]) -> int:
        """Rows in one block; all where the change mixes the stored rows."""
        mixes = self.side == "output" or any(transposed for *_, transposed in self.parts)
        return shape[0] if mixes else min(FOLD_ROWS, shape[0])

    def __call__(self, block: Tensor, start_row: int) -> Tensor:
        """Give the folded block."""
        for phi, psi, rows, transposed in self.parts:
            inside = rows
            if rows is not None and not transposed:
                inside = _rows_within(rows, start_row, start_row + block.shape[0])
                if not inside:
                    continue
            block = merge_stored(
                block, phi, psi, self.scale, self.side, rows=inside, transposed=transposed
            )
        return block


@dataclass(frozen=True)
class Replacement:
    """A stored tensor gives way to one that was trained in its place.

    Args:
        tensor: The trained one, of the stored one's shape.
    """

    tensor: Tensor

    def rows_at_once(self, shape: tuple[int, ...]) -> int:
        """Rows in one block; any number will do."""
        return block_rows(shape)

    def __call__(self, block: Tensor, start_row: int) -> Tensor:
        """Give the trained rows in the block's type."""
        if block.ndim:
            return self.tensor[start_row : start_row + block.shape[0]].to(block.dtype)
        return self.tensor.to(block.dtype)


def has_all_tensors(files: AdapterFiles, stored: Mapping[str, object]) -> bool:
    """Tell whether the base's files hold every tensor that the adapter changes, by its name."""
    changed = [*(f"{name}.weight" for name in files.manifest.modules), *files.saved_modules]
    return all(name in stored for name in changed)


def build_edits(
    files: AdapterFiles, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorEdit]:
    """Give the edit of every stored tensor that the adapter changes.

    Args:
        files: The adapter.
        shapes: Tensor name in the base's files -> its shape; holds all that the adapter names.

    Returns:
        Tensor name -> its edit.

    Raises:
        UserError: If a tensor has another shape than the adapter was trained on.
    """
    manifest = files.manifest
    side: Side = manifest.side  # type: ignore[assignment]

    def part(entry: ModuleEntry) -> tuple[Tensor, Tensor, Rows | None, bool]:
        return (*files.factors[entry.group], entry.rows, entry.transposed)

    edits: dict[str, TensorEdit] = {}
    for name, entries in manifest.modules.items():
        edit = FoldEdit([part(entry) for entry in entries], manifest.scale, side)
        _check_shape(name, shapes[f"{name}.weight"], edit)
        edits[f"{name}.weight"] = edit
        # The output side edits the whole output W x + b, so it maps the bias too.
        if side == "output" and f"{name}.bias" in shapes:
            edits[f"{name}.bias"] = edit
    for name, tensor in files.saved_modules.items():
        if shapes[name] != tuple(tensor.shape):
            raise UserError(
                f"{name} is {list(shapes[name])} in the base, {list(tensor.shape)} in the adapter",
                key="modules_to_save",
                hint="this adapter belongs to another base",
            )
        edits[name] = Replacement(tensor)
    return edits


def _rows_within(rows: Rows, start: int, stop: int) -> Rows:
    cut = ((max(a, start) - start, min(b, stop) - start) for a, b in rows)
    return tuple((a, b) for a, b in cut if a < b)


def _check_shape(name: str, shape: tuple[int, ...], edit: FoldEdit) -> None:
    for phi, _, rows, transposed in edit.parts:
        d_out, d_in = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        num_rows = d_out if rows is None else sum(stop - start for start, stop in rows)
        width = d_in if edit.side == "input" else num_rows
        if len(shape) != 2 or width != phi.shape[0]:
            raise UserError(
                f"{name}.weight is {list(shape)} in the base, the adapter's pair is "
                f"{phi.shape[0]} wide",
                key=f"modules.{name}",
                hint="this adapter belongs to another base",
            )
