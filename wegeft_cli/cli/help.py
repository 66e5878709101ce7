"""The help pages, drawn by hand: Typer would load rich and Markdown, longer than all else takes."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_WIDEST = 100
_LEAST = 40


class HelpfulCommand(TyperCommand):
    """A command that draws its own help."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Give the words after the command's name: `[OPTIONS] RECIPE [KEY=VALUE]...`."""
        found = [each for each in self.get_params(ctx) if each.param_type_name == "argument"]
        return ["[OPTIONS]", *(_name_argument(argument) for argument in found)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write("\n".join(_draw_page(self, ctx)))


class HelpfulGroup(TyperGroup):
    """A group of commands that draws its own help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write("\n".join(_draw_page(self, ctx)))


def _draw_page(command: Any, ctx: Any) -> Iterator[str]:
    width = max(_LEAST, min(shutil.get_terminal_size().columns, _WIDEST))
    parameters = [param for param in command.get_params(ctx) if not getattr(param, "hidden", False)]
    arguments = [param for param in parameters if param.param_type_name == "argument"]
    options = [param for param in parameters if param.param_type_name == "option"]
    usage = f"Usage: {ctx.command_path} {' '.join(command.collect_usage_pieces(ctx))}"
    yield ""
    for line in textwrap.wrap(usage, width - 2, subsequent_indent=" " * 7):
        yield " " + line.replace("Usage:", _style("Usage:", bold=True))
    yield ""
    for line in textwrap.wrap(command.help or "", width - 2):
        yield f" {line}"
    yield ""
    if isinstance(command, TyperGroup):
        names = command.list_commands(ctx)
        found = [(name, command.get_command(ctx, name)) for name in names]
        rows = [(name, each.help or "") for name, each in found if each]
        yield from _draw_panel("Commands", rows, width)
    rows = [(_name_argument(each), each.help or "") for each in arguments]
    yield from _draw_panel("Arguments", rows, width)
    rows = [(_name_option(each), each.help or "") for each in options]
    yield from _draw_panel("Options", rows, width)


def _name_argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    name = name if argument.required else f"[{name}]"
    return f"{name}..." if argument.nargs == -1 else name


def _name_option(option: Any) -> str:
    long_first = sorted(option.opts, key=len, reverse=True)
    names = ", ".join([*long_first, *option.secondary_opts])
    return f"{names} {option.metavar}" if option.metavar else names


def _draw_panel(title: str, rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Draw names and texts in two columns, with a frame around them."""
    if not rows:
        return
    first = max(len(name) for name, _ in rows)
    bar = _style("│", dim=True)
    yield (
        _style("╭─", dim=True)
        + f" {title} "
        + _style("─" * (width - len(title) - 5) + "╮", dim=True)
    )
    for name, text in rows:
        for number, line in enumerate(textwrap.wrap(text, max(10, width - first - 6)) or [""]):
            head = _style(f"{'' if number else name:<{first}}", fg="cyan")
            yield f"{bar} {head}  {line:<{width - first - 6}} {bar}"
    yield _style("╰" + "─" * (width - 2) + "╯", dim=True)


def _style(text: str, **styles: Any) -> str:
    return text if os.environ.get("NO_COLOR") else typer.style(text, **styles)
