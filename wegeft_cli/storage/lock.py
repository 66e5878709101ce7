"""A folder's lock: one process at a time works in it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.storage.atomic import disk_errors

LOCK_NAME = ".wegeft.lock"


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Keep a second process out of a folder for as long as the body runs.

    Args:
        path: The folder; it is made if missing. The lock is a file in it that names its holder.

    Yields:
        Nothing.

    Raises:
        UserError: If another process holds the folder; the message names it.
    """
    lock_path = path / LOCK_NAME
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take_lock(descriptor, lock_path)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take_lock(descriptor: int, lock_path: Path) -> None:
    """Lock by flock where the file system has it, else by what the file says."""
    holder = _read_holder(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        taken = True
    except OSError:
        # Without flock a holder on another machine cannot be asked whether it still lives.
        taken = bool(holder) and (holder.get("host") != socket.gethostname() or _lives(holder))
    else:
        # Some network file systems grant every flock: believe a living neighbour instead.
        taken = holder.get("host") == socket.gethostname() and _lives(holder)
    if taken:
        who = (
            f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('started')}"
            if holder
            else "another process"
        )
        raise UserError(
            f"this folder is in use by {who}",
            file=str(lock_path.parent),
            hint=f"wait for it, choose another folder, or remove {LOCK_NAME} if it is long dead",
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
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _lives(holder: Mapping[str, Any]) -> bool:
    """Tell whether the holder, a process of this machine other than this one, still runs."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    # The number may have gone to a new process since.
    return holder.get("ticks") == _start_ticks(pid)


def _start_ticks(pid: int) -> str:
    """When a process started, in ticks since boot; empty where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
