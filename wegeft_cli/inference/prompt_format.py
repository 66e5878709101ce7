"""Prompt formats: as in training, the chat template, or plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.messages import (
    check_text,
    read_arguments,
    read_conversation,
    read_tools,
)
from wegeft_cli.data.text.chat_rendering import Message
from wegeft_cli.data.text.chat_template import Template, build_template, find_turn_ends
from wegeft_cli.data.text.template_settings import AUTO, CHAT, TemplateSettings, read_settings
from wegeft_cli.data.text.templates import TEMPLATES, PairTemplate, fill_turns
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.storage.json_files import shorten

_ASKS = ("prompt", "instruction", "question", "text")
_TALKS = ("messages", "conversations")


@dataclass(frozen=True)
class PromptForm:
    """A template that renders what comes before the answer.

    Args:
        template: The template of the rows.
        why: Why it was chosen: the run, the tokenizer, the option.
    """

    template: Template
    why: str

    @property
    def name(self) -> str:
        """The template's name."""
        return self.template.name

    @property
    def holds_turns(self) -> bool:
        """Whether it renders conversations; else each question alone."""
        return self.template.apply is not None

    @classmethod
    def of_model(cls, model: Any) -> PromptForm:
        """Return the form of a loaded model: that of its training, else its chat template."""
        settings, tokenizer = model.chat_settings, model.tokenizer
        why = "the model's"
        if settings == TemplateSettings(CHAT) and not tokenizer.chat_template:
            settings, why = TemplateSettings("plain"), "there is no chat template"
        return cls(build_template(settings, tokenizer, None), why)

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> PromptForm:
        """Return the tokenizer's chat template, else the plain text."""
        if tokenizer.chat_template:
            settings, why = TemplateSettings(CHAT), "the tokenizer's"
        else:
            settings, why = TemplateSettings("plain"), "there is no chat template"
        return cls(build_template(settings, tokenizer, None), why)

    def write(self, question: Mapping[str, Any], system: str | None = None) -> str:
        """Render a question up to the answer.

        Raises:
            UserError: If the template has no place for a part of it, or rejects it.
        """
        apply = self.template.apply
        if apply is None:
            return self._fill(question, system)
        messages = list(question.get("messages") or [_as_message(question)])
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        tools, arguments = question.get("tools"), question.get("chat_template_kwargs")
        return apply(messages, True, tools=tools or None, arguments=arguments)

    def find_turn_ends(self, tokenizer: Any) -> list[int]:
        """Return the tokens that end a turn; none without conversations."""
        return find_turn_ends(self.template, tokenizer)

    def _fill(self, question: Mapping[str, Any], system: str | None) -> str:
        what = "a conversation" if "messages" in question else "a system prompt"
        if "messages" in question or system is not None:
            raise UserError(
                f"the prompt form {self.name!r} has no place for {what}",
                key="--template",
                hint=f"give --template {CHAT}, if the model knows one",
            )
        pair = TEMPLATES[self.name]
        assert isinstance(pair, PairTemplate)
        extra = question.get("input") or ""
        form = pair.prompt
        if extra.strip():
            if pair.prompt_with_input is None:
                raise UserError(
                    f"the prompt form {self.name!r} has no place for `input`, got {shorten(extra)}",
                    key="--template",
                    hint="give --template alpaca, or leave `input` empty",
                )
            form = pair.prompt_with_input
        return form.format(instruction=question["instruction"], input=extra)


