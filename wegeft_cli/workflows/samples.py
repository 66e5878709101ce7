"""Prompts that the model answers while it learns: `logging.sample_prompts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.chat import build_template, find_turn_ends
from wegeft_cli.data.templates import AUTO, TEMPLATES
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.generate import generate_texts
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.training.rounds import is_sharded

_MAX_NEW_TOKENS = 128
"""Longest answer where `eval.max_new_tokens` does not say."""


@dataclass(frozen=True)
class SamplePrompts:
    """What is asked, and how.

    Args:
        prompts: As in the recipe.
        texts: As the model reads them.
        add_special_tokens: Whether the tokenizer adds its own: a chat template writes them itself.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts at a time.
        turn_ends: Tokens that end a turn in the chat template.
    """

    prompts: list[str]
    texts: list[str]
    add_special_tokens: bool
    max_new_tokens: int
    batch_size: int
    turn_ends: Sequence[int] = ()


def build_prompts(
    recipe: Recipe, tokenizer: Any, recipe_dir: Path, data_templates: str
) -> SamplePrompts | None:
    """Write the recipe's prompts as the training rows are written.

    Args:
        recipe: The recipe.
        tokenizer: Renders conversations.
        recipe_dir: Folder of the recipe, for a template's path.
        data_templates: Templates that the training rows took, with commas between them; the first
            one holds where the recipe says `auto`.

    Returns:
        The prompts; None where there are none.

    Raises:
        UserError: If the template cannot be read, or refuses a prompt.
    """
    prompts = recipe.logging.sample_prompts
    if not prompts:
        return None
    name = recipe.data.template
    if name == AUTO:
        name = data_templates.split(", ")[0]
    template = build_template(name, tokenizer, recipe_dir)
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
        turn_ends=find_turn_ends(template, tokenizer),
    )


def answer_prompts(
    model: Any,
    tokenizer: Any,
    asked: SamplePrompts,
    *,
    is_main: bool,
    check_stop: Callable[[], None],
) -> list[tuple[str, str]]:
    """Let the model answer, greedily, in the first process; the others wait for it.

    Where the base is shared they answer too, since each pass is all processes'.

    Args:
        model: The model on its device.
        tokenizer: Its tokenizer.
        asked: The prompts.
        is_main: Whether this is the first process.
        check_stop: Called between two batches, on all processes at the same place.

    Returns:
        (prompt as in the recipe, answer) of each; nothing in the other processes.
    """
    answers: list[str] = []
    shares_base = is_sharded(model)
    for start in range(0, len(asked.texts), asked.batch_size):
        if start:
            check_stop()
        if is_main or shares_base:
            answers += generate_texts(
                model,
                tokenizer,
                asked.texts[start : start + asked.batch_size],
                max_new_tokens=asked.max_new_tokens,
                batch_size=asked.batch_size,
                add_special_tokens=asked.add_special_tokens,
                turn_ends=asked.turn_ends,
            ).new_texts
    return list(zip(asked.prompts, answers, strict=True)) if is_main else []
