"""`wegeft chat`: a talk with a model, its adapter on or off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wegeft_cli.cli.asking import (
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
    is_piped,
    read_decoding,
    read_template,
)
from wegeft_cli.cli.console import note, warn
from wegeft_cli.cli.options import BaseOption, TargetArgument

if TYPE_CHECKING:
    from wegeft_cli.workflows.conversation import Conversation


def chat(
    target: TargetArgument = None,
    template: TemplateOption = None,
    raw: RawOption = False,
    system: SystemOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    max_new_tokens: LengthOption = None,
    stop: StopOption = None,
    base: BaseOption = None,
) -> None:
    """Talk with a model; /adapter off, on or both compares it with its base, /help tells more."""
    from wegeft_cli.cli.talk import Talk
    from wegeft_cli.workflows.conversation import open_conversation

    decoding = read_decoding(temperature, top_k, top_p, min_p, repetition_penalty, stop)
    conversation = open_conversation(
        target,
        template=read_template(template, raw),
        system=system,
        decoding=decoding,
        seed=seed,
        max_new_tokens=max_new_tokens,
        base=base,
        warn=warn,
    )
    _greet(conversation)
    Talk(conversation, is_piped=is_piped()).run()


def _greet(conversation: Conversation) -> None:
    note(conversation.about)
    if not conversation.form.holds_turns:
        note("this form holds one question: each one stands alone, without what was said before")
    if not is_piped():
        note("/help lists the commands, /exit or Ctrl-D ends, Ctrl-C stops an answer")
