"""Isolation of a process: namespaces, a new root, resource limits, and no way to regain privileges.

It cannot be undone, so it is only for a dedicated process. Python 3.11 has no `os.unshare`, hence
ctypes. A layer that is not available raises `IsolationError` with its name; none is skipped. The
layers are:

- user: a new user namespace. The program runs in it as the user `nobody`, without capabilities.
- mount: a new read-only root in memory with the standard library and the shared libraries, and no
  other file of the machine; /tmp is private, small and temporary.
- pid: a new process namespace; when its first process ends, the kernel ends all others.
- net: no network, not even the loopback. ipc: no shared memory of other processes.
- syscalls: a filter refuses the calls that bypass these (`seccomp.py`).
- limits: memory, CPU time, size of a file, open files, processes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wegeft_cli.sandbox.seccomp import refuse_system_calls

NOBODY = 65534

_CLONE = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "ipc": 0x08000000,
    "net": 0x40000000,
    "pid": 0x20000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_SYS_MOUNT_SETATTR = 442  # the same on every architecture
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CAPABILITY_VERSION_3 = 0x20080522
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/nix/store")

_libc = ctypes.CDLL(None, use_errno=True)


class IsolationError(Exception):
    """An isolation layer that is not available."""

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"{layer}: {reason}")
        self.layer = layer
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """Resource limits; all but `processes` are per process."""

    memory_bytes: int = 512 << 20
    """Address space, without the private /tmp."""
    cpu_seconds: int = 4
    file_bytes: int = 1 << 20
    open_files: int = 32
    processes: int = 4
    """Processes and threads, including the first."""
    scratch_bytes: int = 16 << 20
    """Size of /tmp, which is in memory."""


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def enter_namespaces(mount_point: Path, limits: Limits) -> bool:
    """Isolate the calling process; its next child is the first process of the sandbox.

    Args:
        mount_point: An empty folder, over which a root in memory is mounted in this process's
            namespace; nothing is written into the folder.

    Returns:
        Whether the child must call `drop_rights` to become the user `nobody`, as only root can.
    """
    becomes_nobody = _enter_user_namespace()
    for layer in ("mount", "ipc", "net", "pid"):
        with _building(layer):
            _check(_libc.unshare(_CLONE[layer]))
    with _building("mount"):
        _build_root(mount_point, limits)
    return becomes_nobody


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent, given by its process id, ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)


def drop_rights(limits: Limits, *, becomes_nobody: bool) -> None:
    """Set the limits and drop all privileges of the sandbox's first process.

    `becomes_nobody` is the result of `enter_namespaces`.
    """
    with _building("limits"):
        for kind, value in (
            (resource.RLIMIT_AS, limits.memory_bytes),
            (resource.RLIMIT_CPU, limits.cpu_seconds),
            (resource.RLIMIT_FSIZE, limits.file_bytes),
            (resource.RLIMIT_NOFILE, limits.open_files),
            (resource.RLIMIT_NPROC, limits.processes),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            hard = resource.getrlimit(kind)[1]
            limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (limit, limit))
    with _building("user"):
        if becomes_nobody:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        _check(_libc.capset(header, (ctypes.c_uint32 * 6)()))
        _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    with _building("syscalls"):
        refuse_system_calls()


@contextmanager
def _building(layer: str) -> Iterator[None]:
    """Name the layer in an error."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise IsolationError(layer, str(error)) from error


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _enter_user_namespace() -> bool:
    """Enter a new user namespace, and return whether it also maps the user `nobody`.

    The kernel does not count the processes of the machine's root, so root must change to another
    user later. Only a process outside can map a second user: a helper that is forked before.
    """
    user, group = os.geteuid(), os.getegid()
    if user != 0:
        with _building("user"):
            _check(_libc.unshare(_CLONE["user"]))
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        return False
    go_read, go_write = os.pipe()
    done_read, done_write = os.pipe()
    entered = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(go_write)
        message = b""
        if os.read(go_read, 1):
            message = _map_root_and_nobody(entered)
        os.write(done_write, message)
        os._exit(0)
    with _building("user"):
        try:
            _check(_libc.unshare(_CLONE["user"]))
            os.write(go_write, b"g")
        finally:
            os.close(go_write)
            os.close(done_write)
            message = os.read(done_read, 4096)
            os.waitpid(helper, 0)
            os.close(go_read)
            os.close(done_read)
        if message != b"mapped":
            raise OSError(message.decode(errors="replace") or "the helper that maps users ended")
    return True


