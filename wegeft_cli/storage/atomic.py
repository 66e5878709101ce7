"""Atomic files and folders, folder locks, hashes and free space."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from wegeft_cli.errors import MachineError, UserError, disk_errors
from wegeft_cli.storage.sizes import format_size

if TYPE_CHECKING:
    from torch import Tensor


HASH_CHUNK_BYTES = 4 * 2**20
_LEFTOVER_SECONDS = 60


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` and rename it to `path` after the body.

    A link at `path` is replaced, not followed. After an error the old file is unchanged. Temporary
    files that killed processes left for this path are removed.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unheld_files(path)
        temp = path.parent / f".tmp-{secrets.token_hex(4)}-{path.name}"
        try:
            with temp.open("xb") as file:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mode = os.fstat(file.fileno()).st_mode & 0o777
                yield temp
                _settle(temp, mode)
                temp.rename(path)
            sync_path(path.parent)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise


def _remove_unheld_files(path: Path) -> None:
    """Remove the temporary files for a path that no process holds, except very new ones.

    A process locks its file just after it has created it.
    """
    newest = time.time() - _LEFTOVER_SECONDS
    for temp in path.parent.glob(f".tmp-{'[0-9a-f]' * 8}-{glob.escape(path.name)}"):
        with suppress(OSError), temp.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_mtime < newest:
                temp.unlink()


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
    """Write a safetensors file whole or not at all; tensors that share memory are copied."""
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
    """Yield a temporary folder beside `path` and rename it to `path` after the body.

    `path` may exist if it is empty, or if `replace` is set. All files get the usual mode and are
    synced before the folder gets its name. After an error the old folder is unchanged.
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
                sync_path(path.parent)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        remove_leftovers(path.parent, f".trash-{path.name}-")


def check_unused_folder(path: Path) -> None:
    """Raise UserError if a destination holds files."""
    with disk_errors(path, "read"):
        if path.is_dir() and any(path.iterdir()):
            raise UserError(
                "this folder is not empty",
                file=str(path),
                hint="choose another output folder, or remove this one",
            )


def check_output_file(output: Path, start: str, what: str, example: str) -> None:
    """Raise UserError if `--output` cannot be written, or would replace a file of another kind.

    A file is replaced only if it is empty or begins with `start`; `what` names this kind of file
    in the message, and `example` is a valid name.
    """
    place = output.parent
    while not place.exists():
        place = place.parent
    if output.is_dir() or not place.is_dir():
        problem = "this is a folder" if output.is_dir() else f"{str(place)!r} is not a folder"
        hint = f"name a file such as {example}"
        raise UserError(problem, file=str(output), key="--output", hint=hint)
    if not output.exists():
        return
    with disk_errors(output, "read"):
        text = output.read_text(encoding="utf-8", errors="replace")
    if text and not text.startswith(start):
        raise UserError(
            f"this file is no {what}, and nothing else is overwritten",
            file=str(output),
            key="--output",
            hint=f"choose another name, such as {example}",
        )


def remove_folder(path: Path) -> None:
    """Rename a folder, then delete it, so that no process sees it half removed."""
    trash = path.parent / f".trash-{path.name}-{secrets.token_hex(4)}"
    with disk_errors(path):
        path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the temporary folders of killed processes; folders in use are kept.

    `prefix` is the start of their names, `.tmp-...` or `.trash-...`.
    """
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix) or folder.is_symlink() or not folder.is_dir():
            continue
        with suppress(OSError), hold_folder(folder) as is_held:
            if is_held:
                shutil.rmtree(folder, ignore_errors=True)


def remove_leftover_files(parent: Path, names: Iterable[str]) -> None:
    """Remove the temporary files of killed processes; no process may be writing them."""
    for name in names:
        for path in parent.glob(f".tmp-{'[0-9a-f]' * 8}-{name}"):
            path.unlink(missing_ok=True)


def check_free_space(path: Path, num_bytes: int, what: str) -> None:
    """Raise MachineError if fewer than `num_bytes` are free at a path, which need not exist.

    `what` names the purpose in the message, such as "the merged model".
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
            f"{format_size(num_bytes)} are needed for {what}, and "
            f"{format_size(disk.free)} are free",
            file=str(path),
            hint="free some space or choose another folder",
        )


def hash_bytes(path: Path, start: int = 0, num_bytes: int | None = None) -> str:
    """Return the SHA-256 (hex) of `num_bytes` of a file from `start`, or of the rest of it."""
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
    """Set a file's mode (safetensors ignores the umask and writes 0600) and sync it to disk."""
    path.chmod(mode)
    sync_path(path)


def _settle_folder(folder: Path) -> None:
    # The folder was created under the same umask, so its mode gives the mode of a file.
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder):
        for name in names:
            _settle(Path(root, name), mode)
        sync_path(Path(root))


def sync_path(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h


def exchange_folders(temp: Path, path: Path) -> None:
    """Move a finished folder to a path, and the old folder there to `.trash-<name>-...`.

    On Linux both names are swapped in one step. Elsewhere, a process killed between two renames
    leaves the old folder as trash, which `heal_folder` restores.
    """
    trash = path.parent / f".trash-{path.name}-{secrets.token_hex(4)}"
    if not (path.is_dir() and any(path.iterdir())):
        temp.rename(path)
    elif _swap(temp, path):
        with suppress(OSError):  # the exchange is done, so an error here must not undo it
            temp.rename(trash)
    else:
        path.rename(trash)
        try:
            temp.rename(path)
        except BaseException:
            trash.rename(path)
            raise


def heal_folder(path: Path, needed: Collection[str]) -> bool:
    """Restore a folder whose replacement was interrupted, and return whether it was needed.

    A trash folder is restored only if it holds all `needed` files. No other process may write the
    folder.
    """
    if path.exists() or not path.parent.is_dir():
        return False
    for trash in path.parent.glob(f".trash-{path.name}-*"):
        if all((trash / name).is_file() for name in needed):
            trash.rename(path)
            return True
    return False


def _swap(one: Path, two: Path) -> bool:
    """Swap two names in one step; return False if the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    result: int = renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE
    )
    return result == 0
