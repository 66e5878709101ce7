"""The errors a user sees without a traceback, and the exit codes of the command line."""

from __future__ import annotations

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
