"""The read-eval-print loop of `wegeft chat`."""

from __future__ import annotations

import difflib
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from wegeft_cli.cli.console import get_console, note, print_fault, show, warn, write_piece
from wegeft_cli.errors import UserError

if TYPE_CHECKING:
    from wegeft_cli.inference.chat import Conversation, Reply

_COMMANDS = {
    "/adapter": ("[on|off|both]", "switch the adapter on or off, or show both answers"),
    "/retry": ("", "answer the last question again"),
    "/undo": ("", "remove the last question and its answer"),
    "/reset": ("", "clear the conversation"),
    "/system": ("[TEXT|none]", "show, set or remove the system message"),
    "/set": ("[KEY VALUE]", "show or change temperature (0: greedy), top_p, top_k, min_p, "),
    "": ("", "repetition_penalty, max_new_tokens, seed"),
    "/save": ("FILE", "save the conversation as a training row for `wegeft train`"),
    "/help": ("", "show this list"),
    "/exit": ("", "quit; so does Ctrl-D"),
    '"""': ("", "starts and ends a text of several lines"),
}
_OTHER_NAMES = {"/quit": "/exit", "/bye": "/exit", "/clear": "/reset", "/?": "/help"}
_FENCE = '"""'
_SWITCHES = ("on", "off", "both")


class Repl:
    """A conversation at the terminal or with lines from a pipe.

    With a pipe, only answers are written to standard output, and Ctrl-C ends the program.
    """

    def __init__(self, conversation: Conversation, *, is_piped: bool) -> None:
        self.conversation = conversation
        self.is_piped = is_piped
        self.adapter = "on"

    def run(self) -> None:
        """Read and answer lines until the input ends or a command quits."""
        if not self.is_piped:
            with suppress(ImportError):
                import readline  # noqa: F401  # gives input() editing and a history
        while (line := self._read()) is not None:
            if not line.strip():
                continue
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if self.dispatch(line.strip()):
                        return
                else:
                    self._answer(line.removeprefix("/") if line.startswith("//") else line)
            except UserError as fault:
                if fault.exit_code != UserError.exit_code:  # a MachineError
                    raise
                print_fault(fault)
            except ExceptionGroup as group:
                faults, others = group.split(UserError)
                if others is not None or faults is None:
                    raise
                for each in faults.exceptions:
                    if isinstance(each, UserError):
                        print_fault(each)

    def _read(self) -> str | None:
        """Return a line, or several lines between two triple quotes; None at the end."""
        line = self._read_line(">>> " if self.adapter == "on" else f"[{self._label()}] >>> ")
        if line is None or not line.startswith(_FENCE):
            return line
        lines = [line.removeprefix(_FENCE)]
        while not lines[-1].endswith(_FENCE):
            more = self._read_line("... ")
            if more is None:
                break
            lines.append(more)
        lines[-1] = lines[-1].removesuffix(_FENCE)
        return "\n".join(lines).strip("\n")

    def _read_line(self, prompt: str) -> str | None:
        if self.is_piped:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            show("")
            return None

    def _label(self) -> str:
        return {"off": "base", "both": "base | tuned", "on": "tuned"}[self.adapter]

    def _answer(self, question: str) -> None:
        if self.adapter == "both":
            show("base", style="bold cyan")
            base = self._write(question, tuned=False)
            if base.finish_reason == "interrupted":
                return
            show("tuned", style="bold cyan")
        # Of two answers, the conversation keeps the tuned model's.
        reply = self._write(question, tuned=self.adapter != "off")
        self.conversation.keep(question, reply)

    def _write(self, question: str, *, tuned: bool) -> Reply:
        reply = self.conversation.ask(question, tuned=tuned, on_text=write_piece)
        show("")
        if reply.finish_reason == "interrupted" and self.is_piped:
            raise KeyboardInterrupt
        if reply.num_left_out:
            warn(
                f"the context is full: the {reply.num_left_out} oldest messages were not read "
                "(/reset clears it)"
            )
        if reply.finish_reason == "length":
            note(f"cut after {self.conversation.max_new_tokens} tokens (/set max_new_tokens N)")
        elif reply.finish_reason == "interrupted":
            note("stopped")
        if get_console().is_terminal:
            show("")
        return reply

    def dispatch(self, line: str) -> bool:
        """Run a command; return whether it ends the loop."""
        word, _, rest = line.partition(" ")
        word, rest = _OTHER_NAMES.get(word, word), rest.strip()
        talk = self.conversation
        if word == "/exit":
            return True
        if word == "/help":
            for name, (usage, text) in _COMMANDS.items():
                note(f"{name:<9}{usage:<15}{text}")
        elif word == "/adapter":
            self._switch(rest)
        elif word == "/retry":
            question = talk.take_back()
            if question is None:
                raise UserError("there is no question to answer again", key="/retry")
            note(question)
            self._answer(question)
        elif word == "/undo":
            taken = talk.take_back()
            note("the conversation is empty" if taken is None else f"removed: {taken}")
        elif word == "/reset":
            talk.reset()
            note("the conversation is cleared")
        elif word == "/system":
            self._set_system(rest)
        elif word == "/set":
            self._set(rest)
        elif word == "/save":
            self._save(rest)
        else:
            near = difflib.get_close_matches(
                word, [*(name for name in _COMMANDS if name[:1] == "/"), *_OTHER_NAMES], n=1
            )
            hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
            raise UserError(
                f"unknown command {word!r}", hint=f"{hint} Double the slash to send it as text"
            )
        return False

    def _switch(self, rest: str) -> None:
        if not self.conversation.has_switch:
            raise UserError(
                "this is a whole model and has no adapter to switch off",
                key="/adapter",
                hint="chat with the adapter or its run instead",
            )
        if rest and rest not in _SWITCHES:
            raise UserError(f"must be on, off or both; got {rest!r}", key="/adapter")
        self.adapter = rest or ("off" if self.adapter == "on" else "on")
        states = {
            "on": "the adapter is on",
            "off": "the adapter is off: the base answers",
            "both": "the base answers first, then the tuned model, whose answer is kept",
        }
        note(states[self.adapter])

    def _set_system(self, rest: str) -> None:
        talk = self.conversation
        if rest:
            talk.set_system(None if rest == "none" else rest)
        note("no system message" if talk.system is None else f"system: {talk.system}")

    def _set(self, rest: str) -> None:
        from wegeft_cli.inference.chat import describe_decoding

        if rest:
            key, _, value = rest.replace("=", " ", 1).partition(" ")
            self.conversation.set_value(key.replace("-", "_"), value.strip())
        settings = describe_decoding(self.conversation)
        note(", ".join(f"{name} {value}" for name, value in settings.items()))

    def _save(self, rest: str) -> None:
        if not rest:
            raise UserError("needs a file name", key="/save", hint="such as /save chat.jsonl")
        path = Path(rest).expanduser()
        self.conversation.save(path)
        note(f"saved: {path}")
