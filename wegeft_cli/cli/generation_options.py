"""The options of `generate` and `chat`: prompt format and decoding."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, get_type_hints

from wegeft_cli.cli.arguments import (
    BaseOption,
    LengthOption,
    MinPOption,
    PenaltyOption,
    RawOption,
    SeedOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    TemplateOption,
    TopKOption,
    TopPOption,
)
from wegeft_cli.errors import UserError

if TYPE_CHECKING:
    from wegeft_cli.generation.decoding import Decoding


@dataclass(frozen=True)
class GenerationOptions:
    """Prompt format and decoding as typed."""

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
        """Return the decoding: greedy, unless a sampling option is set.

        A stop text may contain escaped newlines and tabs.

        Temperature 0 together with another sampling option raises `UserError`.
        """
        from wegeft_cli.inference.defaults import GREEDY

        draws = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        given: dict[str, Any] = {name: value for name, value in draws.items() if value is not None}
        temperature = self.temperature
        if temperature == 0 and given:
            name = next(iter(given)).replace("_", "-")
            raise UserError(
                f"--{name} applies to sampling, and temperature 0 is greedy",
                key="--temperature",
                hint="remove one of the two",
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
        """Return the template's name; raise `UserError` if --raw contradicts --template."""
        if not self.raw:
            return self.template
        if self.template not in (None, "plain"):
            raise UserError("contradicts --template", key="--raw", hint="remove one of the two")
        return "plain"


def generation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of `GenerationOptions`, instead of `generation`.

    Typer reads options from a command's signature and has no way to share a list of them.
    """

    @wraps(command)
    def run(*words: Any, **given: Any) -> None:
        typed = {each.name: given.pop(each.name) for each in fields(GenerationOptions)}
        command(*words, generation=GenerationOptions(**typed), **given)

    hints = get_type_hints(GenerationOptions, include_extras=True)
    spread = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=hints[each.name],
        )
        for each in fields(GenerationOptions)
    ]
    own = inspect.signature(command, eval_str=True).parameters
    seen = [part for name in own for part in (spread if name == "generation" else [own[name]])]
    run.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
    run.__annotations__ = {part.name: part.annotation for part in seen}
    return run


def stdin_is_pipe() -> bool:
    """Return whether standard input is not a terminal."""
    return not sys.stdin.isatty()
