"""The adapter's manifest, `adapter_config.json`: what was adapted, how, and on which base."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, get_args

from wegeft_cli.artifacts.prompt_record import PROMPT_KEY, PromptRecord, prompt_complaint
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.schema import Init, Share, Side
from wegeft_cli.storage.json_files import is_number, parse_json, shorten

PEFT_TYPE = "WEGEFT"
INPLACE_TYPE = "WEGEFT_INPLACE"
"""`peft_type` of adapters that hold the base's own parameters; PEFT has no such method."""
AFFINE_TYPE = "WEGEFT_AFFINE"
"""`peft_type` of adapters of affine edits; PEFT has no such method."""
FORMAT_VERSION = 1

_ENTRY_KEYS = frozenset({"group", "rows", "transposed", "experts"})
# What PEFT writes for itself into the file of an adapter that was trained with it.
_PEFT_KEYS = frozenset({"auto_mapping", "inference_mode", "peft_version"})
_GROUP_NAME = re.compile(r"[A-Za-z0-9_-]+")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_SCALE_TOLERANCE = 1e-6  # alpha / r as another program may have rounded it


@dataclass(frozen=True)
class ModuleEntry:
    """What adapts a module, or some of its rows.

    Args:
        group: Name of the group whose pair is used; no dot in it.
        rows: Half-open row ranges of a fused projection, ascending; None is the whole module.
        transposed: Whether the base stores the weight as [d_in, d_out] (transformers' Conv1D): the
            shape of a square weight does not show it.
        experts: How many matrices the weight stacks, one for each expert; the module's name is then
            the parameter's. 0 for a linear layer.
    """

    group: str
    rows: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False
    experts: int = 0


@dataclass(frozen=True)
class Edit:
    """What `wegeft edit` did to a part of an adapter.

    Args:
        part: The part as it was typed: group:q_proj, layer:3, direction:q_proj:7, ...
        factor: What its s was multiplied by; 0 dropped it.
    """

    part: str
    factor: float


