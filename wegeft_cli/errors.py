"""The errors a user sees without a traceback, and the exit codes of the command line."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A fault that the user can fix, shown as one message without a traceback.

    Args:
        message: What is wrong, with the value that was found.
        file: Where: a path, or `path:line:column`.
        key: The dotted recipe key, or the option, at fault.
        hint: What to type or do next.

    Several faults are raised together as an `ExceptionGroup` of `UserError`.
    """

    exit_code = EXIT_USER

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        key: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.key = key
        self.hint = hint

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.file, self.key) if part)
        text = f"{place}: {self.message}" if place else self.message
        return f"{text} ({self.hint})" if self.hint else text


class BaseModelError(UserError):
    """The base model cannot be loaded or used; its key is `model.name_or_path`."""

    def __init__(self, message: str, *, file: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, file=file, key="model.name_or_path", hint=hint)


class MachineError(UserError):
    """The machine failed (full disk, out of memory); nothing is lost, and the exit code is 1."""

    exit_code = EXIT_FAILED


def raise_all(faults: list[UserError]) -> None:
    """Raise one fault as itself and several as a group; return if there is none.

    Raises:
        UserError: If there is one fault.
        ExceptionGroup: If there are several.
    """
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ExceptionGroup(f"{len(faults)} faults", faults)


class Faults:
    """Collects the faults of several checks, so that the user sees all of them at once."""

    def __init__(self) -> None:
        self._found: list[UserError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the faults that the body raises instead of raising them."""
        try:
            yield
        except* UserError as group:
            self._found += [fault for fault in _leaves(group) if isinstance(fault, UserError)]

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def found(self) -> list[UserError]:
        """The faults so far."""
        return list(self._found)

    def extend(self, faults: Iterable[UserError]) -> None:
        """Keep further faults."""
        self._found.extend(faults)

    def raise_all(self) -> None:
        """Raise the faults, each once; see `raise_all`."""
        raise_all(list({str(fault): fault for fault in self._found}.values()))


def raise_by_name(found: Mapping[str, Sequence[UserError]]) -> None:
    """Raise the faults of several parts, each once; one that some parts lack names its parts.

    Args:
        found: Name of each part -> its faults; empty for a part without any.
    """
    parts: dict[str, tuple[UserError, dict[str, None]]] = {}
    for name, faults in found.items():
        for fault in faults:
            parts.setdefault(str(fault), (fault, {}))[1][name] = None
    for fault, names in parts.values():
        if len(names) < len(found):
            fault.message += f" (in {', '.join(names)})"
    raise_all([fault for fault, _ in parts.values()])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _leaves(member)
    else:
        yield error


# Errors that another path or other permissions fix; all others are failures of the machine.
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
    """Translate errors of the disk raised in the body into UserError or MachineError.

    UserError: the path or its permissions are wrong. MachineError: the disk is full, read-only or
    broken. `doing` is the verb of the message, write or read.
    """
    try:
        yield
    except OSError as error:
        raise _disk_error(error.errno, error.strerror or str(error), path, doing) from error
    except Exception as error:
        # By name: the sandbox imports this module without site packages.
        if type(error).__name__ != "SafetensorError":
            raise
        # safetensors wraps the system's error in a text: "... (os error 28)"; old versions write
        # "Os { code: 28, ...".
        found = re.search(r"(?:\(os error |Os \{ code: )(\d+)", str(error))
        if found is None:
            raise
        code = int(found[1])
        raise _disk_error(code, os.strerror(code), path, doing) from error


def _disk_error(code: int | None, reason: str, path: Path, doing: str) -> UserError:
    message = f"cannot {doing}: {reason}"
    if code in _USER_ERRNOS:
        return UserError(message, file=str(path), hint="check the path and its permissions")
    hint = "free some space or choose another folder" if code in _FULL_ERRNOS else None
    return MachineError(message, file=str(path), hint=hint)


def add_key(fault: UserError, key: str) -> UserError:
    """Prefix a fault's key with the key of its source in the recipe."""
    if fault.key is None:
        fault.key = key
    elif "." not in fault.key:
        fault.key = f"{key}.{fault.key}"
    return fault


def name_first(names: Sequence[str], count: int) -> str:
    """Return the first `count` names for a message, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def cut_text(text: str, limit: int) -> str:
    """Return a text, cut between words to at most `limit` characters with the `...` that says so.

    A word that takes most of them is cut inside.
    """
    if len(text) <= limit:
        return text
    head = text[: limit - 3]
    if not text[len(head)].isspace() and (last := head.rfind(" ")) > limit // 3:
        head = head[:last]
    return f"{head.rstrip()}..."
