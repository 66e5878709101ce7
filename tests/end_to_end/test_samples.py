"""Prompts answered while training: as the rows are written, one line each, none twice."""

import json

import pytest

from wegeft_cli.data.text.templates import TEMPLATES
from wegeft_cli.errors import UserError
from wegeft_cli.inference.prompt_format import build_prompts
from wegeft_cli.models.loading import load_tokenizer
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.runs.train import train

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PROMPTS = ["is 3 an even number?", "say {x}\n twice"]


def read_samples(run_dir):
    return [json.loads(x) for x in (run_dir / "samples.jsonl").read_text().splitlines()]


def test_answers_are_written_and_told(write_recipe, listener):
    recipe = write_recipe(
        data={"validation_fraction": 0.2},
        train={"eval_steps": 2},
        logging={"sample_prompts": PROMPTS},
        eval={"max_new_tokens": 5},
    )
    result = train(recipe, reporter=listener)
    samples = read_samples(result.run_dir)
    assert [(x["step"], x["prompt"]) for x in samples] == [(n, p) for n in (2, 4) for p in PROMPTS]
    assert all(isinstance(x["output"], str) for x in samples)
    assert any(x["output"] for x in samples)
    assert sum(PROMPTS[0] in note for note in listener.notes) == 2


def test_without_other_measures_there_is_no_validation_line(write_recipe, read_metrics, read_run):
    recipe = write_recipe(train={"eval_steps": 3}, logging={"sample_prompts": PROMPTS[:1]})
    run_dir = train(recipe, ["eval.max_new_tokens=3"]).run_dir
    assert [x["step"] for x in read_samples(run_dir)] == [3, 6]
    assert all("loss" in line for line in read_metrics(run_dir))
    assert read_run(run_dir)["validation"] == {}


def test_a_resumed_run_has_each_answer_once(write_recipe, stop_after):
    settings = {
        "train": {"eval_steps": 1, "save_steps": 2},
        "logging": {"sample_prompts": PROMPTS},
        "eval": {"max_new_tokens": 3},
    }
    whole = train(write_recipe("whole", **settings)).run_dir
    recipe = write_recipe("parts", **settings)
    run_dir = train(recipe, should_stop=stop_after(3)).run_dir
    # Back to an earlier checkpoint: the answers of step 3 are given again.
    (run_dir / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    train(recipe, resume="auto")
    assert read_samples(run_dir) == read_samples(whole)


def test_a_stop_between_two_batches_of_answers(write_recipe, stop_after, read_run):
    settings = {
        "train": {"eval_steps": 2},
        "logging": {"sample_prompts": PROMPTS},
        "eval": {"max_new_tokens": 3, "batch_size": 1},
    }
    whole = train(write_recipe("whole", **settings)).run_dir
    recipe = write_recipe("parts", **settings)
    stopped = train(recipe, should_stop=stop_after(3))  # after two steps
    assert (stopped.status, stopped.num_steps) == ("interrupted", 2)
    assert not (stopped.run_dir / "samples.jsonl").exists()
    train(recipe, resume="auto")
    assert read_samples(stopped.run_dir) == read_samples(whole)
    assert len(read_samples(whole)) == 6


@pytest.mark.parametrize("template", ["alpaca", "question_answer", "plain"])
def test_a_prompt_is_written_as_a_rows_instruction(write_recipe, llama_dir, template):
    rows = [{"instruction": "a", "output": "b"}]
    path = write_recipe(rows=rows, data={"template": template}, logging={"sample_prompts": PROMPTS})
    recipe = load_recipe(path).recipe
    built = build_prompts(recipe, load_tokenizer(str(llama_dir)), path.parent, "alpaca")
    head, _, tail = TEMPLATES[template].prompt.partition("{instruction}")
    assert built.texts == [f"{head}{prompt}{tail}" for prompt in PROMPTS]
    assert built.add_special_tokens


def test_auto_takes_the_rows_own_form(write_recipe, llama_dir):
    path = write_recipe(logging={"sample_prompts": PROMPTS})
    recipe = load_recipe(path).recipe
    built = build_prompts(recipe, load_tokenizer(str(llama_dir)), path.parent, "plain, alpaca")
    assert built.texts == PROMPTS


def test_a_chat_template_asks_as_a_user_and_adds_no_second_bos(write_recipe, llama_dir):
    path = write_recipe(data={"template": "chat.jinja"}, logging={"sample_prompts": PROMPTS[:1]})
    (path.parent / "chat.jinja").write_text(CHAT)
    tokenizer = load_tokenizer(str(llama_dir))
    built = build_prompts(load_recipe(path).recipe, tokenizer, path.parent, "chat.jinja")
    assert built.texts == ["<s>[user] is 3 an even number?\n[assistant] "]
    ids = tokenizer(built.texts, add_special_tokens=built.add_special_tokens)["input_ids"][0]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_prompt_that_the_template_refuses_is_told_before_the_run(write_recipe, tmp_path):
    path = write_recipe(
        rows=[{"messages": [{"role": "system", "content": "be kind"},
                            {"role": "user", "content": "a"},
                            {"role": "assistant", "content": "b"}]}],
        data={"template": "chat.jinja"},
        logging={"sample_prompts": ["a"]},
    )  # fmt: skip
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (path.parent / "chat.jinja").write_text(strict + CHAT)
    with pytest.raises(UserError, match="refuses") as caught:
        train(path)
    assert caught.value.key == "logging.sample_prompts[0]"
    assert not (tmp_path / "runs").exists()
