"""What a stage of the matrix comes to: ok, refused with a message, or failed."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wegeft_cli.errors import MachineError, UserError

OK, REFUSED, FAILED = "ok", "refused", "failed"


@dataclass
class Outcome:
    """One stage of one family.

    Args:
        outcome: ok, refused or failed.
        message: Of a refusal or a failure.
        figures: What was measured.
        notes: What the command warned about.
        seconds: How long it took.
    """

    outcome: str
    message: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as a JSON object."""
        return asdict(self)


class DifferenceError(Exception):
    """Two results that should be equal are not, and no command said so."""


class Collected:
    """A reporter that keeps warnings and notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep a note."""
        self.notes.append(text)

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.notes.append(text)

    def progress(self, title: str, total: float) -> Any:
        """Show nothing."""
        from wegeft_cli.reporter import SilentReporter

        return SilentReporter().progress(title, total)


def attempt(stage: Callable[[Collected], dict[str, Any]]) -> Outcome:
    """Run a stage; a UserError is a refusal, any other exception a failure."""
    start, reporter = time.perf_counter(), Collected()
    try:
        outcome = Outcome(OK, figures=stage(reporter))
    except DifferenceError as error:
        outcome = Outcome(FAILED, str(error))
    except (UserError, MachineError, ExceptionGroup) as error:
        refusals = _refusals(error)
        if refusals is None:
            outcome = Outcome(FAILED, _describe(error))
        else:
            outcome = Outcome(REFUSED, "; ".join(refusals))
    except Exception as error:
        outcome = Outcome(FAILED, _describe(error))
    outcome.notes = list(dict.fromkeys(reporter.notes))
    outcome.seconds = round(time.perf_counter() - start, 2)
    return outcome


def _refusals(error: Exception) -> list[str] | None:
    """Return the messages of UserErrors; None if another exception is among them."""
    if isinstance(error, ExceptionGroup):
        found = [_refusals(part) for part in error.exceptions]
        return None if None in found else [text for part in found for text in part or ()]
    if not isinstance(error, UserError):
        return None
    place = f"{error.key}: " if error.key else ""
    return [place + error.message + (f" ({error.hint})" if error.hint else "")]


def _describe(error: Exception) -> str:
    """Return the exception and the last lines of this package and of any package."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ExceptionGroup):
        return " | ".join(_describe(part) for part in error.exceptions)
    ours = [frame for frame in frames if "wegeft_cli" in frame.filename]
    places = dict.fromkeys(
        f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"
        for frame in [*ours[-1:], *frames[-1:]]
    )
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} [{', '.join(places)}]"
