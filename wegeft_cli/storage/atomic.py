"""Writing to disk, whole or not at all: atomic files and folders, free space."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from wegeft_cli.errors import MachineError, UserError

if TYPE_CHECKING:
    from torch import Tensor


HASH_CHUNK_BYTES = 4 * 2**20
_GIB = 2**30

# What the user mends by another path or by rights; everything else is the machine's failure.
_USER_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    }
)
_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def disk_errors(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn what the disk says into UserError or MachineError, here and nowhere else.

    Args:
        path: The file or folder that the user knows about.
        doing: What was tried, for the message: write or read.

    Yields:
        Nothing.

    Raises:
        UserError: If a path or its rights are wrong.
        MachineError: If the disk is full, read-only or broken.
    """
    try:
        yield
    except OSError as error:
        raise _told(error.errno, error.strerror or str(error), path, doing) from error
    except SafetensorError as error:
        # safetensors wraps the system's error in a text: "... (os error 28)".
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        code = int(found[1])
        raise _told(code, os.strerror(code), path, doing) from error


def _told(code: int | None, reason: str, path: Path, doing: str) -> UserError:
    message = f"cannot {doing}: {reason}"
    if code in _USER_ERRNOS:
        return UserError(message, file=str(path), hint="check the path and its permissions")
    hint = "free some space or choose another folder" if code in _FULL_ERRNOS else None
    return MachineError(message, file=str(path), hint=hint)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` when the body is through.

    Args:
        path: The file to write; missing folders above it are made. A link standing there is
            replaced, not followed.

    Yields:
        The temporary file, empty, to be filled or replaced.

    Raises:
        UserError: If the path is wrong or not permitted.
        MachineError: If the disk fails. The temporary file is gone, the old one untouched.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.parent / f".tmp-{secrets.token_hex(4)}-{path.name}"
        try:
            with temp.open("xb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
            yield temp
            _settle(temp, mode)
            temp.rename(path)
            _sync(path.parent)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_file(path) as temp:
        temp.write_bytes(data)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    write_bytes_atomic(path, text.encode("utf-8"))


def save_tensors_atomic(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all.

    Args:
        path: The file.
        tensors: Name -> tensor of any device and layout; those sharing memory are written each
            on its own.
        metadata: Text for the file's header; "format: pt" when left out.
    """
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if address in seen else value
        seen.add(address)
    with atomic_file(path) as temp:
        save_file(plain, temp, metadata=dict(metadata or {"format": "pt"}))


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`; rename it to `path` when the body is through.

    Args:
        path: The folder to make. It may exist if it is empty.
        replace: Let a full folder be exchanged for the new one at the end.

    Yields:
        The temporary folder, to be filled with ordinary writes: all files get the usual mode and
        reach the disk before the folder gets its name.

    Raises:
        UserError: If there is already something else, or the path is wrong.
        MachineError: If the disk fails. The temporary folder is gone, the old one untouched.
    """
    path = path.resolve()
    with disk_errors(path):
        if path.exists() and not path.is_dir():
            raise UserError("a file exists at the path of this folder", file=str(path))
        if not replace:
            check_unused_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, f".tmp-{path.name}-")
        temp = path.parent / f".tmp-{path.name}-{secrets.token_hex(4)}"
        try:
            temp.mkdir()
            with hold_folder(temp):
                yield temp
                _settle_folder(temp)
                exchange_folders(temp, path)
                _sync(path.parent)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        remove_leftovers(path.parent, f".trash-{path.name}-")


def check_unused_folder(path: Path) -> None:
    """Refuse a destination that already holds files.

    Args:
        path: The folder that is to be written.

    Raises:
        UserError: If it holds anything.
    """
    with disk_errors(path, "read"):
        if path.is_dir() and any(path.iterdir()):
            raise UserError(
                "this folder is not empty",
                file=str(path),
                hint="choose another output folder, or remove this one",
            )


def remove_folder(path: Path) -> None:
    """Remove a folder so that nobody can meet it half removed: renamed first, then deleted."""
    trash = path.parent / f".trash-{path.name}-{secrets.token_hex(4)}"
    with disk_errors(path):
        path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the temporary folders that a killed process left; those of living ones stay.

    Args:
        parent: The folder in which to look.
        prefix: How their names begin: `.tmp-...` or `.trash-...`.
    """
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix) or folder.is_symlink() or not folder.is_dir():
            continue
        with suppress(OSError), hold_folder(folder) as is_held:
            if is_held:
                shutil.rmtree(folder, ignore_errors=True)


