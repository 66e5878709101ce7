"""1LoRA and tied LoRA as the LoRA pairs that they are, see `AffineEdit.lora_pair`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.methods.lora_equivalent.pairs import LoraPair
from wegeft_cli.methods.siblings.edit import AffineEdit
from wegeft_cli.methods.siblings.files import AffineManifest
from wegeft_cli.methods.siblings.inject import read_edits
from wegeft_cli.models.file_names import current_names


@dataclass(frozen=True)
class AffinePairs:
    """The pairs of affine edits that add a low-rank product to the weight, see `LoraPairs`.

    Args:
        manifest: The adapter's record.
        edits: Layer -> its edit.
        saved_modules: Parameter of the model -> the tensor trained in its place.
        modules_to_save: The modules of these parameters.
    """

    manifest: AffineManifest
    edits: Mapping[str, AffineEdit]
    saved_modules: Mapping[str, Tensor]
    modules_to_save: Sequence[str]

    biased = frozenset[str]()

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.manifest.method

    @property
    def formula(self) -> str:
        """The weight change of the method."""
        return next(iter(self.edits.values())).formula

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task."""
        return self.manifest.task_type

    @property
    def base_fingerprint(self) -> str | None:
        """The base's fingerprint."""
        return self.manifest.base_fingerprint

    @property
    def layers(self) -> Sequence[str]:
        """The edited layers."""
        return tuple(self.edits)

    @property
    def rank(self) -> int:
        """The rank of all pairs."""
        return len(self._pair(next(iter(self.edits)))[0])

    def make(self, layer: str, rank: int) -> LoraPair:
        """Compute the pair of one layer in float64."""
        A, B = self._pair(layer)
        num_zeros = rank - len(A)
        if num_zeros < 0:
            raise ValueError(f"the pair has more than {rank} ranks")
        return LoraPair(
            nn.functional.pad(A, (0, 0, 0, num_zeros)), nn.functional.pad(B, (0, num_zeros))
        )

    def _pair(self, layer: str) -> tuple[Tensor, Tensor]:
        pair = self.edits[layer].lora_pair()
        assert pair is not None
        return pair


def find_affine_pairs(adapter: Adapter, model: nn.Module, manifest: AffineManifest) -> AffinePairs:
    """Return the pairs of an adapter by the names of a model, which may have no weights.

    Raises:
        UserError: If the adapter is damaged, or does not fit the model.
    """
    edits, _, saved = read_edits(model, adapter, manifest)
    modules = current_names(model, list(manifest.modules_to_save))
    return AffinePairs(manifest, edits.by_name(), saved, modules)