def _map_root_and_nobody(process: int) -> bytes:
    """Map both users into the namespace of a process; return `mapped` or the error."""
    try:
        for name in ("uid_map", "gid_map"):
            # One write: the kernel takes a map once.
            Path(f"/proc/{process}/{name}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
    except OSError as error:
        return f"the users root and 65534 cannot be mapped: {error}".encode()
    return b"mapped"


def _build_root(mount_point: Path, limits: Limits) -> None:
    """Replace the root by one in memory that contains only Python's library."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    # Opened first: the mount may hide what is below the mount point.
    sources = [(path, os.open(path, os.O_PATH)) for path in _needed_paths()]
    _mount("tmpfs", mount_point, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    jail = mount_point / "jail"
    for path, source in sources:
        place = jail / path.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            place.touch()
        _mount(f"/proc/self/fd/{source}", place, None, _MS_BIND | _MS_REC)
        os.close(source)
    for name, meant in _system_links():
        link = jail / name.relative_to("/")
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(meant)
    scratch = jail / "tmp"
    scratch.mkdir(exist_ok=True)
    _make_read_only(mount_point)
    options = f"size={limits.scratch_bytes},nr_inodes=1024,mode=1777"
    _mount("tmpfs", scratch, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    os.chdir(mount_point)
    _check(_libc.pivot_root(b".", b"."))
    _check(_libc.umount2(b".", _MNT_DETACH))
    # Not the root itself but a folder of it: a process in a changed root cannot create a user
    # namespace, in which it would have new capabilities and mounts.
    os.chroot("/jail")
    os.chdir("/tmp")


def _needed_paths() -> list[Path]:
    """Return the paths that Python needs after its start, without those inside another one."""
    library = Path(sys.base_prefix) / sys.platlibdir
    wanted: list[str | Path] = [
        *_SYSTEM_LIBRARIES,
        *sys.path,
        Path(sys.base_prefix) / "lib",
        library,
    ]
    found = {Path(path).resolve() for path in wanted if path and Path(path).exists()}
    return sorted(path for path in found if not any(parent in found for parent in path.parents))


def _system_links() -> list[tuple[Path, Path]]:
    """Return the links among the library folders, such as /lib -> usr/lib."""
    links = [Path(name) for name in _SYSTEM_LIBRARIES]
    return [(link, link.resolve()) for link in links if link.is_symlink() and link.exists()]


def _make_read_only(folder: Path) -> None:
    attributes = _MountAttributes(attr_set=_MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    opened = os.open(folder, os.O_PATH)
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(opened),
        ctypes.c_char_p(b""),
        ctypes.c_uint(_AT_EMPTY_PATH | _AT_RECURSIVE),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    try:
        _check(result)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise OSError("read-only mounts need Linux 5.12 or newer") from error
        raise
    finally:
        os.close(opened)


def _mount(
    source: str | None,
    target: str | Path,
    kind: str | None,
    flags: int,
    options: str | None = None,
) -> None:
    def encoded(text: str | Path | None) -> bytes | None:
        return None if text is None else os.fsencode(text)

    _check(
        _libc.mount(
            encoded(source), encoded(target), encoded(kind), ctypes.c_ulong(flags), encoded(options)
        )
    )


def close_files_but(kept: int, nowhere: int) -> None:
    """Close all files but `kept`, which is at least 3; standard streams become `nowhere`."""
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    os.closerange(3, kept)
    os.closerange(kept + 1, most if most != resource.RLIM_INFINITY else 1 << 20)
