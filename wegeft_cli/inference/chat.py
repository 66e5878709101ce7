"""A conversation with a model, with its adapter enabled or disabled."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import find_recipe_of
from wegeft_cli.data.sources.messages import check_text
from wegeft_cli.data.text.chat_rendering import Message
from wegeft_cli.errors import UserError
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import GenerationEvents, Prompts, context_length, generate_texts
from wegeft_cli.generation.kv_cache import PrefixCache
from wegeft_cli.inference.defaults import GREEDY, default_new_tokens, describe_target
from wegeft_cli.inference.form_choice import choose_form
from wegeft_cli.inference.loaded_model import LoadedModel, find_target
from wegeft_cli.inference.prompt_format import PromptForm
from wegeft_cli.models.device_memory import generation_memory_errors
from wegeft_cli.storage.atomic import write_text_atomic

_NARROWS = ("top_k", "top_p", "min_p")
_SETTINGS = ("temperature", *_NARROWS, "repetition_penalty", "max_new_tokens", "seed")


@dataclass(frozen=True)
class Reply:
    """The answer of one turn.

    Args:
        text: The answer without surrounding white space.
        finish_reason: `stop`, `length`, or `interrupted`.
        num_new_tokens: Number of generated tokens; None for an interrupted answer.
        seconds: Duration.
        num_left_out: Number of oldest messages without room in the model's context.
    """

    text: str
    finish_reason: str
    num_new_tokens: int | None
    seconds: float
    num_left_out: int = 0


@dataclass
class Conversation:
    """The messages so far, and how the next answer is generated.

    Args:
        opened: The model.
        form: The prompt format.
        about: One line for the user about the model.
        decoding: Decoding settings; each answer has its own random stream.
        system: The system message.
        messages: The turns, user and assistant alternately.
    """

    opened: LoadedModel
    form: PromptForm
    about: str
    decoding: Decoding = GREEDY
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    _num_answers: int = 0
    # One of the adapted model and one of its base.
    _prefix_caches: dict[bool, PrefixCache] = field(
        default_factory=lambda: defaultdict(PrefixCache)
    )

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""
        return self.decoding.max_new_tokens

    @property
    def has_switch(self) -> bool:
        """Whether the adapter can be switched off."""
        return self.opened.kind == "adapter"

    def ask(
        self, question: str, *, tuned: bool = True, on_text: Callable[[str], None] | None = None
    ) -> Reply:
        """Generate the answer to a question after the messages so far; neither is stored yet.

        Ctrl-C ends the answer, not the conversation.

        Raises:
            UserError: If the question alone is too long for the model's context, contains invalid
                text, or the prompt format rejects it.
            MachineError: If the memory does not suffice.
        """
        check_text("question", question)
        text, num_left_out = self._fit(question)
        pieces: list[str] = []

        def take(piece: str) -> None:
            # Some forms leave the space before the answer to the model.
            piece = piece if pieces else piece.lstrip()
            if piece:
                pieces.append(piece)
                if on_text is not None:
                    on_text(piece)

        number = self._num_answers
        self._num_answers += 1
        start = time.monotonic()
        try:
            with (
                nullcontext((self.opened.model, self.opened.tokenizer))
                if tuned
                else self.opened.base_model() as (model, tokenizer),
                generation_memory_errors(),
            ):
                written = generate_texts(
                    model,
                    tokenizer,
                    Prompts(
                        [text],
                        sample_ids=[number],
                        add_special_tokens=not self.form.holds_turns,
                        end_of_turn_ids=self.form.find_turn_ends(tokenizer),
                    ),
                    self.decoding,
                    events=GenerationEvents(on_text=take),
                    prefix_cache=self._prefix_caches[tuned],
                    batch_size=1,
                )
        except KeyboardInterrupt:
            seconds = time.monotonic() - start
            return Reply("".join(pieces).strip(), "interrupted", None, seconds, num_left_out)
        return Reply(
            written.new_texts[0].strip(),
            written.finish_reasons[0],
            written.num_new_tokens,
            time.monotonic() - start,
            num_left_out,
        )

    def keep(self, question: str, reply: Reply) -> None:
        """Append a question and its answer to the messages."""
        self.messages.append({"role": "user", "content": question})
        self.messages.append({"role": "assistant", "content": reply.text})

    def reset(self) -> None:
        """Remove all messages but the system message."""
        self.messages.clear()
        self.clear_prefix_caches()

    def clear_prefix_caches(self) -> None:
        """Free the prefix caches; the next turn is read from its beginning."""
        self._prefix_caches.clear()

    def take_back(self) -> str | None:
        """Remove the last question with its answer and return it; None without one."""
        if not self.messages:
            return None
        question = str(self.messages[-2]["content"])
        del self.messages[-2:]
        return question

    def set_system(self, text: str | None) -> None:
        """Set the system message; None removes it.

        Raises:
            UserError: If the prompt format has no place for one, or rejects it.
        """
        if text is not None:
            check_text("system", text)
            self.form.write({"instruction": "question"}, text)
        self.system = text

    def set_value(self, key: str, text: str) -> None:
        """Change one setting of the answers to come.

        Args:
            key: temperature (0 is greedy), top_k, top_p, min_p, repetition_penalty,
                max_new_tokens or seed.

        Raises:
            UserError: If there is no such setting, or the value is out of range.
        """
        if key not in _SETTINGS:
            known = ", ".join(_SETTINGS)
            raise UserError(f"no setting {key!r}", key="/set", hint=f"there are {known}")
        kind = int if key in ("top_k", "max_new_tokens", "seed") else float
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise UserError(f"{text!r} is no {what}", key=f"/set {key}") from None
        values: dict[str, Any] = {key: value}
        if key == "max_new_tokens":
            self._check_length(int(value))
        elif key in _NARROWS and not self.decoding.do_sample:
            values["temperature"] = 1.0  # what narrows a draw asks for one
        self.decoding = replace(self.decoding, **values)

    def save(self, path: Path) -> None:
        """Write the conversation as one row of `messages`, which `wegeft train` reads.

        Raises:
            UserError: If there are no messages, or the file exists.
        """
        if not self.messages:
            raise UserError("nothing was said yet", key="/save")
        if path.exists():
            raise UserError("there is something already", file=str(path), hint="give another name")
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        row = {"messages": [*system, *self.messages]}
        write_text_atomic(path, json.dumps(row, ensure_ascii=False) + "\n")

    def _check_length(self, value: int) -> None:
        context = context_length(self.opened.model)
        if value < 1 or (context is not None and value >= context):
            raise UserError(
                f"{value} is out of range",
                key="max_new_tokens",
                hint="give 1 or more" + ("" if context is None else f", at most {context - 1}"),
            )

    def _fit(self, question: str) -> tuple[str, int]:
        """Render the prompt with as many of the last turns as fit into the context."""
        if not self.form.holds_turns:
            text = self.form.write({"instruction": question}, self.system)
            self._check_room(text)
            return text, 0
        context = context_length(self.opened.model)
        for first in range(0, len(self.messages) + 1, 2):
            asked = [*self.messages[first:], {"role": "user", "content": question}]
            text = self.form.write({"messages": asked}, self.system)
            if context is None or self._count(text) + self.max_new_tokens <= context:
                return text, first
        self._check_room(text)
        raise AssertionError("unreachable")

    def _check_room(self, text: str) -> None:
        context, length = context_length(self.opened.model), self._count(text)
        if context is not None and length + self.max_new_tokens > context:
            raise UserError(
                f"{length} tokens, and {self.max_new_tokens} for the answer, are more than the "
                f"model reads ({context})",
                hint="shorten the question or the system message, or lower max_new_tokens",
            )

    def _count(self, text: str) -> int:
        special = not self.form.holds_turns
        return len(self.opened.tokenizer(text, add_special_tokens=special)["input_ids"])


def open_conversation(
    target: str | Path | None = None,
    *,
    template: str | None = None,
    system: str | None = None,
    decoding: Decoding = GREEDY,
    max_new_tokens: int | None = None,
    base: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Conversation:
    """Load a model for a conversation.

    Args:
        target: An adapter, run or model folder, or a hub id. Default: the newest finished run.
        template: The prompt format. Default: that of the training.
        max_new_tokens: Longest answer, instead of the one in `decoding`. Default: 512, or half of a
            smaller context.

    Raises:
        UserError: If the target, the prompt format or a setting is at fault.
    """
    path = find_target(target)
    recipe = find_recipe_of(path)
    opened = LoadedModel.open(path, recipe, base=base, warn=warn)
    form = choose_form(template, path, recipe, opened.tokenizer)
    length = max_new_tokens or default_new_tokens(opened.model)
    decoding = replace(decoding, max_new_tokens=length)
    conversation = Conversation(opened, form, describe_target(opened, path, form), decoding)
    conversation._check_length(length)
    conversation.set_system(system)
    return conversation


def describe_decoding(conversation: Conversation) -> dict[str, Any]:
    """Return the settings of the next answer: {name: value}."""
    settings = conversation.decoding.settings()
    return {name: value for name, value in settings.items() if name != "num_beams"}
