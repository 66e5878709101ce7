"""The help pages: what Typer would draw, without its types column and without loading Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from wegeft_cli.cli.console import console

Row = tuple[str, str]


class HelpfulCommand(TyperCommand):
    """A command that draws its own help."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Give the words after the command's name: `[OPTIONS] RECIPE [KEY=VALUE]...`."""
        found = [each for each in self.get_params(ctx) if each.param_type_name == "argument"]
        return ["[OPTIONS]", *(_name_argument(argument) for argument in found)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Draw the help page on standard output."""
        _draw(self, ctx)


class HelpfulGroup(TyperGroup):
    """A group of commands that draws its own help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Draw the help page on standard output."""
        _draw(self, ctx)


def _draw(command: Any, ctx: Any) -> None:
    parameters = [param for param in command.get_params(ctx) if not getattr(param, "hidden", False)]
    arguments = [param for param in parameters if param.param_type_name == "argument"]
    options = [param for param in parameters if param.param_type_name == "option"]
    usage = Text.assemble(
        ("Usage: ", "bold"), f"{ctx.command_path} {' '.join(command.collect_usage_pieces(ctx))}"
    )
    console.print(Padding(usage, (1, 1, 0, 1)))
    console.print(Padding(Text(command.help or ""), (1, 1)))
    if isinstance(command, TyperGroup):
        names = command.list_commands(ctx)
        found = [(name, command.get_command(ctx, name)) for name in names]
        _draw_panel("Commands", [(name, each.help or "") for name, each in found if each])
    _draw_panel("Arguments", [(_name_argument(each), each.help or "") for each in arguments])
    _draw_panel("Options", [(_name_option(each), each.help or "") for each in options])


def _name_argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    name = name if argument.required else f"[{name}]"
    return f"{name}..." if argument.nargs == -1 else name


def _name_option(option: Any) -> str:
    long_first = sorted(option.opts, key=len, reverse=True)
    names = ", ".join([*long_first, *option.secondary_opts])
    return f"{names} {option.metavar}" if option.metavar else names


def _draw_panel(title: str, rows: Iterable[Row]) -> None:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(ratio=1)
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    if table.row_count:
        console.print(Panel(table, title=title, title_align="left", border_style="dim"))
