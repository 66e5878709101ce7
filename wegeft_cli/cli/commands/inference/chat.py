"""`wegeft chat`: chat with a model, with its adapter on or off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wegeft_cli.cli.arguments import TargetArgument
from wegeft_cli.cli.console import note, warn
from wegeft_cli.cli.generation_options import GenerationOptions, generation_options, stdin_is_pipe

if TYPE_CHECKING:
    from wegeft_cli.inference.chat import Conversation


@generation_options
def chat(target: TargetArgument = None, *, generation: GenerationOptions) -> None:
    """Chat with a model. /adapter compares it with its base; /help lists the commands."""
    from wegeft_cli.cli.repl import Repl
    from wegeft_cli.inference.chat import open_conversation

    conversation = open_conversation(
        target,
        template=generation.read_template(),
        system=generation.system,
        decoding=generation.read_decoding(),
        max_new_tokens=generation.max_new_tokens,
        base=generation.base,
        warn=warn,
    )
    _greet(conversation)
    Repl(conversation, is_piped=stdin_is_pipe()).run()


def _greet(conversation: Conversation) -> None:
    note(conversation.about)
    if not conversation.form.holds_turns:
        note("this prompt format has no turns: each question is independent of earlier ones")
    if not stdin_is_pipe():
        note("/help lists the commands, /exit or Ctrl-D quits, Ctrl-C stops an answer")