@dataclass(frozen=True)
class AdapterManifest:
    """Everything about an adapter but its tensors.

    Args:
        task_type: CAUSAL_LM, SEQ_CLS, ... in PEFT's words; None if PEFT was given none.
        base_model_name_or_path: The base that it was trained on; None where PEFT knew of none.
        revision: The base's hub revision.
        base_fingerprint: "sha256:<64 hex digits>" of the base's tensors, None if unknown.
        r: Rank of the pairs, at least 1.
        alpha: Numerator of the scale.
        scale: alpha / r.
        side: input or output.
        share: module_type, input_dim, none, or groups for an explicit map.
        dropout: Weight dropout while training, 0 <= p < 1.
        init: phi_zero or psi_zero.
        modules: Full dotted name of each adapted module in the base checkpoint -> its entries.
        target_modules: What the recipe asked for: names, or one expression.
        wegeft_version: Version that wrote it.
        modules_to_save: Full dotted names, in the base checkpoint, of the modules that were trained
            whole; omitted from the file if there are none.
        init_from: The adapter whose factors were the start, as the recipe named it; omitted from
            the file if the start was random.
        base_quantization: How the base was quantized while training (`bitsandbytes_4bit`); omitted
            from the file if it was not.
        edits: What was done to the trained adapter since. It is a record: the factors and modules
            here are the edited ones, so readers need no knowledge of it. Omitted from the file if
            there are none.
        checkpoint_names: Tensor of an adapted or trained module, as named here -> its name in the
            base's files, where that differs. Those names stay when transformers renames a module.
            Omitted from the file if none differs.
        prompt: The prompt form of the training rows; omitted from the file if it is unknown.
    """

    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    base_fingerprint: str | None
    r: int
    alpha: float
    scale: float
    side: Side
    share: Share | Literal["groups"]
    dropout: float
    init: Init
    modules: Mapping[str, tuple[ModuleEntry, ...]]
    target_modules: tuple[str, ...] | str
    wegeft_version: str
    modules_to_save: tuple[str, ...] = ()
    init_from: str | None = None
    base_quantization: str | None = None
    edits: tuple[Edit, ...] = ()
    checkpoint_names: Mapping[str, str] = field(default_factory=dict)
    prompt: PromptRecord | None = None

    @property
    def groups(self) -> dict[str, list[str]]:
        """Each group -> the modules that use it, in the manifest's order."""
        groups: dict[str, list[str]] = {}
        for name, entries in self.modules.items():
            for entry in entries:
                members = groups.setdefault(entry.group, [])
                if name not in members:
                    members.append(name)
        return groups

    def to_json(self) -> str:
        """Write the manifest as the text of `adapter_config.json`."""
        values: dict[str, Any] = {"peft_type": PEFT_TYPE, "format_version": FORMAT_VERSION}
        values |= {each.name: getattr(self, each.name) for each in fields(self)}
        values["modules"] = {name: entries_as_json(es) for name, es in self.modules.items()}
        values["edits"] = [asdict(edit) for edit in self.edits]
        values["checkpoint_names"] = dict(self.checkpoint_names)
        values[PROMPT_KEY] = None if self.prompt is None else self.prompt.to_json()
        values = {key: v for key, v in values.items() if key not in _OPTIONAL or v}
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, file: str) -> AdapterManifest:
        """Read the text of `adapter_config.json`, strictly.

        Raises:
            UserError: If it is damaged, or the adapter is of another kind or a newer format.
            ExceptionGroup: If there are several faults.
        """
        values = parse_json(text, file=file)
        _check_kind(values, file)
        checks = _CHECKS | {key: check for key, check in _OPTIONAL.items() if key in values}
        known = {"peft_type", "format_version", *_CHECKS, *_OPTIONAL}
        faults = [
            UserError(
                "is not a key of a WeGeFT adapter", file=file, key=key, hint=_nearest(key, known)
            )
            for key in values
            if key not in known | _PEFT_KEYS
        ]
        for key, complaint in checks.items():
            if key not in values:
                faults.append(UserError("is missing", file=file, key=key))
            elif wrong := complaint(values[key]):
                message = f"must be {wrong}, got {shorten(values[key])}"
                faults.append(UserError(message, file=file, key=key))
        modules: dict[str, tuple[ModuleEntry, ...]] = {}
        for name, value in _mapping(values.get("modules")).items():
            wrong = module_complaint(name, value)
            if wrong:
                faults.append(UserError(wrong, file=file, key=f"modules.{name}"))
            else:
                modules[name] = entries_from_json(value)
        raise_all(faults)

        scale = values["alpha"] / values["r"]
        if not math.isclose(values["scale"], scale, rel_tol=_SCALE_TOLERANCE):
            message = f"is {values['scale']}, but alpha / r is {scale}"
            raise UserError(message, file=file, key="scale")
        target_modules = values["target_modules"]
        if isinstance(target_modules, list):
            target_modules = tuple(target_modules)
        read: dict[str, Any] = {key: float(values[key]) for key in ("alpha", "scale", "dropout")}
        read |= {"modules": modules, "target_modules": target_modules}
        read["modules_to_save"] = tuple(values.get("modules_to_save", ()))
        read["checkpoint_names"] = dict(values.get("checkpoint_names", {}))
        prompt = values.get(PROMPT_KEY)
        read[PROMPT_KEY] = None if prompt is None else PromptRecord.from_json(prompt, file=file)
        read["edits"] = tuple(Edit(e["part"], float(e["factor"])) for e in values.get("edits", ()))
        return cls(**{key: values[key] for key in checks} | read)


def _check_kind(values: Any, file: str) -> None:
    """Refuse what is no WeGeFT adapter, and say what it is instead."""
    if not isinstance(values, dict):
        raise UserError(f"must be a JSON object, got {shorten(values)}", file=file)
    kind = values.get("peft_type")
    if kind is None:
        raise UserError("is missing: this is no adapter's config", file=file, key="peft_type")
    if kind != PEFT_TYPE:
        raise UserError(
            f"this is a PEFT adapter of type {shorten(kind)}, not a WeGeFT adapter",
            file=file,
            key="peft_type",
            hint="load it with PEFT (peft.PeftModel.from_pretrained)",
        )
    version = values.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise UserError(
            f"this adapter has format {shorten(version)}; this version reads {FORMAT_VERSION}",
            file=file,
            key="format_version",
            hint="install the version of wegeft-cli that wrote it, or a newer one",
        )


def _nearest(key: str, known: set[str]) -> str | None:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"did you mean `{near[0]}`?" if near else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "a text"


def _text_or_null(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else "a text or null"


def _fingerprint(value: Any) -> str | None:
    fits = value is None or (isinstance(value, str) and _FINGERPRINT.fullmatch(value))
    return None if fits else "sha256:<64 hex digits> or null"


def _rank(value: Any) -> str | None:
    return None if _is_int(value, 1) and is_number(value) else "a whole number of at least 1"


def _finite(value: Any) -> str | None:
    return None if is_number(value) else "a finite number"


def _fraction(value: Any) -> str | None:
    return None if is_number(value) and 0 <= value < 1 else "a number of at least 0 and below 1"


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def complaint(value: Any) -> str | None:
        return None if value in choices else f"one of {', '.join(choices)}"

    return complaint


def _names(value: Any) -> str | None:
    fits = isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )
    return None if fits else "a text or a list of texts"


