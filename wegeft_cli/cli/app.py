"""The Typer app, and the one boundary where errors become messages and exit codes."""

from __future__ import annotations

import functools
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from wegeft_cli.cli.commands import (
    chat,
    compare,
    edit,
    export,
    generate,
    inspect,
    merge,
    plan,
    preview,
    recipes,
    report,
    sweep,
    train,
    validate,
)
from wegeft_cli.cli.commands import eval as eval_command
from wegeft_cli.cli.console import print_fault, tell
from wegeft_cli.cli.help import HelpfulCommand, HelpfulGroup
from wegeft_cli.distributed.failures import tell_launcher
from wegeft_cli.distributed.signals import follow_starter
from wegeft_cli.errors import EXIT_INTERRUPTED, MachineError, UserError
from wegeft_cli.version import VERSION

_PATH_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)

app = typer.Typer(
    name="wegeft",
    cls=HelpfulGroup,
    help="Fine-tune large pretrained models by WeGeFT: weight changes generated from the weights.",
    no_args_is_help=True,
    rich_markup_mode=None,  # it would load rich for every help page
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    """Wrap a command so that faults become messages and exit codes, whatever raised them.

    WEGEFT_DEBUG=1 lets the traceback through.
    """

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (UserError, ExceptionGroup) as error:
            if os.environ.get("WEGEFT_DEBUG") == "1":
                raise
            _leave_with(error)
        except KeyboardInterrupt:
            _tell_interrupted()
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except MemoryError:
            _leave_with(MachineError("out of memory"))
        except OSError as error:
            if os.environ.get("WEGEFT_DEBUG") == "1":
                raise
            _leave_with(_tell_os_error(error))
        except Exception as error:
            tell_launcher(f"{type(error).__name__}: {error}")
            raise

    return guarded


def _leave_with(error: UserError | ExceptionGroup[Exception]) -> NoReturn:
    """Print the user's faults and leave; a group that also holds a bug goes on as it is."""
    if isinstance(error, UserError):
        faults: list[UserError] = [error]
    else:
        mine, others = error.split(UserError)
        if others is not None or mine is None:
            raise error
        faults = [fault for fault in _flatten(mine) if isinstance(fault, UserError)]
    for fault in faults:
        print_fault(fault)
    tell_launcher("; ".join(str(fault) for fault in faults))
    raise typer.Exit(max(fault.exit_code for fault in faults)) from None


def _tell_interrupted() -> None:
    _ignore_interrupts()
    tell("interrupted", style="yellow")


def _ignore_interrupts() -> None:
    """Let no further Ctrl-C spoil the way out with a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tell_os_error(error: OSError) -> UserError:
    """Tell what no room below has told: a full disk under `> file`, a folder without rights."""
    file = None if error.filename is None else str(error.filename)
    message = error.strerror or str(error)
    if isinstance(error, _PATH_ERRORS):
        return UserError(message, file=file, hint="check the path and its permissions")
    return MachineError(message, file=file, hint="WEGEFT_DEBUG=1 shows where")


def _flatten(group: BaseException) -> list[BaseException]:
    if isinstance(group, BaseExceptionGroup):
        return [leaf for member in group.exceptions for leaf in _flatten(member)]
    return [group]


app.command("train", cls=HelpfulCommand)(guard(train.train))
app.command("sweep", cls=HelpfulCommand)(guard(sweep.sweep))
app.command("merge", cls=HelpfulCommand)(guard(merge.merge))
app.command("export", cls=HelpfulCommand)(guard(export.export))
app.command("eval", cls=HelpfulCommand)(guard(eval_command.evaluate))
app.command("compare", cls=HelpfulCommand)(guard(compare.compare))
app.command("generate", cls=HelpfulCommand)(guard(generate.generate))
app.command("chat", cls=HelpfulCommand)(guard(chat.chat))
app.command("inspect", cls=HelpfulCommand)(guard(inspect.inspect))
app.command("report", cls=HelpfulCommand)(guard(report.report))
app.command("edit", cls=HelpfulCommand)(guard(edit.edit))
app.command("validate", cls=HelpfulCommand)(guard(validate.validate))
app.command("plan", cls=HelpfulCommand)(guard(plan.plan))
app.command("preview", cls=HelpfulCommand)(guard(preview.preview))
for registered in recipes.recipes_app.registered_commands:
    if registered.callback is not None:
        registered.callback = guard(registered.callback)
app.add_typer(recipes.recipes_app, name="recipes")


def main() -> None:
    """Run the command line."""
    follow_starter()
    # What other packages will change one day is not the user's matter.
    warnings.simplefilter("ignore", FutureWarning)
    # At their import these warn of kernels that this machine cannot run and nobody asked for.
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A file name in another encoding must not hide the message about it.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:  # before a command had begun
        _tell_interrupted()
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as leaving:
        if leaving.code == EXIT_INTERRUPTED:
            _ignore_interrupts()
        raise
