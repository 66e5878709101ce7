"""Public functions take one text for a list and a text for a path, and refuse anything else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import wegeft_cli
from wegeft_cli.errors import UserError
from wegeft_cli.public_arguments import checked_arguments


@checked_arguments
def _call(
    prompts: Sequence[str] = (),
    runs: Sequence[str | Path] = (),
    *,
    output: Path | None = None,
    target: str | Path | None = None,
) -> tuple[object, ...]:
    return prompts, runs, output, target


def test_one_text_is_a_list_and_a_text_is_a_path():
    assert _call("hi", "runs/a", output="out.json", target="run") == (
        ["hi"], ["runs/a"], Path("out.json"), "run",
    )  # fmt: skip
    assert _call(["a", "b"], [Path("x"), "y"]) == (["a", "b"], [Path("x"), "y"], None, None)
    assert _call(iter("ab"), Path("x")) == (["a", "b"], [Path("x")], None, None)
    assert _call() == ((), (), None, None)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"prompts": [1]}, "prompts"),
        ({"prompts": {"a": 1}}, "prompts"),
        ({"prompts": None}, "prompts"),
        ({"runs": 3}, "runs"),
        ({"output": 3}, "output"),
    ],
)
def test_other_values_are_refused_by_name(options, name):
    with pytest.raises(UserError) as caught:
        _call(**options)
    assert caught.value.key == name


def test_public_functions_coerce_their_arguments(write_recipe):
    recipe = write_recipe()
    assert wegeft_cli.train(recipe, "train.max_steps=3", dry_run=True).num_steps == 3
    assert wegeft_cli.plan(recipe, "train.max_steps=2").num_steps == 2
    with pytest.raises(UserError, match="takes a list of texts") as caught:
        wegeft_cli.train(recipe, {"train.max_steps": 3})  # type: ignore[arg-type]
    assert "train.max_steps=3" in (caught.value.hint or "")


@pytest.mark.slow
def test_one_prompt_is_one_answer(write_recipe, tmp_path):
    run_dir = wegeft_cli.train(write_recipe()).run_dir
    output = tmp_path / "answers.jsonl"
    result = wegeft_cli.generate(run_dir, prompts="hi", max_new_tokens=2, output=str(output))
    assert len(result["results"]) == 1
    assert len(output.read_text().splitlines()) == 1
