"""The methods of the PEFT package (lora, dora, ia3, vera, ...) in the same recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wegeft_cli.errors import UserError
from wegeft_cli.methods.base import (
    MODULES_TO_SAVE,
    UNREAD_WITHOUT_GENERATORS,
    AdapterRecord,
    LayerChoice,
    Method,
    ParameterGroup,
    check_without_generators,
    count_whole,
)
from wegeft_cli.methods.peft.support import (
    NEED_WEIGHTS,
    check_support,
    count_layer,
    explain_name,
)
from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import PEFT_TYPES, AdapterSection, Recipe

if TYPE_CHECKING:
    from torch import nn

    from wegeft_cli.artifacts.adapter import Adapter
    from wegeft_cli.methods.layers.targets import Target

_SET_ELSEWHERE = {
    "r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.target_modules",
    "modules_to_save": "adapter.modules_to_save",
    "peft_type": "adapter.type",
    "task_type": "task",
}
_OWN_FILES = ("lora", "dora", "rslora", "pissa", "adalora", "ln_tuning")  # beside this package
_PARAMETER_PREFIXES = (
    "lora_", "ia3_", "vera_", "hada_", "lokr_", "oft_", "hra_", "boft_", "fourierft_",
)  # fmt: skip


class PeftMethod(Method):
    """A method that PEFT implements, by its PEFT name or as a preset of LoRA."""

    names = tuple(name for name in PEFT_TYPES if name not in _OWN_FILES)
    takes_any_name = True

    def explain_name(self, name: str) -> tuple[str, str] | None:
        """Return why a type of PEFT is refused and the nearest alternative."""
        return explain_name(name)

    def unread_keys(self, name: str) -> tuple[str, ...]:
        """Return the keys that only generators read."""
        return UNREAD_WITHOUT_GENERATORS

    def reads_rank(self, section: AdapterSection) -> bool:
        """Return whether PEFT's config has a rank, and no option replaces it."""
        return bool(getattr(_build_config(section, None), "r", None))

    def check(self, recipe: Recipe) -> Iterator[Fault]:
        """Yield keys of other methods, and options that have a recipe key already."""
        yield from check_without_generators(recipe)
        yield from check_support(recipe)
        for name in recipe.adapter.peft:
            if name in _SET_ELSEWHERE:
                right = _SET_ELSEWHERE[name]
                yield f"adapter.peft.{name}", f"is set by `{right}`", f"use `{right}`"

    def choose_layers(self, skeleton: nn.Module, section: AdapterSection) -> LayerChoice | None:
        """Return WeGeFT's layers for `all-linear`, as far as PEFT can adapt them."""
        from wegeft_cli.methods.peft.layers import choose_peft_layers

        return choose_peft_layers(skeleton, section, _build_config(section, None))

    def with_layers(
        self, skeleton: nn.Module, section: AdapterSection, targets: Sequence[Target]
    ) -> AdapterSection:
        """Name the layers as PEFT does, and stacked weights under `target_parameters`."""
        from wegeft_cli.methods.peft.layers import with_peft_layers

        return with_peft_layers(skeleton, section, _build_config(section, None), targets)

    def count(
        self, skeleton: nn.Module, section: AdapterSection, task_type: str | None
    ) -> list[ParameterGroup]:
        """Count the learned parameters of PEFT's own model, summed by kind of layer."""
        if section.type in NEED_WEIGHTS:
            return _count_by_shape(skeleton, section, task_type)
        model = self.inject(copy.deepcopy(skeleton), section, task_type=task_type, seed=0)
        prefixes = (*_PARAMETER_PREFIXES, _find_prefix(section, task_type))
        counts: dict[str, tuple[int, int]] = {}
        saved: set[str] = set()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            # ...layers.0.self_attn.q_proj.lora_A.default.weight: the layer's kind is q_proj
            parts = [part for part in name.split(".") if part != "base_layer"]
            followed = pairwise(parts)
            kind = next((a for a, b in followed if b.startswith(prefixes)), parts[-1])
            if MODULES_TO_SAVE in parts:  # ...lm_head.modules_to_save.default.weight
                kind = MODULES_TO_SAVE
                saved.add(name.partition(f".{MODULES_TO_SAVE}.")[0])
            layers, total = counts.get(kind, (0, 0))
            counts[kind] = (layers + 1, total + parameter.numel())
        if saved:
            counts[MODULES_TO_SAVE] = (len(saved), counts[MODULES_TO_SAVE][1])
        if not counts:
            raise UserError(f"{section.type!r} leaves nothing to learn", key="adapter.type")
        return [ParameterGroup(kind, n, None, total) for kind, (n, total) in counts.items()]

    def inject(
        self, model: nn.Module, section: AdapterSection, *, task_type: str | None, seed: int
    ) -> nn.Module:
        """Wrap the base in PEFT's model, whose initial values come from torch's global state.

        A model without weights gets LoRA in place of `NEED_WEIGHTS`, for the memory estimate.
        """
        from wegeft_cli.methods.peft.models import inject_peft

        if section.type in NEED_WEIGHTS and all(p.is_meta for p in model.parameters()):
            section = replace(section, type="lora", peft={})
        return inject_peft(model, _build_config(section, task_type), section.modules_to_save)

    def check_start(
        self, skeleton: nn.Module, section: AdapterSection, start: Adapter, base_dir: Path | None
    ) -> None:
        """Compare the settings with those of the adapter's PEFT config."""
        from wegeft_cli.methods.peft.models import check_peft_start

        check_peft_start(
            section.type,
            rank=section.r,
            alpha=section.alpha,
            options=section.peft,
            adapter_dir=start.folder,
        )

    def start_from(
        self,
        model: nn.Module,
        start: Adapter,
        base_fingerprint: str | None,
        warn: Callable[[str], None],
    ) -> None:
        """Copy the adapter's tensors into PEFT's model."""
        from wegeft_cli.methods.peft.loading import start_from_peft

        start_from_peft(model, start)

    def save(self, model: nn.Module, folder: Path, record: AdapterRecord) -> None:
        """Write the adapter as PEFT does; the quantization and the prompt form go beside it."""
        from wegeft_cli.artifacts.adapter import base_record_to_json
        from wegeft_cli.artifacts.adapter_files import BASE_NAME, CARD_NAME
        from wegeft_cli.methods.peft.models import save_peft
        from wegeft_cli.models.quantization import find_kind
        from wegeft_cli.storage.atomic import atomic_folder

        texts = {CARD_NAME: record.card, **record.more_files}
        if (text := base_record_to_json(find_kind(model), record.prompt)) is not None:
            texts[BASE_NAME] = text
        name_or_path = record.recipe.model.name_or_path
        with atomic_folder(folder) as temporary:
            save_peft(model, temporary, base_model_name_or_path=name_or_path)
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")

    def load(
        self,
        model: nn.Module,
        adapter: Adapter,
        *,
        base_dir: Path | None,
        warn: Callable[[str], None],
    ) -> nn.Module:
        """Load the adapter by PEFT, in evaluation mode."""
        from wegeft_cli.methods.peft.loading import load_peft

        return load_peft(model, adapter)

    def disabled(self, model: Any) -> AbstractContextManager[Any]:
        """Return PEFT's own context."""
        context: AbstractContextManager[Any] = model.disable_adapter()
        return context

    def fold(self, model: Any, adapter: Adapter) -> tuple[nn.Module, int]:
        """Fold by PEFT."""
        from wegeft_cli.methods.peft.models import merge_peft

        return merge_peft(model)


