"""Python processes that are forked from one that has loaded torch and transformers.

Loading takes seconds, more than what most processes of these tests do. The forks do not wait for
the disk, and have the passes without values of `planned`. `Popen` and `run` are those
of `subprocess` for a command that begins with `sys.executable`; `run_group` starts several
processes as `torchrun` does. A test of the start itself (imports, signals during imports, files
in the working folder that shadow modules) uses `subprocess`.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

START_PROCESS = subprocess.Popen  # also where a test has replaced it
SERVER = Path(__file__).with_name("preloaded_server.py")
# torchao loads libraries for GPUs otherwise, and tokenizers starts threads, which no fork has.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LARGEST_ANSWER = 1 << 10
POLL_SECONDS = 0.005
GRACE_SECONDS = 30
planned: Path | None = None
"""A recipe that is planned once, before any fork: its passes without values are kept."""


class Server:
    """The process that has loaded everything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Read once, when datasets is imported: no process fills the user's own.
        self._cache = TemporaryDirectory()
        with theirs:
            self._process = START_PROCESS(
                [sys.executable, str(SERVER), str(theirs.fileno()), str(planned or "")],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **SETTINGS, "HF_DATASETS_CACHE": self._cache.name},
            )
        atexit.register(self.close)

    def ask(self, asked: dict[str, Any], streams: Sequence[int] = ()) -> int | None:
        """Return the server's answer to a request."""
        with self._lock:
            socket.send_fds(self._channel, [json.dumps(asked).encode()], streams)
            answer = self._channel.recv(LARGEST_ANSWER)
        assert answer, "the server of processes has ended"
        found: int | None = json.loads(answer)
        return found

    def close(self) -> None:
        """End the server, and what it has started."""
        self._channel.close()
        self._process.wait()
        self._cache.cleanup()


@cache
def get_server() -> Server:
    """Return this process's server, started at the first call."""
    return Server()


class Popen(subprocess.Popen[Any]):
    """A forked process with the interface of `subprocess.Popen`; other programs start as ever."""

    _is_forked = False

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
        creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
        restore_signals, gid, gids, uid, umask, start_new_session, process_group,
    ):  # fmt: skip
        if isinstance(args, str) or args[0] != sys.executable:
            super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
                restore_signals, gid, gids, uid, umask, start_new_session, process_group,
            )  # fmt: skip
            return
        words = [os.fspath(word) for word in args]
        asked = {
            "words": words[1:],
            "cwd": os.fspath(Path.cwd() if cwd is None else cwd),
            "env": dict(os.environ if env is None else env),
            "process_group": None if process_group == -1 else process_group,
            "session": start_new_session,
        }
        ends = (p2cread, c2pwrite, errwrite)
        try:
            pid = get_server().ask(asked, [n if e == -1 else e for n, e in enumerate(ends)])
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self.pid = pid
        self._is_forked = True
        self._child_created = True

    def _try_wait(self, wait_flags):
        if not self._is_forked:
            return super()._try_wait(wait_flags)
        while True:
            status = get_server().ask({"poll": self.pid})
            if status is not None:
                return self.pid, status
            if wait_flags & os.WNOHANG:
                return 0, 0
            time.sleep(POLL_SECONDS)

    def _internal_poll(self, _deadstate=None, **_):
        if not self._is_forked:
            return super()._internal_poll(_deadstate)
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid == self.pid:
                self._handle_exitstatus(status)
        return self.returncode


def run(
    command: Sequence[str | Path],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def run_group(
    num_processes: int, *words: str | Path, timeout: float, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` in several processes of one group; where one fails, end the others.

    What all print comes back together, with the exit code of the first one that failed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    command = [sys.executable, *words]
    end = time.monotonic() + timeout
    with TemporaryFile("w+") as stdout, TemporaryFile("w+") as stderr:
        processes = [
            Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **group, "RANK": str(n), "LOCAL_RANK": str(n), **variables},
            )
            for n in range(num_processes)
        ]
        first, limit, is_running = 0, end, True
        try:
            while is_running and time.monotonic() < limit:
                codes = [process.poll() for process in processes]
                is_running, failed = None in codes, [code for code in codes if code]
                if failed and not first:
                    first, limit = failed[0], min(end, time.monotonic() + GRACE_SECONDS)
                time.sleep(POLL_SECONDS)
            if is_running and not first:
                raise subprocess.TimeoutExpired(command, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        told = []
        for file in (stdout, stderr):
            file.seek(0)
            told.append(file.read())
    return subprocess.CompletedProcess(command, first, *told)
