"""WeGeFT as a method: generators in the chosen projections, `W' = W (I + s phi psi)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wegeft_cli.artifacts.manifest import PEFT_TYPE
from wegeft_cli.methods.base import (
    AdapterRecord,
    LayerChoice,
    Method,
    ParameterGroup,
    check_no_peft_keys,
    count_whole,
)
from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import AdapterSection, Recipe

if TYPE_CHECKING:
    from torch import nn

    from wegeft_cli.artifacts.adapter import Adapter
    from wegeft_cli.methods.layers.targets import Target
    from wegeft_cli.methods.lora_equivalent.pairs import LoraPairs
    from wegeft_cli.methods.tensor_changes import TensorChange


class WeGeFTMethod(Method):
    """Two small linear maps (phi, psi) for each sharing group generate the weight changes."""

    names = ("wegeft",)
    peft_types = (PEFT_TYPE,)
    has_generators = True
    is_streamed = True
    needs_package = True

    def unread_keys(self, name: str) -> tuple[str, ...]:
        """Return the key that only PEFT's methods read."""
        return ("adapter.peft",)

    def check(self, recipe: Recipe) -> Iterator[Fault]:
        """Yield keys of PEFT's methods, and dropout on the entries of a quantized base."""
        yield from check_no_peft_keys(recipe)
        rule = recipe.adapter.scale_rule
        if rule != "none" and recipe.adapter.alpha is not None:
            message = f"{rule!r} computes the scale that `adapter.alpha` sets"
            yield "adapter.scale_rule", message, "remove one of them"
        model, dropout = recipe.model, recipe.adapter.dropout
        if dropout > 0 and (model.load_in_4bit or model.load_in_8bit):
            key = "model.load_in_4bit" if model.load_in_4bit else "model.load_in_8bit"
            message = f"{dropout} acts on the weight's entries, which `{key}` leaves none of"
            yield "adapter.dropout", message, f"set it to 0, or remove `{key}`"

    def choose_layers(self, skeleton: nn.Module, section: AdapterSection) -> LayerChoice | None:
        """Return the targets; explicit groups choose among those of `all-linear`."""
        from wegeft_cli.methods.layers.trained_modules import list_saved_modules
        from wegeft_cli.methods.omissions import list_omissions
        from wegeft_cli.methods.wegeft.inject import select_section_targets

        targets = select_section_targets(skeleton, section)
        if section.target_modules != "all-linear" or section.groups is not None:
            return LayerChoice(tuple(targets))
        names = {target.name for target in targets}
        why = "which have no output side"
        saved = list_saved_modules(skeleton, section.modules_to_save)
        omitted = list_omissions(skeleton, names, saved, why)
        return LayerChoice(tuple(targets), tuple(omitted))

    def with_layers(
        self, skeleton: nn.Module, section: AdapterSection, targets: Sequence[Target]
    ) -> AdapterSection:
        """Name the targets in full."""
        return replace(section, target_modules=[target.label for target in targets])

    def count(
        self, skeleton: nn.Module, section: AdapterSection, task_type: str | None
    ) -> list[ParameterGroup]:
        """Count 2 d r parameters for each group, and the modules that are trained whole."""
        from wegeft_cli.methods.layers.trained_modules import find_saved_modules
        from wegeft_cli.methods.wegeft.equations import count_parameters
        from wegeft_cli.methods.wegeft.inject import select_section_targets
        from wegeft_cli.methods.wegeft.sharing import assign_groups, group_widths

        targets = select_section_targets(skeleton, section)
        assigned = assign_groups(
            targets,
            share=section.share,
            groups=section.groups,
            side=section.side,
        )
        widths = group_widths(assigned, section.side)
        groups = [
            ParameterGroup(
                name, len(members), widths[name], count_parameters(widths[name], section.r)
            )
            for name, members in assigned.items()
        ]
        saved = find_saved_modules(skeleton, section.modules_to_save, targets)
        return [*groups, *count_whole(skeleton, saved)]

    def scale(self, skeleton: nn.Module, section: AdapterSection) -> float:
        """Return alpha / r, by the rule where one is set."""
        from wegeft_cli.methods.wegeft.inject import find_section_alpha, select_section_targets

        targets = select_section_targets(skeleton, section)
        return find_section_alpha(targets, section) / section.r

    def inject(
        self, model: nn.Module, section: AdapterSection, *, task_type: str | None, seed: int
    ) -> nn.Module:
        """Attach generators to the model."""
        from wegeft_cli.methods.wegeft.inject import inject_generators

        inject_generators(
            model,
            rank=section.r,
            alpha=section.alpha,
            scale_rule=section.scale_rule,
            target_modules=section.target_modules,
            share=section.share,
            groups=section.groups,
            side=section.side,
            init=section.init,
            dropout=section.dropout,
            view=section.view,
            modules_to_save=section.modules_to_save,
            seed=seed,
        )
        return model

    def check_start(
        self, skeleton: nn.Module, section: AdapterSection, start: Adapter, base_dir: Path | None
    ) -> None:
        """Compare rank, alpha, side, groups, layers and whole modules with the adapter's."""
        from wegeft_cli.methods.wegeft.start import check_start

        check_start(skeleton, section, start, base_dir)

    def start_from(
        self,
        model: nn.Module,
        start: Adapter,
        base_fingerprint: str | None,
        warn: Callable[[str], None],
    ) -> None:
        """Load the adapter's factors and whole modules."""
        from wegeft_cli.methods.wegeft.start import start_from

        start_from(model, start, base_fingerprint, warn)

    def save(self, model: nn.Module, folder: Path, record: AdapterRecord) -> None:
        """Write the factors and their manifest."""
        from wegeft_cli.methods.wegeft.save_load import save_adapter
        from wegeft_cli.models.quantization import find_kind

        recipe = record.recipe
        targets = recipe.adapter.target_modules
        save_adapter(
            model,
            folder,
            base_model_name_or_path=recipe.model.name_or_path,
            revision=recipe.model.revision,
            base_fingerprint=record.base_fingerprint,
            target_modules=targets if isinstance(targets, str) else tuple(targets),
            init_from=recipe.adapter.init_from,
            task_type=record.task_type,
            base_quantization=find_kind(model),
            card=record.card,
            more_files=record.more_files,
            prompt=record.prompt,
        )

    def check_adapter(self, adapter: Adapter) -> None:
        """Read the manifest strictly."""
        _ = adapter.manifest

    def load(
        self,
        model: nn.Module,
        adapter: Adapter,
        *,
        base_dir: Path | None,
        warn: Callable[[str], None],
    ) -> nn.Module:
        """Attach the adapter's generators."""
        from wegeft_cli.methods.wegeft.save_load import attach_adapter

        attach_adapter(model, adapter, base_dir=base_dir, warn=warn)
        return model

    def disabled(self, model: Any) -> AbstractContextManager[Any]:
        """Switch the generators off."""
        from wegeft_cli.methods.layers.owner import disable_generators

        return disable_generators(model)

    def fold(self, model: Any, adapter: Adapter) -> tuple[nn.Module, int]:
        """Fold the generated changes into the weights and remove the generators."""
        from wegeft_cli.methods.layers.owner import remove_generators
        from wegeft_cli.methods.wegeft.folding import fold_generators

        num_folded = fold_generators(model, keep_base=False)
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
        """Return `w s W phi psi` of each adapted tensor, and modules that were trained whole."""
        from wegeft_cli.artifacts.stored_names import has_all_tensors, name_as_in_files
        from wegeft_cli.methods.tensor_changes import generated_changes
        from wegeft_cli.methods.wegeft.layer_names import name_as_in_model

        files = adapter.files
        if model is not None:
            files = name_as_in_model(model, files, adapter.folder)
        elif not has_all_tensors(files, shapes):
            files = name_as_in_files(files)
            if not has_all_tensors(files, shapes):
                return None
        return generated_changes(files, weight, shapes)

    def has_lora_equivalent(self, adapter: Adapter) -> bool:
        """Return that every adapter has one."""
        return True

    def lora_pairs(
        self,
        adapter: Adapter,
        model: nn.Module,
        base_dir: Path,
        *,
        trust_remote_code: bool,
        warn: Callable[[str], None],
    ) -> LoraPairs:
        """Return `B = s W phi, A = psi`, or `B = s phi, A = psi W` on the output side."""
        from wegeft_cli.methods.wegeft.lora_pairs import find_generated_pairs

        return find_generated_pairs(
            adapter, model, base_dir, trust_remote_code=trust_remote_code, warn=warn
        )


METHOD = WeGeFTMethod()
