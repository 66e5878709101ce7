"""What `generate` and `chat` share: the options by which they ask, and text as it is written."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from wegeft_cli.cli.console import get_console
from wegeft_cli.cli.options import BaseOption
from wegeft_cli.errors import UserError

if TYPE_CHECKING:
    from wegeft_cli.evaluation.decoding import Decoding

SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System message of the conversation.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="NAME",
        help="Prompt form: a template's name, chat, or a .jinja file; left out: as in training, "
        "else the chat template, else plain.",
    ),
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="The text as it stands; short for --template plain.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", help="Draw tokens at this temperature; 0: greedy."),
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", metavar="P", help="Draw from the likeliest tokens of this sum."),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", metavar="K", help="Draw from the K likeliest tokens.")
]
MinPOption = Annotated[
    float | None,
    typer.Option("--min-p", metavar="P", help="Draw from tokens of this share of the likeliest."),
]
PenaltyOption = Annotated[
    float,
    typer.Option("--repetition-penalty", metavar="X", help="Above 1: say less what is said."),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Of the draws.")]
LengthOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        min=1,
        help="Longest answer; left out: 512, or half of a smaller context.",
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="Ends an answer; may be given several times."),
]


@dataclass(frozen=True)
class AskOptions:
    """In which form a model is asked, and how its tokens are chosen; as typed."""

    template: TemplateOption = None
    raw: RawOption = False
    system: SystemOption = None
    temperature: TemperatureOption = None
    top_p: TopPOption = None
    top_k: TopKOption = None
    min_p: MinPOption = None
    repetition_penalty: PenaltyOption = 1.0
    seed: SeedOption = 0
    max_new_tokens: LengthOption = None
    stop: StopOption = None
    base: BaseOption = None

    def read_decoding(self) -> Decoding:
        """Make the choice of tokens: greedy, unless something asks for a draw.

        A typed backslash with n or t in a stop text is a line's end or a tabulator. The length is
        left to the workflow, which knows the model.

        Returns:
            The choice.

        Raises:
            UserError: If a draw is asked for and refused at the same time, or a value is out of
                range.
            ExceptionGroup: If several are.
        """
        from wegeft_cli.workflows.generate import GREEDY

        draws = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        given: dict[str, Any] = {name: value for name, value in draws.items() if value is not None}
        temperature = self.temperature
        if temperature == 0 and given:
            name = next(iter(given)).replace("_", "-")
            raise UserError(
                f"--{name} narrows a draw, and at temperature 0 nothing is drawn",
                key="--temperature",
                hint="leave out one of the two",
            )
        if temperature is None:
            temperature = 1.0 if given else 0.0
        return replace(
            GREEDY,
            temperature=temperature,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in self.stop or ()),
            seed=self.seed,
            **given,
        )

    def read_template(self) -> str | None:
        """Join the two options for one thing.

        Returns:
            The template's name, or None.

        Raises:
            UserError: If both were given.
        """
        if not self.raw:
            return self.template
        if self.template not in (None, "plain"):
            raise UserError("contradicts --template", key="--raw", hint="leave out one of the two")
        return "plain"


def takes_ask_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take each of `AskOptions` by itself, in the place of its parameter `asking`.

    Typer reads a command's options off its signature, and has no way to share a list of them.

    Args:
        command: With a keyword-only parameter `asking`.

    Returns:
        The command as Typer is to see it.
    """

    @wraps(command)
    def run(*words: Any, **given: Any) -> None:
        typed = {each.name: given.pop(each.name) for each in fields(AskOptions)}
        command(*words, asking=AskOptions(**typed), **given)

    hints = get_type_hints(AskOptions, include_extras=True)
    spread = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=hints[each.name],
        )
        for each in fields(AskOptions)
    ]
    own = inspect.signature(command, eval_str=True).parameters
    seen = [part for name in own for part in (spread if name == "asking" else [own[name]])]
    run.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
    run.__annotations__ = {part.name: part.annotation for part in seen}
    return run


def write_piece(text: str) -> None:
    """Write a piece of an answer at once, without a line's end; on a terminal nothing steers it."""
    console = get_console()
    shown = make_harmless(text) if console.is_terminal else text
    console.out(shown, end="", highlight=False)
    console.file.flush()


def make_harmless(text: str) -> str:
    """Show what would steer a terminal as signs; line ends and tabulators stay.

    Args:
        text: What a model wrote.

    Returns:
        The text without control characters.
    """
    shown = "".join(
        chr(0x2400 + ord(sign)) if ord(sign) < 32 and sign not in "\n\t" else sign for sign in text
    )
    shown = shown.replace("\x7f", "\u2421")
    return "".join("\ufffd" if 0x80 <= ord(sign) < 0xA0 else sign for sign in shown)


def is_piped() -> bool:
    """Whether standard input comes from somewhere else than a keyboard."""
    return not sys.stdin.isatty()
