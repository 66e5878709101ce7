"""RED, SSF, 1LoRA, tied LoRA and LoReFT as methods: affine edits of whole linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wegeft_cli.artifacts.manifest import AFFINE_TYPE
from wegeft_cli.errors import UserError
from wegeft_cli.methods.base import (
    UNREAD_WITHOUT_GENERATORS,
    AdapterRecord,
    LayerChoice,
    Method,
    ParameterGroup,
    check_no_peft_keys,
    check_unread,
    check_without_generators,
    count_whole,
)
from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import SIBLING_TYPES, AdapterSection, Recipe

if TYPE_CHECKING:
    from torch import nn

    from wegeft_cli.artifacts.adapter import Adapter
    from wegeft_cli.methods.layers.targets import Target
    from wegeft_cli.methods.lora_equivalent.pairs import LoraPairs
    from wegeft_cli.methods.tensor_changes import TensorChange

_UNREAD = {
    "red": ("r", "alpha"), "ssf": ("r", "alpha"), "1lora": ("r", "alpha"), "loreft": ("alpha",),
}  # fmt: skip


class SiblingMethod(Method):
    """An affine edit of the output of each chosen linear layer."""

    names = SIBLING_TYPES
    peft_types = (AFFINE_TYPE,)
    is_streamed = True
    needs_package = True

    def describe(self, peft_type: str) -> str:
        """Return what such an adapter contains."""
        return "an adapter of affine edits (red, ssf, 1lora, tied_lora or loreft)"

    def unread_keys(self, name: str) -> tuple[str, ...]:
        """Return the keys of generators, and of the rank and scale that an edit lacks."""
        own = (f"adapter.{key}" for key in _UNREAD.get(name, ()))
        return (*UNREAD_WITHOUT_GENERATORS, "adapter.peft", *own)

    def check(self, recipe: Recipe) -> Iterator[Fault]:
        """Yield keys of other methods, and a rank, a scale or a start that an edit lacks."""
        adapter = recipe.adapter
        yield from check_without_generators(recipe)
        yield from check_no_peft_keys(recipe)
        yield from check_unread(recipe, _UNREAD.get(adapter.type, ()))
        if adapter.init_from is not None:
            message = f"{adapter.type!r} does not start from an adapter"
            yield "adapter.init_from", message, "remove it"

    def choose_layers(self, skeleton: nn.Module, section: AdapterSection) -> LayerChoice | None:
        """Return the whole linear layers; `all-linear` omits stacked experts."""
        from wegeft_cli.methods.layers.trained_modules import list_saved_modules
        from wegeft_cli.methods.omissions import list_omissions
        from wegeft_cli.methods.siblings.inject import select_layers

        targets = select_layers(skeleton, section)
        if section.target_modules != "all-linear":
            return LayerChoice(tuple(targets))
        saved = list_saved_modules(skeleton, section.modules_to_save)
        names = {target.name for target in targets}
        why = f"which {section.type!r} does not edit"
        return LayerChoice(tuple(targets), tuple(list_omissions(skeleton, names, saved, why)))

    def with_layers(
        self, skeleton: nn.Module, section: AdapterSection, targets: Sequence[Target]
    ) -> AdapterSection:
        """Name the layers in full."""
        return replace(section, target_modules=[target.name for target in targets])

    def count(
        self, skeleton: nn.Module, section: AdapterSection, task_type: str | None
    ) -> list[ParameterGroup]:
        """Count by the formula of the edit, summed by kind of layer."""
        from wegeft_cli.methods.layers.trained_modules import find_saved_modules
        from wegeft_cli.methods.siblings.inject import EDITS, select_layers

        targets, kind = select_layers(skeleton, section), EDITS[section.type]
        if not targets:
            raise UserError("no linear layer is adapted", key="adapter.target_modules")
        counts: dict[str, list[int]] = {}
        shared = set()
        for target in targets:
            number = kind.count(target.d_in, target.d_out, section.r)
            if (group := (target.kind, target.d_in, target.d_out)) not in shared:
                number += kind.count_shared(target.d_in, target.d_out, section.r)
            shared.add(group)
            counts.setdefault(target.kind, []).append(number)
        groups = [ParameterGroup(name, len(n), None, sum(n)) for name, n in counts.items()]
        saved = find_saved_modules(skeleton, section.modules_to_save, targets)
        return [*groups, *count_whole(skeleton, saved)]

    def inject(
        self, model: nn.Module, section: AdapterSection, *, task_type: str | None, seed: int
    ) -> nn.Module:
        """Attach an edit to each layer."""
        from wegeft_cli.methods.layers.trained_modules import find_saved_modules
        from wegeft_cli.methods.siblings.inject import inject_edits, select_layers

        targets = select_layers(model, section)
        saved = find_saved_modules(model, section.modules_to_save, targets)
        inject_edits(model, section, targets, saved, seed)
        return model

    def save(self, model: nn.Module, folder: Path, record: AdapterRecord) -> None:
        """Write the tensors of the edits and their record."""
        from wegeft_cli.artifacts.adapter_files import CARD_NAME
        from wegeft_cli.methods.siblings.files import AffineManifest, save_affine_files
        from wegeft_cli.methods.siblings.inject import edits_of
        from wegeft_cli.models.quantization import find_kind
        from wegeft_cli.version import VERSION

        whole, adapter = edits_of(model)
        section, base = record.recipe.adapter, record.recipe.model
        manifest = AffineManifest(
            method=section.type,
            r=section.r,
            alpha=adapter.alpha,
            target_modules=tuple(adapter.names.values()),
            modules_to_save=() if whole is None else tuple(whole.by_name()),
            task_type=record.task_type,
            base_model_name_or_path=base.name_or_path,
            revision=base.revision,
            base_fingerprint=record.base_fingerprint,
            wegeft_version=VERSION,
            base_quantization=find_kind(model),
            prompt=record.prompt,
        )
        saved = {} if whole is None else whole.get_tensors()
        texts = {CARD_NAME: record.card, **record.more_files}
        save_affine_files(folder, manifest, adapter.tensors(), saved, texts)

    def check_adapter(self, adapter: Adapter) -> None:
        """Read the record strictly."""
        from wegeft_cli.methods.siblings.files import read_affine_manifest

        read_affine_manifest(adapter, self.names)

    def load(
        self,
        model: nn.Module,
        adapter: Adapter,
        *,
        base_dir: Path | None,
        warn: Callable[[str], None],
    ) -> nn.Module:
        """Attach the adapter's edits."""
        from wegeft_cli.methods.siblings.files import load_affine_tensors, read_affine_manifest
        from wegeft_cli.methods.siblings.inject import attach_tensors, section_of
        from wegeft_cli.methods.trained_base import check_base

        manifest = read_affine_manifest(adapter, self.names)
        if base_dir is not None:
            check_base(manifest, base_dir, adapter.folder, warn=warn)
        section = section_of(model, manifest)
        self.inject(model, section, task_type=manifest.task_type, seed=0)
        attach_tensors(model, *load_affine_tensors(adapter), file=str(adapter.weights_path))
        return model

    def disabled(self, model: Any) -> AbstractContextManager[Any]:
        """Switch the edits off."""
        from wegeft_cli.methods.layers.owner import disable_generators

        return disable_generators(model)

    def fold(self, model: Any, adapter: Adapter) -> tuple[nn.Module, int]:
        """Fold the edits into weights and biases and remove them."""
        from wegeft_cli.methods.layers.owner import remove_generators
        from wegeft_cli.methods.siblings.folding import fold_edits

        num_folded = fold_edits(model)
        remove_generators(model)
        return model, num_folded

    def tensor_changes(
        self,
        adapter: Adapter,
        weight: float,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        model: nn.Module | None = None,
    ) -> dict[str, TensorChange] | None:
        """Return the merged weight and bias of each layer, and modules that were trained whole.

        The files record no shapes of layers, so the model is needed.
        """
        from wegeft_cli.methods.siblings.files import read_affine_manifest
        from wegeft_cli.methods.siblings.folding import affine_changes
        from wegeft_cli.methods.siblings.inject import read_edits

        if model is None:
            return None
        found = read_edits(model, adapter, read_affine_manifest(adapter, self.names))
        return affine_changes(model, *found, shapes, weight)

    def foresee_merge(self, skeleton: nn.Module, section: AdapterSection) -> str | None:
        """Warn of layers that have no bias and get one, and say whether they can."""
        from wegeft_cli.methods.siblings.folding import foresee_biases
        from wegeft_cli.methods.siblings.inject import EDITS, select_layers

        if not EDITS[section.type].changes_bias:
            return None
        return foresee_biases(skeleton, section.type, select_layers(skeleton, section))

    def has_lora_equivalent(self, adapter: Adapter) -> bool:
        """Return whether the edit adds a low-rank product to the weight, as 1LoRA and tied LoRA."""
        from wegeft_cli.methods.siblings.files import read_affine_manifest
        from wegeft_cli.methods.siblings.inject import EDITS

        return bool(EDITS[read_affine_manifest(adapter, self.names).method].formula)

    def lora_pairs(
        self,
        adapter: Adapter,
        model: nn.Module,
        base_dir: Path,
        *,
        trust_remote_code: bool,
        warn: Callable[[str], None],
    ) -> LoraPairs:
        """Return `B = v, A = 1^T` of 1LoRA, `B = s diag(v) B, A = diag(u) A` of tied LoRA."""
        from wegeft_cli.methods.siblings.files import read_affine_manifest
        from wegeft_cli.methods.siblings.lora_pairs import find_affine_pairs
        from wegeft_cli.methods.trained_base import check_base

        manifest = read_affine_manifest(adapter, self.names)
        check_base(manifest, base_dir, adapter.folder, warn=warn)
        return find_affine_pairs(adapter, model, manifest)


METHOD = SiblingMethod()
