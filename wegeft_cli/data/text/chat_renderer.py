"""`ChatRenderer`: renders conversations with one chat template and fixed arguments."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wegeft_cli.data.text.template_settings import TemplateSettings
from wegeft_cli.errors import UserError
from wegeft_cli.storage.json_files import shorten
from wegeft_cli.time_limit import time_limit

_RENDER_SECONDS = 10.0
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "probe_key"
_PROBE_CALL = "probe_call"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE_CALL,
        "description": "probe",
        "parameters": {"type": "object", "properties": {_PROBE: {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class ToolForm:
    """How a chat template takes tool calls, found by rendering a probe.

    Args:
        shows_calls: Whether it writes the calls of the assistant.
        shows_tools: Whether it writes the definitions of the tools.
        takes_objects: Whether it writes arguments that are an object as JSON or in its own form.
        takes_text: Whether it writes arguments that are JSON text unchanged.
        drops_blank: Whether it writes calls only in a message without `content`.
    """

    shows_calls: bool
    shows_tools: bool
    takes_objects: bool
    takes_text: bool
    drops_blank: bool = False


class ChatRenderer:
    """Renders conversations in transformers' sandboxed Jinja.

    Args:
        tokenizer: The tokenizer, whose special tokens the template can write.
        text: Jinja text; None selects the tokenizer's own template.
        settings: Name, arguments, and what happens to a system turn.
    """

    def __init__(self, tokenizer: Any, text: str | None, settings: TemplateSettings) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._settings = settings
        self._find_tool_form = functools.lru_cache(maxsize=8)(self._probe_tool_form)
        self._endless = UserError(
            f"the chat template takes more than {_RENDER_SECONDS:.0f} seconds for one conversation",
            file=settings.name if text is not None else getattr(tokenizer, "name_or_path", None),
            key="data.template",
            hint="its loops hardly end: use another tokenizer, or your own Jinja file",
        )
        self.converted_arguments: set[str] = set()
        """Forms, `object` or `text`, into which tool-call arguments were converted."""

    def __call__(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation; raise UserError if the template refuses it.

        `arguments` replace those of the settings.
        """
        template = self._choose_template(tools)
        return self._render(
            template, self._prepare(messages, template, tools), add_generation_prompt, tools,
            arguments,
        )  # fmt: skip

    def find_marks(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[tuple[int, int]] | None:
        """Return the characters in `{% generation %}` blocks; None for a template without these."""
        template = self._choose_template(tools)
        if not _MARKS.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        prepared = self._prepare(messages, template, tools)
        with time_limit(_RENDER_SECONDS, self._endless):
            _, marks = render_jinja_template(
                conversations=[[_without_null(message) for message in prepared]],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{
                    **self._tokenizer.special_tokens_map,
                    **self._settings.arguments,
                    **(arguments or {}),
                },
            )
        return [(start, stop) for start, stop in marks[0]]

    def tool_form(self, tools: Sequence[Any] | None) -> ToolForm:
        """Return how the template for these tools takes tool calls."""
        return self._find_tool_form(self._choose_template(tools))

    def _choose_template(self, tools: Sequence[Any] | None) -> str:
        try:
            return str(self._tokenizer.get_chat_template(self._text, tools))
        except ValueError as error:
            names = ", ".join(sorted(self._tokenizer.chat_template))
            raise UserError(
                f"of the tokenizer's chat templates ({names}) none is for a conversation "
                f"{'with' if tools else 'without'} tools: there is no `default`",
                key="data.template",
                hint="write one as data.template: my.jinja",
            ) from error

    def _render(
        self,
        template: str,
        messages: Sequence[Any],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        import jinja2

        try:
            with time_limit(_RENDER_SECONDS, self._endless):
                rendered: str = self._tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=template,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **{**self._settings.arguments, **(arguments or {})},
                )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not Jinja: {error.message}",
                file=f"{self._settings.name}:{error.lineno}",
                key="data.template",
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            # What a template finds wrong with a conversation, or stumbles over.
            raise UserError(
                f"the chat template refuses the conversation: {error}",
                hint=self._find_hint(template, messages, tools, arguments),
            ) from error
        return rendered

    def _find_hint(
        self,
        template: str,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        arguments: Mapping[str, Any] | None,
    ) -> str | None:
        """Return the setting with which the template takes the conversation, if there is one."""
        merged = merge_system_turn(messages)
        if merged == list(messages):
            return None
        try:
            self._render(template, merged, False, tools, arguments)
        except UserError:
            return None
        return "set data.system_turn: merge, which writes the system turn into the first user turn"

    def _prepare(
        self, messages: Sequence[Any], template: str, tools: Sequence[Any] | None
    ) -> list[Any]:
        """Return the messages in the form that the template takes."""
        prepared = list(messages)
        if self._settings.system is not None and prepared[0].get("role") != "system":
            prepared.insert(0, {"role": "system", "content": self._settings.system})
        if self._settings.system_turn == "merge":
            prepared = merge_system_turn(prepared)
        if not any(message.get("tool_calls") for message in prepared):
            return prepared
        form = self._find_tool_form(template)
        return [self._prepare_calls(message, form) for message in prepared]

    def _prepare_calls(self, message: Mapping[str, Any], form: ToolForm) -> Mapping[str, Any]:
        calls = message.get("tool_calls")
        if not isinstance(calls, list) or not form.shows_calls:
            return message
        changed = {**message, "tool_calls": [self._prepare_call(call, form) for call in calls]}
        if form.drops_blank and not (message.get("content") or "").strip():
            changed["content"] = None
        return changed

    def _prepare_call(self, call: Any, form: ToolForm) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._prepare_call(call["function"], form)}
        arguments = call.get("arguments")
        if isinstance(arguments, str) and not form.takes_text and form.takes_objects:
            self.converted_arguments.add("object")
            return {**call, "arguments": _parse_arguments(arguments)}
        if isinstance(arguments, Mapping) and not form.takes_objects and form.takes_text:
            self.converted_arguments.add("text")
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return call

    def _probe_tool_form(self, template: str) -> ToolForm:
        for content in ("", None):
            texts = {
                kind: self._render_probe(template, content, arguments)
                for kind, arguments in (
                    ("object", {_PROBE: "value"}),
                    ("text", json.dumps({_PROBE: "value"})),
                )
            }
            takes_objects = _PROBE in texts["object"] and f"'{_PROBE}'" not in texts["object"]
            takes_text = f'{{"{_PROBE}": "value"}}' in texts["text"]
            shows_calls = any(_PROBE_CALL in text for text in texts.values())
            if shows_calls:
                return ToolForm(
                    True, self._shows_tools(template), takes_objects, takes_text, content is None
                )
        return ToolForm(False, self._shows_tools(template), False, False)

    def _render_probe(self, template: str, content: str | None, arguments: Any) -> str:
        call = {
            "type": "function",
            "id": "abcdefghi",
            "function": {"name": _PROBE_CALL, "arguments": arguments},
        }
        messages = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
        ]
        return self._try_probe(template, messages, None)

    def _shows_tools(self, template: str) -> bool:
        messages = [{"role": "user", "content": "question"}]
        return _PROBE_CALL in self._try_probe(template, messages, [_PROBE_TOOL])

    def _try_probe(
        self, template: str, messages: Sequence[Any], tools: Sequence[Any] | None
    ) -> str:
        try:
            return self._render(template, messages, False, tools)
        except UserError as fault:
            if fault is self._endless:
                raise
            return ""


def merge_system_turn(messages: Sequence[Any]) -> list[Any]:
    """Write the text of a leading system turn before that of the first user turn."""
    first, *others = messages
    if first.get("role") != "system":
        return [first, *others]
    for number, message in enumerate(others):
        if message.get("role") == "user":
            content = f"{first['content']}\n\n{message['content']}"
            return [*others[:number], {**message, "content": content}, *others[number + 1 :]]
    return [first, *others]


def _without_null(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _parse_arguments(text: str) -> Any:
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"`tool_calls`: the arguments {shorten(text)} are not JSON: {error}"
        ) from error
    if not isinstance(arguments, dict):
        raise UserError(f"`tool_calls`: the arguments must be a JSON object, got {shorten(text)}")
    return arguments
