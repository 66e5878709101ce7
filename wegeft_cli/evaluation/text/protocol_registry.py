"""Text protocols by name; the modules of `evaluation/text/protocols/` define them."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text import protocols as package
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Prediction, Rule
from wegeft_cli.evaluation.text.test_sets import TestSet

__all__ = ["PROTOCOLS", "EvalProtocol", "Prediction", "Rule", "find_protocol", "load_protocols"]

_ORDER = ("wegeft", "gift", "llm_adapters", "lora_ga", "metamath", "tuning", "chat", "quickstart")
"""Order of the modules in lists; other modules follow by name."""


def load_protocols() -> dict[str, EvalProtocol]:
    """Return the protocols of all modules of the folder, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    names.sort(key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    found: dict[str, EvalProtocol] = {}
    for protocol in (each for module in modules for each in module.PROTOCOLS):
        if protocol.name in found:
            raise ValueError(f"two modules define the protocol {protocol.name!r}")
        found[protocol.name] = protocol
    return found


PROTOCOLS: Mapping[str, EvalProtocol] = load_protocols()


def find_protocol(name: str | None, test_set: TestSet) -> EvalProtocol:
    """Return a protocol that scores a test set.

    Args:
        name: The protocol's name. Default: the test set's own protocol.

    Raises:
        UserError: If there is no such protocol, or it does not score the test set.
    """
    name = name or test_set.own_protocol or test_set.default_protocol
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(PROTOCOLS)}"
        raise UserError(f"no protocol is called `{name}`", key="protocol", hint=hint)
    if not PROTOCOLS[name].scores(test_set):
        fitting = [
            f"`{known}`" for known, protocol in PROTOCOLS.items() if protocol.scores(test_set)
        ]
        raise UserError(
            f"`{name}` does not score the task `{test_set.name}`",
            key="protocol",
            hint=f"use {' or '.join(fitting[:2])}"
            + (f" (or {', '.join(fitting[2:])})" if fitting[2:] else ""),
        )
    return PROTOCOLS[name]
