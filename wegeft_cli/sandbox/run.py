"""Run a program against its tests in two sandboxes, and report the outcome."""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from wegeft_cli.errors import UserError
from wegeft_cli.sandbox.escape_tests import escape_program
from wegeft_cli.sandbox.isolation import Limits

OutcomeKind = Literal["passed", "failed", "timeout", "memory", "sandbox_error"]
"""`sandbox_error`: the machine kept the program from running. A program cannot cause it: once both
sandboxes are ready, every outcome is the program's own."""

_SETUP_SECONDS = 60.0
_EXIT_SECONDS = 5.0
_WALL_PER_CPU = 3.0
_MAX_STATUS_BYTES = 1 << 16
_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
_START = (
    "import sys; sys.path.append(sys.argv[2]); from wegeft_cli.sandbox.worker import main; main()"
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program."""

    kind: OutcomeKind
    detail: str = ""
    """The exception with its message, the signal, or the isolation layer that failed."""


@dataclass(frozen=True)
class Program:
    """Code and the tests that it must pass."""

    source: str
    """The code under test."""
    definitions: str
    """Code that defines further names for the tests; only the tester runs it."""
    tests: str
    """Python that defines `check(candidate)`, which raises if the candidate is wrong."""
    entry_point: str
    """The function in `source` that is passed to `check`."""


class Sandbox:
    """A mount point and limits; several programs may run in it at a time."""

    def __init__(self, mount_point: Path, *, timeout: float, limits: Limits | None) -> None:
        self._wall_seconds = _WALL_PER_CPU * timeout
        self.mount_point = mount_point
        self._limits = replace(limits or Limits(), cpu_seconds=math.ceil(timeout))

    def run(self, program: Program) -> Outcome:
        """Run a program against its tests; every process that it started has then ended."""
        ours, theirs = socket.socketpair()
        processes: list[_Fresh] = []
        try:
            for role, link in (("candidate", theirs), ("tester", ours)):
                is_tester = role == "tester"
                job = {
                    "role": role,
                    "source": program.definitions if is_tester else program.source,
                    "tests": program.tests if is_tester else "",
                    "entry_point": program.entry_point,
                    "link": link.fileno(),
                    "mount_point": str(self.mount_point),
                    "limits": asdict(self._limits),
                }
                processes.append(_Fresh(job, link))
            ours.close()
            theirs.close()
            return self._follow(*processes)
        except OSError as error:
            return Outcome("sandbox_error", f"a process could not be started: {error}")
        finally:
            ours.close()
            theirs.close()
            for process in processes:
                process.kill()

    def check(self) -> None:
        """Run the escape tests; raise UserError with the name of an isolation layer that fails."""
        if sys.platform != "linux":
            raise _refusal("namespaces", f"this is {sys.platform}, and only Linux has them")
        roomy = Sandbox(self.mount_point, timeout=_SETUP_SECONDS, limits=self._limits)
        outcome = roomy.run(Program(**escape_program(self._limits)))
        if outcome.kind == "passed":
            return
        layer, _, reason = outcome.detail.removeprefix("AssertionError: ").partition(": ")
        raise _refusal(layer, reason or outcome.kind)

    def _follow(self, candidate: _Fresh, tester: _Fresh) -> Outcome:
        """Wait for the verdict; the timeout starts when both processes are ready."""
        setup_end = time.monotonic() + _SETUP_SECONDS
        for process in (candidate, tester):
            event = process.next_event(setup_end)
            if event is None or "ready" not in event:
                event = event or {"layer": "process", "reason": process.startup_error()}
                return Outcome("sandbox_error", f"{event['layer']}: {event['reason']}")
        end = time.monotonic() + self._wall_seconds
        verdict = tester.next_event(end) or {}
        kind = verdict.get("verdict")
        if kind == "passed":
            return Outcome("passed")
        if kind in ("raised", "failed"):
            detail = f"{verdict['type']}: {verdict['message']}".removesuffix(": ")
            return Outcome("memory" if verdict["type"] == "MemoryError" else "failed", detail)
        if kind is None and time.monotonic() >= end:
            return Outcome("timeout", f"not done after {self._wall_seconds:g} s")
        return self._explain_loss(candidate.next_event(time.monotonic() + _EXIT_SECONDS))

    def _explain_loss(self, event: dict[str, Any] | None) -> Outcome:
        """Return the outcome if the candidate's process ended, or closed its link, too early."""
        if event is None or "exit" not in event:
            return Outcome("failed", "the program hung up before its tests had ended")
        if not os.WIFSIGNALED(event["exit"]):
            code = os.WEXITSTATUS(event["exit"])
            return Outcome("failed", f"the program ended with exit code {code} before its tests")
        number = os.WTERMSIG(event["exit"])
        # No process inside can send SIGKILL to the first process: it came from the kernel.
        if number == signal.SIGKILL:
            # The kernel counts in ticks: CPU time at the limit may be reported as a little less.
            if event["cpu_seconds"] >= 0.9 * self._limits.cpu_seconds:
                return Outcome("timeout", f"more than {self._limits.cpu_seconds} s of CPU time")
            return Outcome("memory", "the kernel ended the program")
        return Outcome("failed", f"the program ended by signal {number}")


@contextmanager
def open_sandbox(*, timeout: float, limits: Limits | None = None) -> Iterator[Sandbox]:
    """Open a sandbox that has passed the escape tests.

    Args:
        timeout: CPU seconds of a program, rounded up to whole seconds. A program also ends after
            three times as many seconds of wall-clock time, which stops one that sleeps but spares
            one on a busy machine.
        limits: Resource limits; the timeout replaces `cpu_seconds`.

    Raises:
        UserError: If an isolation layer is not available or does not hold.
    """
    with tempfile.TemporaryDirectory(prefix="wegeft-sandbox-") as folder:
        sandbox = Sandbox(Path(folder), timeout=timeout, limits=limits)
        sandbox.check()
        yield sandbox


def _refusal(layer: str, reason: str) -> UserError:
    return UserError(
        f"no generated code is run: the isolation layer `{layer}` of the sandbox is not available "
        f"({reason})",
        key="--allow-code-execution",
        hint="allow user namespaces (in a container: a seccomp and AppArmor profile that permits "
        "unshare and mount), or run the evaluation on a Linux machine that does",
    )


class _Fresh:
    """A fresh process in a new session, and the events that it reports."""

    def __init__(self, job: dict[str, Any], link: socket.socket) -> None:
        self._pending = b""
        self._process = subprocess.Popen(
            # No site packages, script folder or environment; a fixed hash seed, so that sets
            # iterate in the same order every time. The last argument is for process listings.
            [
                *(sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", _START),
                *(str(os.getpid()), _PACKAGE_FOLDER, job["mount_point"]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(link.fileno(),),
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode("ascii"))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it ended at once, and reports no event

    def next_event(self, end: float) -> dict[str, Any] | None:
        """Return the next event of the process, None if there is none before `end`."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                part = os.read(self._process.stdout.fileno(), 4096)
                if not part or len(self._pending) > _MAX_STATUS_BYTES:
                    return None
                self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def startup_error(self) -> str:
        """Return why the process reported nothing before it was ready."""
        if self._process.poll() is None:
            return f"not ready after {_SETUP_SECONDS:g} s"
        assert self._process.stderr is not None
        lines = self._process.stderr.read(4096).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with code {self._process.returncode}"

    def kill(self) -> None:
        """End the sandbox and wait for the last of its processes."""
        if self._process.poll() is None:
            self._process.terminate()  # ends the sandbox and waits for it, see worker.py
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # the kernel then ends the sandbox
            self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
