"""What `generate` and `chat` share: the options that choose tokens, and text as it is written."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from wegeft_cli.cli.console import get_console
from wegeft_cli.errors import UserError

if TYPE_CHECKING:
    from wegeft_cli.evaluation.sampling import Decoding

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


def read_decoding(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    stop: list[str] | None,
) -> Decoding:
    """Make the choice of tokens out of what was typed: greedy, unless something asks for a draw.

    Args:
        temperature: 0 is greedy.
        top_k: As typed, or None.
        top_p: As typed, or None.
        min_p: As typed, or None.
        repetition_penalty: 1 is none.
        stop: Stopping texts; a typed backslash with n or t in them is a line's end or a tabulator.

    Returns:
        The choice.

    Raises:
        UserError: If a draw is asked for and refused at the same time.
    """
    from wegeft_cli.evaluation.sampling import Decoding

    draws = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: value for name, value in draws.items() if value is not None}
    if temperature == 0 and given:
        name = next(iter(given)).replace("_", "-")
        raise UserError(
            f"--{name} narrows a draw, and at temperature 0 nothing is drawn",
            key="--temperature",
            hint="leave out one of the two",
        )
    stops = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in stop or ())
    return Decoding(
        do_sample=bool(given) or bool(temperature),
        temperature=temperature or 1.0,
        repetition_penalty=repetition_penalty,
        stop=stops,
        **given,  # type: ignore[arg-type]
    )


def read_template(template: str | None, raw: bool) -> str | None:
    """Join the two options for one thing.

    Args:
        template: As typed.
        raw: Whether `--raw` was given.

    Returns:
        The template's name, or None.

    Raises:
        UserError: If both were given.
    """
    if raw and template not in (None, "plain"):
        raise UserError("contradicts --template", key="--raw", hint="leave out one of the two")
    return "plain" if raw else template


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
