"""The main program of a fresh process: isolate it, then play one of two roles.

The candidate runs the code that a model wrote and answers calls. The tester runs the tests, makes
the calls and reports the verdict. They are two processes in two sandboxes, connected by one socket
that transfers plain values. The code never shares a process with its tests: it cannot change the
verdict, rewrite a test or read an expected value.

    stdin   the job, one JSON object
    stdout  events, one JSON object per line: {"layer", "reason"} or {"ready": true}, then the
            tester's {"verdict", ...}, then {"exit": status, "cpu_seconds": ...}
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict

from wegeft_cli.sandbox import channel, isolation

_MAX_MESSAGE_CHARS = 300
_STATUS = 1


class Job(TypedDict):
    """The parent's job for a fresh process."""

    role: Literal["candidate", "tester"]
    source: str
    """The candidate's program, or the definitions that the tests may use."""
    tests: str
    """Defines `check(candidate)`; empty for the candidate."""
    entry_point: str
    """The function under test."""
    link: int
    """File descriptor of the socket to the other process."""
    mount_point: str
    limits: dict[str, int]


class _CandidateError(Exception):
    """The candidate raised, or its answer could not be transferred."""

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(message)
        self.type_name = type_name


def main() -> NoReturn:
    """Read the job, isolate the process and run; never return."""
    job: Job = json.loads(sys.stdin.buffer.read())
    sys.path.pop()  # the folder of this package, see run.py: only the standard library remains
    os.environ.clear()
    limits = isolation.Limits(**job["limits"])
    try:
        nowhere = os.open("/dev/null", os.O_RDWR)
        isolation.die_with_parent(int(sys.argv[1]))
        becomes_nobody = isolation.enter_namespaces(Path(job["mount_point"]), limits)
        child = os.fork()
    except isolation.IsolationError as error:
        _report({"layer": error.layer, "reason": error.reason})
        os._exit(1)
    except OSError as error:
        _report({"layer": "process", "reason": str(error)})
        os._exit(1)
    if child == 0:
        _run_first_process(job, limits, nowhere, becomes_nobody=becomes_nobody)
    os.close(job["link"])
    # Waiting for a namespace's first process waits for all of its processes.
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, signal.SIGKILL))
    _, status, used = os.wait4(child, 0)
    _report({"exit": status, "cpu_seconds": used.ru_utime + used.ru_stime})
    os._exit(0)


def _report(event: dict[str, Any]) -> None:
    os.write(_STATUS, json.dumps(event).encode("ascii") + b"\n")


def _run_first_process(
    job: Job, limits: isolation.Limits, nowhere: int, *, becomes_nobody: bool
) -> NoReturn:
    """Apply the last isolation layers in the sandbox's first process, then play the role."""
    try:
        os.setsid()  # a signal to its own group must not reach the process outside
        isolation.drop_rights(limits, becomes_nobody=becomes_nobody)
        isolation.die_with_parent(0)
    except isolation.IsolationError as error:
        _report({"layer": error.layer, "reason": error.reason})
        os._exit(1)
    except OSError as error:
        _report({"layer": "process", "reason": str(error)})
        os._exit(1)
    _report({"ready": True})
    if job["role"] == "tester":
        _report(_test(job, socket.socket(fileno=job["link"])))
        os._exit(0)
    isolation.close_files_but(job["link"], nowhere)
    _answer_calls(job, socket.socket(fileno=job["link"]))
    os._exit(0)


def _answer_calls(job: Job, link: socket.socket) -> None:
    """Define the candidate's functions and answer calls until the tester closes the link."""
    function: Callable[..., Any] | None = None
    fault: dict[str, Any] | None = None
    try:
        names: dict[str, Any] = {"__name__": "__candidate__"}
        exec(compile(job["source"], "<sample>", "exec"), names)
        function = names[job["entry_point"]]
    except BaseException as error:
        fault = _describe(error)
    while True:
        try:
            call = channel.receive_frame(link)
            if fault is not None or function is None:
                channel.send_frame(link, {"raised": fault})
                continue
            arguments, named = channel.decode_value(call)
            channel.send_frame(
                link, {"returned": channel.encode_value(function(*arguments, **named))}
            )
        except channel.LinkClosedError:
            return
        except BaseException as error:
            channel.send_frame(link, {"raised": _describe(error)})


def _test(job: Job, link: socket.socket) -> dict[str, Any]:
    """Run the tests against the other process and return the verdict."""

    def candidate(*arguments: Any, **named: Any) -> Any:
        channel.send_frame(link, channel.encode_value((list(arguments), named))["value"])
        reply = channel.receive_frame(link)
        if not isinstance(reply, dict) or len(reply) != 1:
            raise channel.CarryError("neither an answer nor an exception")
        if "returned" in reply:
            return channel.decode_value(reply["returned"])
        raised = reply.get("raised")
        if not isinstance(raised, dict):
            raise channel.CarryError("neither an answer nor an exception")
        raise _CandidateError(
            str(raised.get("type"))[:_MAX_MESSAGE_CHARS],
            str(raised.get("message"))[:_MAX_MESSAGE_CHARS],
        )

    names: dict[str, Any] = {"__name__": "__tests__"}
    try:
        exec(compile(job["source"], "<prompt>", "exec"), names)
        names[job["entry_point"]] = candidate  # some tests call it by its name (HumanEval/33)
        exec(compile(job["tests"], "<tests>", "exec"), names)
        names["check"](candidate)
    except channel.LinkClosedError:
        return {"verdict": "lost"}
    except _CandidateError as error:
        return {"verdict": "raised", "type": error.type_name, "message": str(error)}
    except channel.CarryError as error:
        return {"verdict": "raised", "type": "CarryError", "message": str(error)}
    except BaseException as error:
        return {"verdict": "failed", **_describe(error)}
    return {"verdict": "passed"}


def _describe(error: BaseException) -> dict[str, str]:
    try:
        message = str(error)[:_MAX_MESSAGE_CHARS]
    except BaseException:
        message = ""
    return {"type": type(error).__name__, "message": message}
