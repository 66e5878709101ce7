"""Read a recipe of another tool, find the tool by its keys, and write it as a recipe."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.importing.conversion import Conversion, Converted, Remark
from wegeft_cli.recipe.importing.tools import find_tool
from wegeft_cli.recipe.load import build_recipe, read_settings
from wegeft_cli.recipe.schema import PEFT_TYPES
from wegeft_cli.recipe.yaml_source import read_document

_SECTIONS = ("model", "adapter", "data", "train", "eval", "logging")
_TITLES = "axolotl, LLaMA-Factory, TRL (`trl sft`), torchtune, or PEFT's adapter_config.json"


@dataclass(frozen=True)
class ImportedRecipe:
    """A recipe of another tool as a recipe, and what changed on the way."""

    tool: str
    text: str
    """The new recipe as YAML."""
    num_keys: int
    """Keys of the other tool's recipe that are set."""
    converted: tuple[Converted, ...]
    differs: tuple[Remark, ...]
    dropped: tuple[Remark, ...]
    unneeded: tuple[str, ...]
    missing: tuple[Remark, ...]
    """Keys that the user must set, and faults of the new recipe."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        values = {name: value for name, value in asdict(self).items() if name != "text"}
        return {"recipe": self.text, **values}


def import_recipe(path: str | Path) -> ImportedRecipe:
    """Convert a recipe of another tool.

    Raises:
        UserError: If the file cannot be read, no tool is recognized, or the recipe trains something
            that has no counterpart.
        ExceptionGroup: If the file has several faults.
    """
    file = Path(path)
    source = _read(file)
    tool = find_tool(source)
    if tool is None:
        raise _explain_unknown(source, file)
    module = importlib.import_module(f"wegeft_cli.recipe.importing.{tool.module}")
    at = Conversion({key: value for key, value in source.items() if value is not None})
    try:
        module.convert(at, file.parent)
    except UserError as fault:
        fault.file = fault.file or str(file)
        raise
    at.finish()
    if at.value("model.trust_remote_code"):
        text = "runs Python code of the model's repository; remove it if the model needs none"
        at.differ("trust_remote_code", text)
    at.set("output_dir", at.value("output_dir") or f"runs/{file.stem}", "output_dir")
    missing = list(at.missing)
    text = _write(tool.title, file.name, at)
    named = {remark.key for remark in missing}
    missing += [fault for fault in _check(text) if fault.key not in named]
    return ImportedRecipe(
        tool=tool.title,
        text=text,
        num_keys=len(at.source),
        converted=tuple(at.converted.values()),
        differs=tuple(at.differs),
        dropped=tuple(at.dropped),
        unneeded=tuple(at.unneeded),
        missing=tuple(missing),
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"is not UTF-8 text (byte {error.start})", file=str(file), hint="save it as UTF-8"
        ) from None
    faults: list[UserError] = []
    document = read_document(text, str(file), faults)
    raise_all(faults)
    assert document is not None
    try:
        values = OmegaConf.to_container(OmegaConf.create(document.values), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0], file=str(file)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _explain_unknown(source: Mapping[str, Any], file: Path) -> UserError:
    if any(isinstance(source.get(name), dict) for name in _SECTIONS):
        return UserError(
            "is a recipe of this package already",
            file=str(file),
            hint=f"wegeft validate {file}",
        )
    keys = ", ".join(list(source)[:6])
    return UserError(
        f"no tool has these keys: {keys}",
        file=str(file),
        hint=f"recipes of {_TITLES} are converted",
    )


def _check(text: str) -> list[Remark]:
    """Return the faults of the new recipe."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        settings = read_settings(file)
        build_recipe(settings)
    return [
        Remark(fault.key or "", fault.message + (f"; {fault.hint}" if fault.hint else ""))
        for fault in settings.errors.faults
    ]


def _write(title: str, name: str, at: Conversion) -> str:
    """Return the recipe as YAML: remarks as a header, and the source of each renamed key."""
    lines = [f"# Converted from {name}, a recipe of {title}, by `wegeft recipes import`."]
    for words, remarks in (
        ("Set these keys before training", at.missing),
        ("Differs", at.differs),
        ("No counterpart", at.dropped),
    ):
        if remarks:
            lines += ["#", f"# {words}:"]
            lines += [f"#   {remark}" for remark in remarks]
    if at.value("adapter.type") in PEFT_TYPES:
        lines += ["#", "# This is the method of the original. `wegeft train FILE "
                  "adapter.type=wegeft` trains WeGeFT on the same data."]  # fmt: skip
    lines.append("")
    top = [each for key, each in at.converted.items() if "." not in key]
    lines += [_write_line(each, each.target, "") for each in top]
    for section in _SECTIONS:
        inside = [each for each in at.converted.values() if each.target.startswith(f"{section}.")]
        if inside:
            lines += ["", f"{section}:", *_write_section(inside, section)]
    return "\n".join(lines) + "\n"


def _write_section(inside: list[Converted], section: str) -> list[str]:
    lines, inner = [], []
    for each in inside:
        name = each.target.removeprefix(f"{section}.")
        if "." in name:
            inner.append((name, each))
        elif isinstance(each.value, list) and any(isinstance(item, dict) for item in each.value):
            lines.append(f"  {name}:{_comment(each, name)}")
            for item in each.value:
                lines += _write_item(item)
        else:
            lines.append(_write_line(each, name, "  "))
    group = None
    for name, each in inner:
        outer, _, last = name.partition(".")
        if outer != group:
            lines.append(f"  {outer}:")
            group = outer
        lines.append(_write_line(each, last, "    "))
    return lines


def _write_item(item: Mapping[str, Any]) -> list[str]:
    pairs = [f"{key}: {_inline(value)}" for key, value in item.items()]
    return [f"    {'- ' if number == 0 else '  '}{pair}" for number, pair in enumerate(pairs)]


def _write_line(each: Converted, name: str, indent: str) -> str:
    return f"{indent}{name}: {_inline(each.value)}{_comment(each, name)}"


def _comment(each: Converted, name: str) -> str:
    if each.source is None:
        return "  # the other tool's default"
    return "" if each.source == name else f"  # {each.source}"


def _inline(value: Any) -> str:
    """Return a value as YAML in one line."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and abs(value) < 1e-3:
        digits, _, power = f"{value:e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