def remove_leftover_files(parent: Path, names: Iterable[str]) -> None:
    """Remove the temporary files that a killed process left.

    Args:
        parent: The folder; no other process may be writing these files.
        names: What the files would have been called.
    """
    for name in names:
        for path in parent.glob(f".tmp-{'[0-9a-f]' * 8}-{name}"):
            path.unlink(missing_ok=True)


def check_free_space(path: Path, num_bytes: int, what: str) -> None:
    """Find a full disk before the work begins.

    Args:
        path: Where it will be written; it need not exist yet.
        num_bytes: Bytes that will be written.
        what: What needs them, for the message: "the merged model".

    Raises:
        MachineError: If fewer bytes are free.
    """
    place = path.resolve()
    while not place.exists():
        place = place.parent
    with disk_errors(path, "read"):
        disk = shutil.disk_usage(place)
    if not disk.total:
        raise MachineError(
            f"no disk is there: the file system at {place} has no room for files",
            file=str(path),
            hint="choose another folder",
        )
    if disk.free < num_bytes:
        raise MachineError(
            f"{_show_size(num_bytes)} are needed for {what}, and {_show_size(disk.free)} are free",
            file=str(path),
            hint="free some space or choose another folder",
        )


def _show_size(num_bytes: int) -> str:
    """Give GiB, or where that would round to nothing MiB."""
    if num_bytes >= _GIB / 10:
        return f"{num_bytes / _GIB:.2f} GiB"
    return f"{num_bytes / 2**20:.2f} MiB"


def hash_bytes(path: Path, start: int = 0, num_bytes: int | None = None) -> str:
    """SHA-256 of a file or of a stretch of it, read in pieces.

    Args:
        path: The file.
        start: First byte.
        num_bytes: Length of the stretch; None goes to the end.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: If the file ends before the stretch does, or cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(HASH_CHUNK_BYTES))
    with disk_errors(path, "read"), path.open("rb", buffering=0) as file:
        file.seek(start)
        left = os.fstat(file.fileno()).st_size - start if num_bytes is None else num_bytes
        while left > 0:
            num_read = file.readinto(buffer[: min(left, len(buffer))])
            if not num_read:
                raise UserError("this file ends too early", file=str(path))
            digest.update(buffer[:num_read])
            left -= num_read
    return digest.hexdigest()


@contextmanager
def hold_folder(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a folder with flock while the body runs, and yield whether that succeeded.

    It fails if another process holds the folder (unless `wait`), and on file systems without
    flock. The kernel releases the lock of a killed process.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            is_held = False
        else:
            is_held = True
        yield is_held
    finally:
        os.close(descriptor)


def _settle(path: Path, mode: int) -> None:
    """Give a file its mode (safetensors writes 0600 whatever the umask) and sync it to disk."""
    path.chmod(mode)
    _sync(path)


def _settle_folder(folder: Path) -> None:
    # The folder was made under the same umask: it tells the mode of a file.
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder):
        for name in names:
            _settle(Path(root, name), mode)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h


def exchange_folders(temp: Path, path: Path) -> None:
    """Put a finished folder in the place of another one.

    On Linux the two names are swapped in one step. Elsewhere, and on file systems that cannot, a
    process killed between two renames leaves the old folder as trash, for `heal_folder`.

    Args:
        temp: The new folder, beside `path`.
        path: Where it goes; what stands there is left beside it as `.trash-<name>-...`, or under
            the name of `temp` where it cannot be called so.

    Raises:
        OSError: If the disk fails; the old folder is then back in its place.
    """
    trash = path.parent / f".trash-{path.name}-{secrets.token_hex(4)}"
    if not (path.is_dir() and any(path.iterdir())):
        temp.rename(path)
    elif _swap(temp, path):
        with suppress(OSError):  # the exchange is done: what fails now must not undo it
            temp.rename(trash)
    else:
        path.rename(trash)
        try:
            temp.rename(path)
        except BaseException:
            trash.rename(path)
            raise


def heal_folder(path: Path, needed: Collection[str]) -> bool:
    """Give a folder its name back that a process was killed while replacing.

    Args:
        path: The folder as it should be called; nobody else may be writing it.
        needed: Files that it holds when it is whole; trash that was half removed stays trash.

    Returns:
        Whether there was something to heal.
    """
    if path.exists() or not path.parent.is_dir():
        return False
    for trash in path.parent.glob(f".trash-{path.name}-*"):
        if all((trash / name).is_file() for name in needed):
            trash.rename(path)
            return True
    return False


def _swap(one: Path, two: Path) -> bool:
    """Exchange two names in one step; False where the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    result: int = renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE
    )
    return result == 0