def _module_names(value: Any) -> str | None:
    fits = isinstance(value, list) and all(
        isinstance(name, str) and _MODULE_NAME.fullmatch(name) for name in value
    )
    return None if fits else "a list of dotted module names"


def _edits(value: Any) -> str | None:
    fits = isinstance(value, list) and all(
        isinstance(edit, dict)
        and set(edit) == {"part", "factor"}
        and isinstance(edit["part"], str)
        and is_number(edit["factor"])
        for edit in value
    )
    return None if fits else "a list of {part, factor}"


def _name_map(value: Any) -> str | None:
    fits = isinstance(value, dict) and all(
        isinstance(name, str) and _MODULE_NAME.fullmatch(name) for name in value.values()
    )
    return None if fits else "a map of dotted names to dotted names"


def _modules(value: Any) -> str | None:
    return None if isinstance(value, dict) and value else "a map of at least one module"


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "task_type": _text_or_null,
    "base_model_name_or_path": _text_or_null,
    "revision": _text_or_null,
    "base_fingerprint": _fingerprint,
    "r": _rank,
    "alpha": _finite,
    "scale": _finite,
    "side": _one_of(*get_args(Side)),
    "share": _one_of(*get_args(Share), "groups"),
    "dropout": _fraction,
    "init": _one_of(*get_args(Init)),
    "modules": _modules,
    "target_modules": _names,
    "wegeft_version": _text,
}
_OPTIONAL: dict[str, Callable[[Any], str | None]] = {
    "modules_to_save": _module_names,
    "init_from": _text_or_null,
    "base_quantization": _text_or_null,
    "edits": _edits,
    "checkpoint_names": _name_map,
    PROMPT_KEY: prompt_complaint,
}


def entries_as_json(entries: tuple[ModuleEntry, ...]) -> Any:
    """Return one module's line as the file states it."""
    if len(entries) == 1 and entries[0] == ModuleEntry(entries[0].group):
        return entries[0].group
    return [
        {"group": entry.group}
        | ({} if entry.rows is None else {"rows": entry.rows})
        | ({"transposed": True} if entry.transposed else {})
        | ({"experts": entry.experts} if entry.experts else {})
        for entry in entries
    ]


def entries_from_json(value: Any) -> tuple[ModuleEntry, ...]:
    """Read one module's line, of which `module_complaint` has nothing to say."""
    if isinstance(value, str):
        return (ModuleEntry(value),)
    return tuple(
        ModuleEntry(
            entry["group"],
            tuple((a, b) for a, b in entry["rows"]) if "rows" in entry else None,
            entry.get("transposed", False),
            entry.get("experts", 0),
        )
        for entry in value
    )


def module_complaint(name: str, value: Any) -> str | None:
    """Say what is wrong with one module's line.

    It is "group", or a list of {"group", "rows": [[a, b], ...], "transposed": true}, of which rows
    may be omitted if there is one entry, and transposed where it is false.
    """
    if not _MODULE_NAME.fullmatch(name):
        return "is no dotted module name"
    if isinstance(value, str):
        return None if _GROUP_NAME.fullmatch(value) else f"{shorten(value)} is no group name"
    if not isinstance(value, list) or not value:
        return f"must be a group, or a list of groups with their rows, got {shorten(value)}"
    taken: list[tuple[int, int]] = []
    for entry in value:
        if not isinstance(entry, dict) or not {"group"} <= set(entry) <= _ENTRY_KEYS:
            return f"must hold a group and its rows, got {shorten(entry)}"
        if entry.get("transposed", True) is not True:
            return f"transposed must be true or omitted, got {shorten(entry['transposed'])}"
        group, rows = entry["group"], entry.get("rows")
        if not isinstance(group, str) or not _GROUP_NAME.fullmatch(group):
            return f"{shorten(group)} is no group name"
        if "experts" in entry and (not _is_int(entry["experts"], 1) or rows is not None):
            return f"experts must be a number of at least 1, without rows, got {shorten(entry)}"
        if "rows" not in entry and {"transposed", "experts"} & set(entry) and len(value) == 1:
            return None
        if not isinstance(rows, list) or not rows or not all(map(_is_range, rows)):
            return f"rows must be pairs [start, stop] with start < stop, got {shorten(rows)}"
        taken += [(start, stop) for start, stop in rows]
    taken.sort()
    if any(stop > start for (_, stop), (start, _) in pairwise(taken)):
        return "gives some rows to more than one group"
    return None


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_int(value[0], 0)
        and _is_int(value[1], value[0] + 1)
    )
