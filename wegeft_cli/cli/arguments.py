"""The vocabulary of arguments: one alias for each thing that several commands take."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from wegeft_cli.cli.console import get_console
from wegeft_cli.errors import UserError

if TYPE_CHECKING:
    from wegeft_cli.generation.decoding import Decoding
    from wegeft_cli.publishing.hub import HubTarget


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.learning_rate=2e-4."),
]
AdapterArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="ADAPTER",
        help="An adapter folder or a run folder; left out: the newest finished run under runs/.",
    ),
]
TargetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TARGET",
        help="An adapter, run or model folder, or a hub id; left out: the newest finished run.",
    ),
]
TargetsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TARGET",
        help="An adapter, run or model folder, or a hub id; left out: the newest finished run; for "
        "--task glue, fgvc or vtab a run of each set.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="PATH", help="The base model, where it is not as recorded."),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", metavar="DIR", help="Folder with <set>/test.json; left out: the hub."
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Only the first so many rows of each set."),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="REV", help="The base's hub revision, where it is not as recorded."
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="REPO",
        help="Upload what was written to this hub repository (owner/name); private when new.",
    ),
]
PublicOption = Annotated[
    bool, typer.Option("--public", help="With --push-to-hub: make a new repository public.")
]


def hub_target(repo_id: str | None, is_public: bool) -> HubTarget | None:
    """Give where --push-to-hub and --public send a folder, None for nowhere.

    Args:
        repo_id: The repository.
        is_public: Whether a new one is public.

    Returns:
        The target.

    Raises:
        UserError: If there is --public alone.
    """
    if repo_id is None:
        if is_public:
            message = "says nothing without --push-to-hub"
            raise UserError(message, key="--public", hint="name the repository, or leave it out")
        return None
    from wegeft_cli.publishing.hub import HubTarget

    return HubTarget(repo_id, is_public)


AllowCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution", help="Run the code that the model writes, in a sandbox."
    ),
]
NumSamplesOption = Annotated[
    int | None,
    typer.Option("--num-samples", metavar="N", min=1, help="Answers to each code problem."),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", min=0.0, help="Of code's draws; 0 is greedy."),
]
JudgeUrlOption = Annotated[
    str | None,
    typer.Option(
        "--judge-url",
        metavar="URL",
        help="An OpenAI-compatible address that judges answers; nothing is sent without it.",
    ),
]
JudgeModelOption = Annotated[
    str | None,
    typer.Option("--judge-model", metavar="NAME", help="The judge's name at that address."),
]
JudgmentsOption = Annotated[
    Path | None,
    typer.Option("--judgments", metavar="FILE", help="Score this judgment file, without a model."),
]
TrustTaskCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-task-code",
        help="Run Python that lm-eval task files under --data-dir name (without a sandbox).",
    ),
]

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
SamplingTemperatureOption = Annotated[
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
    temperature: SamplingTemperatureOption = None
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
        from wegeft_cli.inference.generate import GREEDY

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
