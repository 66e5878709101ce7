"""Methods that train the base's own parameters: full, bitfit and linear_probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wegeft_cli.artifacts.manifest import INPLACE_TYPE
from wegeft_cli.errors import UserError
from wegeft_cli.methods.base import (
    LAYER_KEYS,
    MODULES_TO_SAVE,
    UNREAD_WITHOUT_GENERATORS,
    AdapterRecord,
    Method,
    ParameterGroup,
    check_no_peft_keys,
    check_without_generators,
)
from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import INPLACE_TYPES, AdapterSection, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wegeft_cli.artifacts.adapter import Adapter

_KEY = "adapter.type"


def select_parameters(
    model: nn.Module, method: str, modules_to_save: Sequence[str]
) -> dict[str, list[str]]:
    """Choose what learns.

    Args:
        method: full (every parameter), bitfit (every bias: Ben Zaken, Ravfogel, Goldberg, ACL 2022,
            arXiv 2106.10199), or linear_probe (none of the backbone's).

    Raises:
        UserError: If nothing learns, or a parameter is quantized.
        ExceptionGroup: If several modules cannot be trained whole.
    """
    named = dict(model.named_parameters())
    if method == "full":
        chosen = {"all": list(named)}
    else:
        from wegeft_cli.methods.layers.trained_modules import find_saved_modules

        saved = find_saved_modules(model, modules_to_save)
        whole = [name for name in named if any(name.startswith(f"{module}.") for module in saved)]
        biases = [name for name in named if name.endswith("bias") and name not in set(whole)]
        chosen = {"bias": biases if method == "bitfit" else [], MODULES_TO_SAVE: whole}
        if method == "bitfit" and not biases:
            raise UserError(
                "the model has no bias to train",
                key=_KEY,
                hint="take another method: this architecture has linears without bias",
            )
    chosen = {kind: names for kind, names in chosen.items() if names}
    if not chosen:
        raise UserError(f"{method!r} leaves nothing to learn", key=_KEY)
    for names in chosen.values():
        for name in names:
            if not named[name].is_floating_point() or named[name].dtype.itemsize < 2:
                message = f"{name!r} is quantized and cannot be trained itself"
                raise UserError(message, key=_KEY, hint="load the base in float32")
    return chosen


def unfreeze(model: nn.Module, names: Sequence[str]) -> None:
    """Let parameters learn, and no other.

    Args:
        model: The model; it becomes float32 where its weights have 16 bits, since most steps on
            those are rounded away.
    """
    model.requires_grad_(False)
    if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters()):
        model.float()
    named = dict(model.named_parameters())
    for name in names:
        named[name].requires_grad_(True)


def put_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put trained values into a model's own parameters and running statistics.

    Raises:
        UserError: If the model has no such parameter, or one of another shape.
    """
    import torch

    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        ours = list(named[name].shape) if name in named else "nothing"
        if ours != list(tensor.shape):
            raise UserError(
                f"{name} is {ours} in this model, {list(tensor.shape)} in the adapter",
                hint="this adapter belongs to another model",
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[name].copy_(tensor)


class InPlaceMethod(Method):
    """Training of all parameters, of the biases, or of the classification head alone."""

    names = INPLACE_TYPES
    peft_types = (INPLACE_TYPE,)
    trains_in_place = True
    needs_package = True

    def describe(self, peft_type: str) -> str:
        """Return what such an adapter contains."""
        return "the base's own weights, trained by full, bitfit or linear_probe"

    def unread_keys(self, name: str) -> tuple[str, ...]:
        """Return the keys of generators and of layers that other methods add."""
        return (*UNREAD_WITHOUT_GENERATORS, *(f"adapter.{key}" for key in LAYER_KEYS))

    def check(self, recipe: Recipe) -> Iterator[Fault]:
        """Yield settings that contradict training the base's parameters as they are in memory."""
        adapter, kind = recipe.adapter, recipe.adapter.type
        yield from check_no_peft_keys(recipe)
        if recipe.model.dtype in ("bfloat16", "float16"):
            message = (
                f"{recipe.model.dtype!r} contradicts `adapter.type` {kind!r}: most steps on a "
            )
            hint = "use float32, and `train.mixed_precision: bf16` to compute in 16 bits"
            yield "model.dtype", message + "16-bit weight are rounded away", hint
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(recipe.model, name):
                message = (
                    f"contradicts `adapter.type` {kind!r}, which trains the base's own weights"
                )
                yield f"model.{name}", message, "remove it"
        for name in LAYER_KEYS:
            value = getattr(adapter, name)
            if value != getattr(AdapterSection(), name):
                message = f"{value!r} is not read by `adapter.type` {kind!r}, which adds no layer"
                yield f"adapter.{name}", message, "remove it"
        if adapter.init_from is not None:
            message = f"starts generators or a PEFT method; `adapter.type` is {kind!r}"
            yield (
                "adapter.init_from",
                message,
                "merge that adapter, and name the result as the base",
            )
        if kind == "full" and adapter.modules_to_save:
            message = "has no effect beside `adapter.type` 'full', which trains every module"
            yield "adapter.modules_to_save", message, "leave it empty"
        if kind == "linear_probe" and not recipe.has_head:
            message = f"'linear_probe' trains a classifier's head; `task` is {recipe.task!r}"
            yield "adapter.type", message, "use another type, or set `task`"
        yield from check_without_generators(recipe)

    def trains_everything(self, section: AdapterSection) -> bool:
        """Return whether the type is `full`."""
        return section.type == "full"

    def count(
        self, skeleton: nn.Module, section: AdapterSection, task_type: str | None
    ) -> list[ParameterGroup]:
        """Count the base's parameters that learn, by kind."""
        named = dict(skeleton.named_parameters())
        chosen = select_parameters(skeleton, section.type, section.modules_to_save)
        return [
            ParameterGroup(
                kind,
                len({name.rpartition(".")[0] for name in names}),
                None,
                sum(named[name].numel() for name in names),
            )
            for kind, names in chosen.items()
        ]

    def inject(
        self, model: nn.Module, section: AdapterSection, *, task_type: str | None, seed: int
    ) -> nn.Module:
        """Unfreeze the chosen parameters, and no others."""
        chosen = select_parameters(model, section.type, section.modules_to_save)
        unfreeze(model, [name for names in chosen.values() for name in names])
        return model

    def save(self, model: nn.Module, folder: Path, record: AdapterRecord) -> None:
        """Write the trained parameters."""
        from wegeft_cli.artifacts.in_place_files import InplaceManifest, save_inplace_files
        from wegeft_cli.models.running_statistics import trained_statistics
        from wegeft_cli.version import VERSION

        recipe = record.recipe
        manifest = InplaceManifest(
            method=recipe.adapter.type,
            task_type=record.task_type,
            base_model_name_or_path=recipe.model.name_or_path,
            revision=recipe.model.revision,
            base_fingerprint=record.base_fingerprint,
            wegeft_version=VERSION,
            prompt=record.prompt,
        )
        trained = {
            name: parameter.detach().cpu()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        trained |= {name: buffer.cpu() for name, buffer in trained_statistics(model).items()}
        save_inplace_files(folder, manifest, trained, card=record.card, more=record.more_files)

    def load(
        self,
        model: nn.Module,
        adapter: Adapter,
        *,
        base_dir: Path | None,
        warn: Callable[[str], None],
    ) -> nn.Module:
        """Copy the trained values into the base's own parameters."""
        from wegeft_cli.artifacts.in_place_files import load_inplace_files
        from wegeft_cli.methods.trained_base import check_base
        from wegeft_cli.models.file_names import rename_tensors

        manifest, tensors = load_inplace_files(adapter)
        if base_dir is not None:
            check_base(manifest, base_dir, adapter.folder, warn=warn)
        try:
            put_parameters(model, rename_tensors(model, tensors, model.state_dict()))
        except UserError as fault:
            fault.file = str(adapter.folder)
            raise
        return model

    def fold(self, model: nn.Module, adapter: Adapter) -> tuple[nn.Module, int]:
        """Return the model as it is, and how many of its tensors were trained."""
        from wegeft_cli.storage.safetensors_reader import read_shard

        return model, len(read_shard(adapter.weights_path).tensors)


METHOD = InPlaceMethod()