def _build_config(section: AdapterSection, task_type: str | None) -> Any:
    from wegeft_cli.methods.peft.models import build_config

    return build_config(
        section.type,
        section.r,
        section.alpha,
        section.target_modules,
        section.peft,
        task_type,
    )


def _find_prefix(section: AdapterSection, task_type: str | None) -> str:
    """Return how PEFT begins the names of a method's parameters."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    config = _build_config(section, task_type)
    prefix: str = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    return prefix


def _count_by_shape(
    skeleton: nn.Module, section: AdapterSection, task_type: str | None
) -> list[ParameterGroup]:
    """Count by the layers' shapes what PEFT cannot build without weights, see `count_layer`."""
    from wegeft_cli.methods.layers.trained_modules import find_saved_modules
    from wegeft_cli.methods.peft.layers import choose_peft_layers

    config = _build_config(section, task_type)
    choice = choose_peft_layers(skeleton, section, config)
    counts: dict[str, list[int]] = {}
    for target in () if choice is None else choice.targets:
        number = count_layer(section.type, config, target.d_in, target.d_out)
        counts.setdefault(target.kind, []).append(number)
    groups = [ParameterGroup(kind, len(each), None, sum(each)) for kind, each in counts.items()]
    saved = find_saved_modules(skeleton, section.modules_to_save)
    return [*groups, *count_whole(skeleton, saved)]


METHOD = PeftMethod()
