"""Command groups that import a command's module when the command is used, so that help is fast."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

_VALUES_IF_ALONE = {"--resume": "auto"}
"""Option -> the value that it has when it is typed without one."""


def _explain_key(error: Any, words: list[str]) -> None:
    """Add to the error of an unknown option how the recipe's key that it means is written."""
    option = getattr(error, "option_name", None)
    if option is None or not hasattr(error, "possibilities"):
        return
    key = _find_key(option)
    if key is not None:
        values = dict(pairwise([*words, ""])) | dict(
            word.split("=", 1) for word in words if "=" in word
        )
        value = values.get(option) or "VALUE"
        error.message += f". Keys of the recipe are arguments: {key}={value}"
        error.possibilities = None


def _explain_prompt(error: Any, options: set[str]) -> None:
    """Add to the error of a word too many that a prompt is an option, where there is one."""
    if "--prompt" in options and "unexpected extra argument" in str(getattr(error, "message", "")):
        error.message += '. A prompt is an option: --prompt "..."'


def _find_key(option: str) -> str | None:
    """Return the recipe's key that an unknown option probably means."""
    from wegeft_cli.recipe.keys import parse_key
    from wegeft_cli.recipe.schema_keys import find_nearest_key, kind_at

    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    try:
        path = parse_key(name)
    except ValueError:
        return None
    return name if kind_at(path) is not None else find_nearest_key(path)


def _with_flag_defaults(parameters: list[Any]) -> list[Any]:
    """Set the default of flags such as --help: typer builds a slow pydantic adapter without it."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.default is None:
            parameter.default = False
    return parameters


def _is_flag(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False))


def _is_no_value(word: str) -> bool:
    """Return whether a word is another option or an override, not the value of an option."""
    return word.startswith("-") or re.match(r"[a-z_]+(\.[\w\[\]]+)*=", word) is not None


class Command(TyperCommand):
    """A command whose usage line shows the arguments by their metavars."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, each flag with a default."""
        return _with_flag_defaults(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words, after adding the values of `_VALUES_IF_ALONE`."""
        takes_value = {n for each in self.params for n in each.opts if not _is_flag(each)}
        words: list[str] = []
        for word, following in zip(args, [*args[1:], "--"], strict=False):
            words.append(word)
            if word in takes_value & _VALUES_IF_ALONE.keys() and _is_no_value(following):
                words.append(_VALUES_IF_ALONE[word])
        try:
            return super().parse_args(ctx, words)
        except Exception as error:
            if any(each.metavar == "KEY=VALUE" for each in self.params):
                _explain_key(error, args)
            _explain_prompt(error, {name for each in self.params for name in each.opts})
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words after the command's name: `[OPTIONS] RECIPE [KEY=VALUE]...`."""
        found = [each for each in self.params if each.param_type_name == "argument"]
        words = (each.metavar if each.required else f"[{each.metavar}]" for each in found)
        dots = ("..." if each.nargs == -1 else "" for each in found)
        return ["[OPTIONS]", *(f"{word}{end}" for word, end in zip(words, dots, strict=True))]


class Group(TyperGroup):
    """A group whose help shows the whole first paragraph of each command."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, each flag with a default."""
        return _with_flag_defaults(super().get_params(ctx))

    def list_help(self) -> list[tuple[str, str]]:
        """Return the name and the help of each command."""
        return [(name, command.help or "") for name, command in self.commands.items()]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl(self.list_help())


class LazyCommands(MutableMapping[str, Any]):
    """Commands by name, each imported when it is first looked up.

    Args:
        homes: Command's name -> `module:attribute` of its function, or of its `typer.Typer`.
        wrap: Wraps each function.
    """

    def __init__(self, homes: Mapping[str, str], wrap: Callable[..., Any]) -> None:
        self._homes = dict(homes)
        self._wrap = wrap
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            module, _, attribute = self._homes[name].partition(":")
            found = getattr(importlib.import_module(module), attribute)
            self._loaded[name] = self._build(name, found)
        return self._loaded[name]

    def _build(self, name: str, found: Any) -> Any:
        app = found
        if not isinstance(app, typer.Typer):
            app = typer.Typer(add_completion=False, rich_markup_mode=None)
            app.command(name, cls=Command)(found)
        command = get_command(app)
        command.name = name
        for leaf in getattr(command, "commands", {name: command}).values():
            leaf.callback = self._wrap(leaf.callback)
        return command

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command
        self._homes.setdefault(name, "")

    def __delitem__(self, name: str) -> None:
        del self._homes[name]
        self._loaded.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)
