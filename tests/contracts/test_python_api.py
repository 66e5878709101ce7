"""The public Python API: names, parameters and defaults."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from golden import check_golden

import wegeft_cli


def describe_default(value: Any) -> Any:
    if value is inspect.Parameter.empty or value is dataclasses.MISSING:
        return "required"
    if value is None or isinstance(value, bool | int | float | str | tuple):
        return {"default": value}
    return {"default": "a function" if callable(value) else "an object"}


def describe_signature(function: Any) -> dict[str, Any]:
    """Describe what callers rely on: names, order, kinds and defaults, not the annotations."""
    parameters = inspect.signature(function).parameters.values()
    return {
        "order": [each.name for each in parameters if each.kind != each.KEYWORD_ONLY],
        "parameters": {
            each.name: {"kind": each.kind.description, "value": describe_default(each.default)}
            for each in parameters
        },
    }


def describe_name(value: Any) -> Any:
    if isinstance(value, type):
        return {
            "class of": [base.__name__ for base in value.__mro__ if base.__module__ == "builtins"],
            **describe_signature(value),
        }
    return describe_signature(value) if callable(value) else type(value).__name__


def test_names_and_signatures():
    names = {name: describe_name(getattr(wegeft_cli, name)) for name in wegeft_cli.__all__}
    assert len(names) >= 24
    check_golden("python_api", names)


def test_errors():
    error = wegeft_cli.UserError("wrong", file="a.yaml:1:2", key="seed", hint="write a number")
    machine = wegeft_cli.MachineError("no memory")
    check_golden(
        "errors",
        {
            "text": str(error),
            "text of a MachineError": str(machine),
            "attributes": {**vars(error)},
            "exit codes": [error.exit_code, machine.exit_code],
            "is a UserError": isinstance(machine, wegeft_cli.UserError),
        },
    )


def test_peft_classes():
    peft = pytest.importorskip("peft")
    from wegeft_cli.interop import peft as interop

    config = interop.WegeftConfig
    inherited = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    # The version is the package's own and changes with every release.
    inherited.add("wegeft_version")
    own = [field for field in dataclasses.fields(config) if field.name not in inherited]
    defaults = config()
    check_golden(
        "peft_classes",
        {
            "names": sorted(interop.__all__),
            "WegeftConfig": {
                "peft_type": str(getattr(defaults.peft_type, "value", defaults.peft_type)),
                "is a PeftConfig": issubclass(config, peft.PeftConfig),
                "fields": {field.name: repr(getattr(defaults, field.name)) for field in own},
            },
            "WegeftModel": {
                "prefix": interop.WegeftModel.prefix,
                # Of PEFT's own methods, those that WEGEFT answers in its own way.
                "methods": sorted(
                    name
                    for name in vars(interop.WegeftModel)
                    if hasattr(peft.LoraModel, name) and not name.startswith("_")
                ),
            },
        },
    )
