"""`WegeftConfig`: what PEFT's user sets, and what `adapter_config.json` states."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils import PeftType

from wegeft_cli.artifacts.fingerprint import fingerprint_base, list_tensors
from wegeft_cli.artifacts.manifest import FORMAT_VERSION, PEFT_TYPE, module_complaint
from wegeft_cli.artifacts.stored_names import match_stored_names
from wegeft_cli.errors import UserError
from wegeft_cli.methods.wegeft.equations import default_alpha
from wegeft_cli.models.base_folder import find_base_folder
from wegeft_cli.recipe.schema import Init, Share, Side
from wegeft_cli.version import VERSION

_CHOICES = {
    "share": (*get_args(Share), "groups"),
    "side": get_args(Side),
    "init": get_args(Init),
}
# How layers were looked for: superseded in the file by `modules`, the layers that were found.
_SEARCH_KEYS = ("exclude_modules", "layers_to_transform", "layers_pattern", "groups")
_START_KEYS = ("init_weights",)  # says nothing of a trained adapter
_OPTIONAL_KEYS = (
    "modules_to_save", "init_from", "base_quantization", "auto_mapping", "checkpoint_names",
    "prompt",
)  # fmt: skip
_SCALE_TOLERANCE = 1e-6  # alpha / r as another program may have rounded it


@dataclass
class WegeftConfig(PeftConfig):
    """Settings of a WeGeFT adapter: W' = W (I + s phi psi), s = alpha / r.

    What PEFT's other configs call the same means the same: `task_type`, `target_modules`,
    `exclude_modules`, `modules_to_save`, `layers_to_transform`, `layers_pattern`. The file that it
    writes is the one that `wegeft train` writes.

    Args:
        r: Rank of the pairs, at least 1.
        alpha: The edit is scaled by alpha / r; None means 2 r, the published scale of 2.
        target_modules: Names, one regular expression, `all-linear`, or None for PEFT's defaults.
        exclude_modules: Names or one regular expression of what is left alone.
        share: Who shares one pair: module_type, input_dim or none; groups where `groups` is given.
        groups: Explicit sharing: group name -> patterns over full module names.
        side: input or output.
        init: Which factor starts at zero: phi_zero or psi_zero.
        init_weights: False draws both factors, so that a new adapter changes the output. For tests;
            no file states it.
        dropout: Dropout on the entries of the frozen weight while training, 0 <= p < 1.
        modules_to_save: Modules that are trained and saved whole beside the pairs.
        layers_to_transform: Index or indices of the layers to adapt; None means all.
        layers_pattern: Name of the list that these indices count, such as `layers`.
        format_version: Version of the file's layout.
        scale: alpha / r, for readers of the file. Default: computed.
        modules: Full name of each adapted module -> its group; found in the model where None. Where
            it is given, as in every file, it says what is adapted and the search keys say nothing.
        base_fingerprint: Of the base's files; found out when saving where None.
        init_from: The adapter whose factors were the start, for the record.
        base_quantization: How the base was quantized while training, for the record.
        checkpoint_names: Tensors of `modules` and `modules_to_save` -> their names in the base's
            files, where they differ; found out when saving.
        prompt: The prompt form of the training rows, for the record.
        wegeft_version: Version that wrote the file.

    Raises:
        ValueError: If a value is outside its range, or keys contradict each other.
    """

    r: int = 64
    alpha: float | None = None
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    share: Share | Literal["groups"] = "module_type"
    groups: dict[str, list[str]] | None = None
    side: Side = "input"
    init: Init = "phi_zero"
    init_weights: bool = True
    dropout: float = 0.0
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    format_version: int = FORMAT_VERSION
    scale: float | None = None
    modules: dict[str, Any] | None = None
    base_fingerprint: str | None = None
    init_from: str | None = None
    base_quantization: str | None = None
    checkpoint_names: dict[str, str] | None = None
    prompt: dict[str, Any] | None = None
    wegeft_version: str = VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_TYPE]
        # True once `modules` was found in a model: another model is searched anew.
        self.is_searched = False
        # Known once the config was applied to a model.
        self.model_prefix = ""
        self.saved_names: list[str] = []
        self.file_layers: dict[str, str] = {}
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
        if self.groups is not None:
            self.share = "groups"
        self._check_numbers()
        self._check_choices()

    def _check_numbers(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"`r` must be a whole number of at least 1, got {self.r!r}")
        self.alpha = float(default_alpha(self.r) if self.alpha is None else self.alpha)
        if not math.isfinite(self.alpha):
            raise ValueError(f"`alpha` must be finite, got {self.alpha}")
        scale = self.alpha / self.r
        if self.scale is not None and not math.isclose(self.scale, scale, rel_tol=_SCALE_TOLERANCE):
            raise ValueError(f"`scale` is {self.scale}, but alpha / r is {scale}: leave it out")
        self.scale = scale
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1, got {self.dropout}")
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"this adapter has format {self.format_version!r}; this version of wegeft-cli "
                f"reads {FORMAT_VERSION}: install the version that wrote it, or a newer one"
            )

    def _check_choices(self) -> None:
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                told = ", ".join(choices)
                raise ValueError(f"`{key}` must be one of {told}, got {getattr(self, key)!r}")
        if self.share == "groups" and self.groups is None and self.modules is None:
            raise ValueError("`share` is 'groups', but there are no `groups`")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` says nothing without `layers_to_transform`")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` works with a list of names: one regular expression in "
                "`target_modules` says itself which layers it means"
            )
        for name, entries in (self.modules or {}).items():
            if complaint := module_complaint(name, entries):
                raise ValueError(f"`modules`: {name!r} {complaint}")
        if self.modules is not None or isinstance(self.target_modules, str):
            return
        rows = next((name for name in self.target_modules or () if ":" in name), None)
        if rows is not None:
            raise ValueError(
                f"{rows!r} names rows of a fused projection, which PEFT's search does not know: "
                "adapt the whole projection, or give the rows in `modules`"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as `adapter_config.json` states it."""
        values: dict[str, Any] = super().to_dict()
        if self.modules is not None:
            unset = [key for key in _OPTIONAL_KEYS if values.get(key) is None]
            values = {
                k: v for k, v in values.items() if k not in (*_SEARCH_KEYS, *_START_KEYS, *unset)
            }
        # Sets have no order, and one adapter should give one file.
        return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, with the base's file names and fingerprint if known."""
        stated = copy.copy(self)
        if self.modules is not None:
            stored = self._read_base()
            weights = dict.fromkeys(self.modules, "weight")
            names = match_stored_names(weights, stored, self.model_prefix)
            stated.modules = {names[name]: entry for name, entry in self.modules.items()}
            stated.base_fingerprint = self.base_fingerprint
            stated.checkpoint_names = self._names_in_files(names, stored) or None
            # PEFT takes the ends of names; the file names each module that was really trained.
            stated.modules_to_save = self.saved_names or None
        super(WegeftConfig, stated).save_pretrained(save_directory, **kwargs)

    def _names_in_files(self, names: Mapping[str, str], stored: Set[str]) -> dict[str, str]:
        """Return the tensors of renamed layers by their names in the base's files."""
        tensors: dict[str, str] = {}
        for name, file in self.file_layers.items():
            if name in names:
                tensors[f"{names[name]}.weight"] = f"{file}.weight"
            if name in self.saved_names:
                tensors |= {f"{name}.{part}": f"{file}.{part}" for part in ("weight", "bias")}
        return {name: file for name, file in tensors.items() if file in stored}

    def _read_base(self) -> set[str]:
        """Return the names of the base's tensors, and remember its fingerprint."""
        if not self.base_model_name_or_path:
            return set()
        try:
            base_dir = find_base_folder(self.base_model_name_or_path, self.revision)
            if base_dir is None:
                return set()
            if self.base_fingerprint is None:
                self.base_fingerprint = fingerprint_base(base_dir)
            return set(list_tensors(base_dir))
        except UserError as fault:
            # The training is done: its adapter is worth more than the record of its base.
            warnings.warn(f"the adapter records no fingerprint of its base: {fault}", stacklevel=2)
            return set()
