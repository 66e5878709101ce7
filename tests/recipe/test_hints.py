"""Messages name the place of a typo and what to write instead."""

from __future__ import annotations

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.inference.prompt_files import read_questions
from wegeft_cli.recipe.load import load_recipe

BASE = "model: {name_or_path: m}\n"
DATA = "data: {train: [{path: a.jsonl}]}\n"


def read(tmp_path, text: str) -> dict[str | None, UserError]:
    """Return the faults of a recipe by key."""
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        load_recipe(file)
    except UserError as fault:
        return {fault.key: fault}
    except ExceptionGroup as group:
        return {fault.key: fault for fault in group.exceptions}
    return {}


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ('model:\n  name_or_path: "m\nadapter:\n  r: 4\n', "2:17", "close the quote"),
        ("model:\n  name_or_path: 'm\ndata:\n  cache_dir: 'c'\n", "2:17", "close the quote"),
        ("adapter:\n  r:4\n  alpha: 8\n", "2:3", "write `r: 4`"),
        ("adapter:\n  alpha: 8\n  r:4\ndata: {}\n", "3:3", "write `r: 4`"),
        ("data:\n  train:\n    - path:a\n      limit: 3\n", "3:7", "write `path: a`"),
    ],
)
def test_a_syntax_error_is_placed_at_the_typo(tmp_path, text, place, hint):
    (fault,) = read(tmp_path, text).values()
    assert fault.file == f"{tmp_path / 'r.yaml'}:{place}"
    assert fault.hint == hint


def test_a_quote_of_several_lines_is_no_error(tmp_path):
    text = 'model: {name_or_path: m}\nlogging:\n  sample_prompts: ["one\n    two"]\n' + DATA
    assert read(tmp_path, text) == {}


def test_a_section_without_a_space_after_a_colon(tmp_path):
    faults = read(tmp_path, BASE + "adapter:\n  r:4\n" + DATA)
    assert faults["adapter"].hint == "put a space after the colon: `r: 4`"


@pytest.mark.parametrize(
    ("line", "key", "hint"),
    [
        ("strict: true", "strict", "remove it"),
        ("stage: sft", "stage", "remove it"),
        ("eos_token: x", "eos_token", "write `model.special_tokens: {eos_token: ...}`"),
        ("max_samples: 4", "max_samples", "`data.train[0].limit`"),
        ("eval_strategy: steps", "eval_strategy", "`train.eval_strategy`"),
        ("system_prompt: Be brief.", "system_prompt", "`data.system`"),
        ("default_system: Be brief.", "default_system", "`data.system`"),
        ("tokenizer: {pad_token: x}", "tokenizer", "copy of the base"),
        ("model: {name_or_path: m, tokenizer: x}", "model.tokenizer", "copy of the base"),
        ("lora_model_dir: x", "lora_model_dir", "`adapter.init_from`"),
        ("model: {name: m}", "model.name", "`model.name_or_path`"),
        ("data: {train: [{path: a}, {file: b}]}", "data.train[1].file", "`data.train[1].path`"),
        ("data: {train: [{type: alpaca}]}", "data.train[0].type", "`data.train[0].format`"),
        ("data: {train: [{path: a, format: alpaca}]}", "data.train[0].format", "instruction"),
        ("data: {train: [{path: a, format: sharegpt}]}", "data.train[0].format", "conversations"),
        ("adapter: qlora", "adapter", "model.load_in_4bit: true"),
        ("train: {eval_strategy: no}", "train.eval_strategy", "remove it"),
        ("train: {save_strategy: no}", "train.save_strategy", "`train.save_steps: 0`"),
        ("train: {mixed_precision: no}", "train.mixed_precision", "write none"),
        ("adapter: {type: qlora}", "adapter.type", "model.load_in_4bit: true"),
    ],
)
def test_a_key_or_value_of_another_tool_has_its_hint(tmp_path, line, key, hint):
    parts = [line] + [part for part in (BASE, DATA) if part.split(":")[0] not in line]
    assert hint in (read(tmp_path, "\n".join(parts))[key].hint or "")


def test_a_key_of_another_section_needs_a_close_name(tmp_path):
    """`tokens_seen` and `strictness` are near no key: the valid ones are listed."""
    faults = read(tmp_path, BASE + DATA + "train: {strictness: 1}\n")
    assert "keys of `train`" in faults["train.strictness"].hint


def test_a_missing_recipe_names_the_files_nearby(tmp_path):
    (tmp_path / "mine.yaml").write_text(BASE)
    for name, hint in (("min.yaml", "mine.yaml"), ("quickstrt.yaml", "`quickstart`")):
        with pytest.raises(UserError) as raised:
            load_recipe(tmp_path / name)
        assert hint in raised.value.hint
    with pytest.raises(UserError) as raised:
        load_recipe(tmp_path / "other_name.yaml")
    assert "mine.yaml; `wegeft recipes copy" in raised.value.hint


def test_a_data_file_is_not_a_recipe(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="not valid YAML") as raised:
        load_recipe(tmp_path / "rows.jsonl")
    assert "`data.train`" in raised.value.hint


def test_a_file_without_a_question_names_the_columns_of_the_recipe(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"context": "Why?", "response": "Because."}\n')
    with pytest.raises(UserError, match="the row has context, response") as raised:
        read_questions([], file, None)
    assert "columns: {prompt: NAME}" in raised.value.hint


def test_questions_are_read_by_the_columns_of_the_recipe(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"title": "Why?", "body": "Because.", "reply": "x"}\n{"prompt": "Who?"}\n')
    columns = [{"instruction": "title", "input": "body", "output": "reply"}]
    first, second = read_questions([], file, None, columns)
    assert first.asked == {"instruction": "Why?", "input": "Because."}
    assert second.asked["instruction"] == "Who?"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("logging.run_name=hf_" + "a1" * 15, "logging.run_name"),
        ("logging.project=sk-" + "a1" * 15, "logging.project"),
        ("logging.sample_prompts=[one, my key is ghp_" + "a1" * 15 + "]", "sample_prompts[1]"),
        ("adapter.peft={note: AKIA" + "A1" * 8 + "}", "adapter.peft.note"),
        ("data.chat_template_kwargs={key: hf_" + "a1" * 15 + "}", "chat_template_kwargs.key"),
        ("train.optim_args={key: hf_" + "a1" * 15 + "}", "train.optim_args.key"),
        ("output_dir=runs/hf_" + "a1" * 15, "output_dir"),
    ],
)
def test_a_secret_in_an_override_is_announced(tmp_path, override, key):
    file = tmp_path / "r.yaml"
    file.write_text(BASE + DATA, encoding="utf-8")
    assert not load_recipe(file).notes
    overrides = [override] if "adapter.peft" not in override else ["adapter.type=lora", override]
    notes = " ".join(load_recipe(file, overrides).notes)
    assert f"{key} looks like a secret key" in notes
    assert "a1a1" not in notes
