"""The published ways to ask and to score, by name; their numbers never share a column."""

from __future__ import annotations

import difflib

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text.loading import Task
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Prediction, Rule
from wegeft_cli.evaluation.text.published import PROTOCOLS

__all__ = ["PROTOCOLS", "EvalProtocol", "Prediction", "Rule", "find_protocol"]


def find_protocol(name: str | None, task: Task) -> EvalProtocol:
    """The protocol of that name, if it scores the task.

    Args:
        name: Such as `gift`; None takes the task's own.
        task: The set that is to be scored.

    Returns:
        The protocol.

    Raises:
        UserError: If there is no such protocol, or the two do not belong together.
    """
    name = name or task.own_protocol or task.default_protocol
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(PROTOCOLS)}"
        raise UserError(f"no protocol is called `{name}`", key="protocol", hint=hint)
    if not PROTOCOLS[name].scores(task):
        fitting = [f"`{known}`" for known, protocol in PROTOCOLS.items() if protocol.scores(task)]
        raise UserError(
            f"`{name}` does not score the task `{task.name}`",
            key="protocol",
            hint=f"use {' or '.join(fitting[:2])}"
            + (f" (or {', '.join(fitting[2:])})" if fitting[2:] else ""),
        )
    return PROTOCOLS[name]
