"""The Typer app, and the one boundary where errors become messages and exit codes."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, TextIO, cast

import typer

from wegeft_cli.cli.broken_imports import describe_import_error
from wegeft_cli.cli.console import LastingStream, print_fault, print_message
from wegeft_cli.cli.lazy import Group, LazyCommands
from wegeft_cli.distributed.signals import follow_starter
from wegeft_cli.errors import EXIT_INTERRUPTED, MachineError, UserError
from wegeft_cli.version import VERSION

_PATH_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)

HELP = {
    "train": "Train the recipe's adapter and write it to the output folder.",
    "sweep": "Train every combination of the recipe's `sweep` and compare them. Rerun to resume.",
    "bench": "Compare methods on the same data, batches, steps and evaluation. Rerun to resume.",
    "merge": "Merge adapters into their base model, one tensor at a time.",
    "export": "Export an adapter as an exact LoRA equivalent, or an adapter or a model as GGUF.",
    "eval": "Score a model on test sets by a named protocol and log every sample.",
    "compare": "Compare two results row by row with McNemar's exact paired test.",
    "generate": "Generate answers to prompts. Decoding is greedy unless a sampling option is set.",
    "chat": "Chat with a model. /adapter compares it with its base; /help lists the commands.",
    "serve": "Serve an adapter, run or model at an OpenAI-compatible address. Ctrl-C ends it.",
    "inspect": "Show what an adapter changes: size, novelty, rank, tokens; or rank its parts.",
    "report": "Write one self-contained HTML page: scores, curves, answers, weights, recipe.",
    "edit": "Write an adapter with parts removed or scaled. The original is kept in it.",
    "validate": "Check a recipe's keys, types, rules and names, and list which inputs exist.",
    "plan": "Estimate parameters, steps and memory. A folder with only config.json is enough.",
    "preview": "Show rows as the model reads them, and statistics of all rows, without weights.",
    "recipes": "List, show and copy the shipped recipes, import others, print the JSON Schema.",
}
"""Each command with its help, so that `wegeft --help` imports none of them."""

_LOADS_TORCH = {"merge", "generate", "chat", "serve", "inspect", "export"}
"""Commands that import PyTorch at once; those with a recipe read it first."""

_FUNCTIONS = {"eval": "evaluate", "recipes": "recipes_app"}
_FOLDERS = {"generate": "inference.", "chat": "inference.", "serve": "inference."}


class RootGroup(Group):
    """The root command; it imports a command's module when the command is used."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        folder = "wegeft_cli.cli.commands"
        homes = {
            name: f"{folder}.{_FOLDERS.get(name, '')}{name}:{_FUNCTIONS.get(name, name)}"
            for name in HELP
        }
        self.commands = LazyCommands(homes, guard)

    def list_help(self) -> list[tuple[str, str]]:
        """Return the name and the help of each command."""
        return list(HELP.items())


app = typer.Typer(
    name="wegeft",
    cls=RootGroup,
    help="Fine-tune large pretrained models with WeGeFT: weight changes generated from the "
    "weights.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would take longer to import than the rest of a help page
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"wegeft {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def guard(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that every exception becomes a message and an exit code.

    WEGEFT_DEBUG=1 shows the traceback instead.
    """

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _silence_imports()
        try:
            if command.__name__ in _LOADS_TORCH:
                from wegeft_cli.cli.start import start_torch

                start_torch(command.__name__)
            return command(*args, **kwargs)
        except (UserError, ExceptionGroup) as error:
            if os.environ.get("WEGEFT_DEBUG") == "1":
                raise
            _leave_with(error)
        except KeyboardInterrupt:
            _print_interrupted()
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except ImportError as error:
            fault = describe_import_error(error)
            if fault is None or os.environ.get("WEGEFT_DEBUG") == "1":
                raise
            _leave_with(fault)
        except MemoryError:
            _leave_with(MachineError("out of memory"))
        except OSError as error:
            if os.environ.get("WEGEFT_DEBUG") == "1":
                raise
            _leave_with(_os_error(error))
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # the tokenizers package, in Rust
                _leave_with(UserError(f"the tokenizer failed: {error}"))
            if isinstance(error, Exception):
                _report_to_launcher(f"{type(error).__name__}: {error}")
            raise

    return guarded


def _leave_with(error: UserError | ExceptionGroup[Exception]) -> NoReturn:
    """Print the faults and exit; re-raise a group that contains another exception."""
    if isinstance(error, UserError):
        faults: list[UserError] = [error]
    else:
        mine, others = error.split(UserError)
        if others is not None or mine is None:
            raise error
        faults = [fault for fault in _flatten(mine) if isinstance(fault, UserError)]
    for fault in faults:
        print_fault(fault)
    _report_to_launcher("; ".join(str(fault) for fault in faults))
    raise typer.Exit(max(fault.exit_code for fault in faults)) from None


def _report_to_launcher(message: str) -> None:
    from wegeft_cli.distributed.failures import report_to_launcher

    report_to_launcher(message)


def _silence_imports() -> None:
    """Silence packages that warn, when imported, of kernels which this machine cannot run."""
    import logging

    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _print_interrupted() -> None:
    _ignore_interrupts()
    print_message("interrupted", style="yellow")


def _ignore_interrupts() -> None:
    """Ignore further Ctrl-C, which would end the process with a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _os_error(error: OSError) -> UserError:
    """Return the fault for an OSError that no other module has translated."""
    file = None if error.filename is None else str(error.filename)
    message = error.strerror or str(error)
    if isinstance(error, _PATH_ERRORS):
        return UserError(message, file=file, hint="check the path and its permissions")
    return MachineError(message, file=file, hint="WEGEFT_DEBUG=1 shows where")


def _flatten(group: BaseException) -> list[BaseException]:
    if isinstance(group, BaseExceptionGroup):
        return [leaf for member in group.exceptions for leaf in _flatten(member)]
    return [group]


def main() -> None:
    """Run the command line."""
    follow_starter()
    # Future changes of other packages do not concern the user.
    warnings.simplefilter("ignore", FutureWarning)
    # A file name in another encoding must not hide the message about it.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = cast(TextIO, LastingStream(sys.stdout, loses_output=False))
    sys.stderr = cast(TextIO, LastingStream(sys.stderr, loses_output=True))
    try:
        app()
    except KeyboardInterrupt:  # before a command started
        _print_interrupted()
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as leaving:
        if leaving.code == EXIT_INTERRUPTED:
            _ignore_interrupts()
        raise