def read_question(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the question of a row without its answer.

    Raises:
        UserError: If there is no question, or a field is no text.
    """
    talks = [name for name in (*_TALKS, "prompt") if isinstance(row.get(name), list)]
    if talks:
        messages = read_conversation(talks[0], row[talks[0]])["messages"]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise UserError(f"`{talks[0]}` asks nothing: it holds an answer alone")
        question: dict[str, Any] = {"messages": messages}
        if row.get("tools") and (tools := read_tools("tools", row["tools"])):
            question["tools"] = tools
        if row.get("chat_template_kwargs"):
            column = "chat_template_kwargs"
            question[column] = read_arguments(column, row[column])
        return question
    name = next((name for name in _ASKS if row.get(name) is not None), None)
    if name is None:
        raise UserError(
            f"no `messages`, `prompt`, `instruction`, `question` or `text`; the row has "
            f"{', '.join(map(str, row)) or 'no fields'}",
            hint="rename the column; those that the run's recipe renames (`columns: {prompt: NAME}`"
            " of an entry of data.train) are renamed here too",
        )
    extra = row.get("input") if name == "instruction" else None
    return {
        "instruction": check_text(name, row[name]),
        "input": "" if extra is None else check_text("input", extra),
    }


def question_text(question: Mapping[str, Any]) -> str:
    """Return the instruction or the last message of a question, to display."""
    messages: Sequence[Message] = question.get("messages", ())
    return str(messages[-1]["content"] if messages else question["instruction"])


def _as_message(question: Mapping[str, Any]) -> Message:
    extra = question.get("input") or ""
    text = question["instruction"]
    return {"role": "user", "content": f"{text}\n\n{extra}" if extra.strip() else text}


@dataclass(frozen=True)
class RenderedPrompts:
    """Prompts as the model reads them.

    Args:
        texts: The texts by number.
        template_hash: Hash of the template.
        add_special_tokens: Whether the tokenizer adds its special tokens; a chat template's text
            contains them.
        end_of_turn_ids: Tokens that end the model's turn in the chat template.
    """

    texts: Mapping[int, str]
    template_hash: str
    add_special_tokens: bool = True
    end_of_turn_ids: Sequence[int] = ()


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render_chat_prompts(
    tokenizer: Any,
    conversations: Mapping[int, Sequence[Mapping[str, str]]],
    *,
    protocol: str,
    other: str,
    settings: TemplateSettings | None = None,
) -> RenderedPrompts:
    """Render conversations in a prompt form, by default the chat template, up to the answer.

    Raises:
        UserError: If there is no chat template, or the form rejects a conversation.
    """
    try:
        chat = build_template(settings or TemplateSettings(CHAT), tokenizer, None)
    except UserError as fault:
        raise UserError(
            fault.message,
            key="protocol",
            hint=f"`{protocol}` uses the model's own chat template: use an instruction-tuned "
            f"model, or the protocol `{other}`",
        ) from fault
    apply = chat.apply
    if apply is None:
        pair, eos = TEMPLATES[chat.name], tokenizer.eos_token or ""
        assert pair is not None
        texts = {number: fill_turns(pair, turns, eos) for number, turns in conversations.items()}
        return RenderedPrompts(texts, chat.digest)
    texts = {
        number: apply([dict(turn) for turn in turns], True)
        for number, turns in conversations.items()
    }
    return RenderedPrompts(texts, chat.digest, False, find_turn_ends(chat, tokenizer))


def render_user_prompts(
    tokenizer: Any,
    texts: Mapping[int, str],
    *,
    protocol: str,
    other: str,
    settings: TemplateSettings | None = None,
) -> RenderedPrompts:
    """Render single user messages; see `render_chat_prompts`."""
    conversations = {n: [{"role": "user", "content": text}] for n, text in texts.items()}
    return render_chat_prompts(
        tokenizer, conversations, protocol=protocol, other=other, settings=settings
    )


_MAX_NEW_TOKENS = 128
"""Longest answer without `eval.max_new_tokens`."""


@dataclass(frozen=True)
class SamplePrompts:
    """The prompts of `logging.sample_prompts`, and how to continue them.

    Args:
        prompts: As in the recipe.
        texts: As the model reads them.
        add_special_tokens: Whether the tokenizer adds its special tokens.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts at a time.
        end_of_turn_ids: Tokens that end a turn in the chat template.
    """

    prompts: list[str]
    texts: list[str]
    add_special_tokens: bool
    max_new_tokens: int
    batch_size: int
    end_of_turn_ids: Sequence[int] = ()


def build_prompts(
    recipe: Recipe, tokenizer: Any, recipe_dir: Path, data_templates: str
) -> SamplePrompts | None:
    """Render the recipe's sample prompts like the training rows; None if there are none.

    Raises:
        UserError: If the template cannot be read, or rejects a prompt.
    """
    prompts = recipe.logging.sample_prompts
    if not prompts:
        return None
    name = recipe.data.template
    if name == AUTO:
        name = data_templates.split(", ")[0]
    template = build_template(read_settings(recipe.data, name), tokenizer, recipe_dir)
    pair = TEMPLATES.get(name)
    texts = []
    for position, prompt in enumerate(prompts):
        if template.apply is not None:
            message = {"role": "user", "content": prompt}
            try:
                texts.append(template.apply([message], True))
            except UserError as fault:
                fault.key = f"logging.sample_prompts[{position}]"
                raise
        else:
            assert pair is not None
            texts.append(pair.prompt.format(instruction=prompt, input=""))
    return SamplePrompts(
        list(prompts),
        texts,
        add_special_tokens=template.apply is None,
        max_new_tokens=recipe.eval.max_new_tokens or _MAX_NEW_TOKENS,
        batch_size=recipe.eval.batch_size,
        end_of_turn_ids=find_turn_ends(template, tokenizer),
    )
