"""`wegeft chat`: a talk with a model, its adapter on or off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wegeft_cli.cli.arguments import AskOptions, TargetArgument, is_piped, takes_ask_options
from wegeft_cli.cli.console import note, warn

if TYPE_CHECKING:
    from wegeft_cli.inference.chat import Conversation


@takes_ask_options
def chat(target: TargetArgument = None, *, asking: AskOptions) -> None:
    """Chat with a model. /adapter compares it with its base; /help lists the commands."""
    from wegeft_cli.cli.repl import Talk
    from wegeft_cli.inference.chat import open_conversation

    conversation = open_conversation(
        target,
        template=asking.read_template(),
        system=asking.system,
        decoding=asking.read_decoding(),
        max_new_tokens=asking.max_new_tokens,
        base=asking.base,
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
