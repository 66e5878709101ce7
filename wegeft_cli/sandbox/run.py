"""One program against its tests, in two sandboxes; what became of it."""

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
from wegeft_cli.sandbox.isolation import Limits

OutcomeKind = Literal["passed", "failed", "timeout", "memory", "sandbox_error"]
"""`sandbox_error`: the program never ran, the machine is at fault. A program cannot bring it about:
from the moment that both sandboxes stand, whatever happens is the program's own doing."""

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
    """What became of a program."""

    kind: OutcomeKind
    detail: str = ""
    """The exception with its message, the signal, or the wall that could not be put up."""


@dataclass(frozen=True)
class Program:
    """Code, and the tests that it must pass."""

    source: str
    """All of the code under test."""
    definitions: str
    """Names that the tests may use besides the candidate; run on the tests' side alone."""
    tests: str
    """Python that defines `check(candidate)`, which raises where the candidate is wrong."""
    entry_point: str
    """The function in `source` that `check` gets."""


class Sandbox:
    """A folder to mount over and the limits; programs may run in it side by side."""

    def __init__(self, mount_point: Path, *, timeout: float, limits: Limits | None) -> None:
        self._wall_seconds = _WALL_PER_CPU * timeout
        self.mount_point = mount_point
        self._limits = replace(limits or Limits(), cpu_seconds=math.ceil(timeout))

    def run(self, program: Program) -> Outcome:
        """Run a program against its tests.

        Args:
            program: The code and the tests.

        Returns:
            What became of it; every process that it started has ended.
        """
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
        """Try every wall from within, by a program that runs against each of them.

        Raises:
            UserError: If a wall cannot be put up or does not hold; it names the wall.
        """
        from wegeft_cli.sandbox import escape_tests as attempts

        if sys.platform != "linux":
            raise _refusal("namespaces", f"this is {sys.platform}, and only Linux has them")
        roomy = Sandbox(self.mount_point, timeout=_SETUP_SECONDS, limits=self._limits)
        outcome = roomy.run(attempts.as_program(self._limits))
        if outcome.kind == "passed":
            return
        wall, _, reason = outcome.detail.removeprefix("AssertionError: ").partition(": ")
        raise _refusal(wall, reason or outcome.kind)

    def _follow(self, candidate: _Fresh, tester: _Fresh) -> Outcome:
        """Wait for the verdict, for so long from the moment that both stand."""
        setup_end = time.monotonic() + _SETUP_SECONDS
        for process in (candidate, tester):
            event = process.next_event(setup_end)
            if event is None or "ready" not in event:
                event = event or {"wall": "process", "reason": process.why_silent()}
                return Outcome("sandbox_error", f"{event['wall']}: {event['reason']}")
        end = time.monotonic() + self._wall_seconds
        verdict = tester.next_event(end) or {}
        kind = verdict.get("verdict")
        if kind == "passed":
            return Outcome("passed")
        if kind in ("raised", "failed"):
            told = f"{verdict['type']}: {verdict['message']}".removesuffix(": ")
            return Outcome("memory" if verdict["type"] == "MemoryError" else "failed", told)
        if kind is None and time.monotonic() >= end:
            return Outcome("timeout", f"not done after {self._wall_seconds:g} s")
        return self._explain_loss(candidate.next_event(time.monotonic() + _EXIT_SECONDS))

    def _explain_loss(self, event: dict[str, Any] | None) -> Outcome:
        """The tests ended early since the candidate's process was gone, or hung up."""
        if event is None or "exit" not in event:
            return Outcome("failed", "the program hung up before its tests had ended")
        if not os.WIFSIGNALED(event["exit"]):
            code = os.WEXITSTATUS(event["exit"])
            return Outcome("failed", f"the program ended with exit code {code} before its tests")
        number = os.WTERMSIG(event["exit"])
        # Nobody inside can send SIGKILL to the first process: it came from the kernel.
        if number == signal.SIGKILL:
            # The kernel counts in ticks: what it ends at the limit may be told as a little less.
            if event["cpu_seconds"] >= 0.9 * self._limits.cpu_seconds:
                return Outcome("timeout", f"more than {self._limits.cpu_seconds} s of CPU time")
            return Outcome("memory", "the kernel ended the program")
        return Outcome("failed", f"the program ended by signal {number}")


@contextmanager
def open_sandbox(*, timeout: float, limits: Limits | None = None) -> Iterator[Sandbox]:
    """A sandbox whose walls were tried.

    Args:
        timeout: Seconds of computing that a program may take, rounded up to whole ones. It is ended
            too when three times as much has passed on the clock, by which one that sleeps is
            caught: a machine that is busy with other things fails nobody.
        limits: What it may use up; `cpu_seconds` follows from the timeout.

    Yields:
        The sandbox.

    Raises:
        UserError: If a wall cannot be put up or does not hold; it names the wall.
    """
    with tempfile.TemporaryDirectory(prefix="wegeft-sandbox-") as folder:
        sandbox = Sandbox(Path(folder), timeout=timeout, limits=limits)
        sandbox.check()
        yield sandbox


def _refusal(wall: str, reason: str) -> UserError:
    return UserError(
        f"no generated code is run: the wall `{wall}` of the sandbox cannot be put up ({reason})",
        key="--allow-code-execution",
        hint="allow user namespaces (in a container: a seccomp and AppArmor profile that permits "
        "unshare and mount), or run the evaluation on a Linux machine that does",
    )


class _Fresh:
    """One fresh process, in a session of its own, and the events that it tells."""

    def __init__(self, job: dict[str, Any], link: socket.socket) -> None:
        self._pending = b""
        self._process = subprocess.Popen(
            # No site packages, no script folder, nothing of the environment; a fixed hash seed, so
            # that a set is walked in the same order every time. The last argument is for whoever
            # looks at the list of processes.
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
            pass  # it ended at once; the missing event tells

    def next_event(self, end: float) -> dict[str, Any] | None:
        """The next line that the process tells; None where none comes before `end`."""
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

    def why_silent(self) -> str:
        """Why nothing came before the walls stood."""
        if self._process.poll() is None:
            return f"not ready after {_SETUP_SECONDS:g} s"
        assert self._process.stderr is not None
        lines = self._process.stderr.read(4096).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with code {self._process.returncode}"

    def kill(self) -> None:
        """End the sandbox and wait until the last of its processes is gone."""
        if self._process.poll() is None:
            self._process.terminate()  # ends the sandbox and waits for it, see inside.py
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # with it the kernel ends the sandbox
            self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
