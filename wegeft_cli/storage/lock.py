"""Lock of a folder, so that one process at a time works in it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError, disk_errors
from wegeft_cli.storage.json_files import parse_object

LOCK_NAME = ".wegeft.lock"


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Hold a folder, made if missing, while the body runs; raise UserError if it is in use.

    The lock is a file in the folder that names its holder.
    """
    lock_path = path / LOCK_NAME
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError("is not a regular file", file=str(lock_path), hint="remove it")
        _take_lock(descriptor, lock_path)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take_lock(descriptor: int, lock_path: Path) -> None:
    """Lock by flock, and by the recorded holder on file systems without a working flock."""
    holder = _read_holder(descriptor)
    is_here = holder.get("host") == socket.gethostname()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        taken = True
    except OSError:
        # Without flock, a holder on another machine counts as alive: it cannot be checked.
        taken = bool(holder) and (not is_here or _is_alive(holder))
    else:
        # Some network file systems grant every flock, so a live holder on this machine decides.
        taken = is_here and _is_alive(holder)
    if taken:
        who = (
            f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('started')}"
            if holder
            else "another process"
        )
        raise UserError(
            f"this folder is in use by {who}",
            file=str(lock_path.parent),
            hint=f"wait for it, choose another folder, or remove {LOCK_NAME} if it has ended",
        )
    mine = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ticks": _start_ticks(os.getpid()),
    }
    with disk_errors(lock_path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)


def _read_holder(descriptor: int) -> dict[str, Any]:
    return parse_object(os.pread(descriptor, 4096, 0))


def _is_alive(holder: Mapping[str, Any]) -> bool:
    """Return whether the holder, another process on this machine, still runs."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    # The process id may have been reused since.
    return holder.get("ticks") == _start_ticks(pid)


def _start_ticks(pid: int) -> str:
    """Return when a process started, in clock ticks since boot; empty without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
