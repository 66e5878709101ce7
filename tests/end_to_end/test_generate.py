"""`generate` and conversations as functions: forms, files, bases, contexts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.evaluation.text.loading import find_test_set, load_questions
from wegeft_cli.evaluation.text.scoring import read_samples
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import Prompts, generate_texts
from wegeft_cli.inference.chat import Reply, open_conversation
from wegeft_cli.inference.generate import generate
from wegeft_cli.merging.merge import merge
from wegeft_cli.runs.train import train

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DRAWN = Decoding(1, temperature=1.2, seed=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_recipe_in) -> Path:
    """A finished run with factors far from zero. Only to be read."""
    folder = tmp_path_factory.mktemp("asked")
    recipe = write_recipe_in(
        folder, data={"template": "question_answer"}, train={"learning_rate": 0.1}
    )
    train(recipe)
    return folder / "runs" / "tiny"


@pytest.fixture
def chat_template(tmp_path) -> str:
    path = tmp_path / "mine.jinja"
    path.write_text(TEMPLATE)
    return str(path)


def ask_plain(model_dir: Path, texts: list[str], num: int, special: bool = True) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return generate_texts(
        model, tokenizer, Prompts(texts, add_special_tokens=special), Decoding(num), batch_size=1
    ).new_texts


def test_a_run_is_asked_as_it_was_trained_and_its_base_beside_it(trained, llama_dir, tmp_path):
    result = generate(trained, prompts=["2 + 2?", "who"], max_new_tokens=9, compare_base=True)
    assert result["template"] == "question_answer"
    rows = result["results"]
    assert [row["text"] for row in rows] == ["Question: 2 + 2?\nAnswer:", "Question: who\nAnswer:"]
    merged = merge(trained, output=tmp_path / "merged").output_dir
    texts = [row["text"] for row in rows]
    assert [row["output"] for row in rows] == ask_plain(merged, texts, 9)
    assert [row["base_output"] for row in rows] == ask_plain(llama_dir, texts, 9)
    assert rows[0]["output"] != rows[0]["base_output"]
    # The merged folder alone is asked plainly, and finds its base by itself.
    again = generate(merged, prompts=texts, template="plain", max_new_tokens=9, compare_base=True)
    for name in ("output", "base_output"):
        assert [row[name] for row in again["results"]] == [row[name] for row in rows]


def test_auto_takes_what_the_rows_of_the_run_took(tmp_path, write_recipe, adapters_rows):
    run = Path(
        train(
            write_recipe(rows=adapters_rows, data={"max_length": 200}, train={"max_steps": 1})
        ).run_dir
    )
    told = generate(run, prompts=["x"], max_new_tokens=1)
    assert told["template"] == "alpaca"
    assert told["results"][0]["text"].endswith("### Instruction:\nx\n\n### Response:\n")
    assert (
        generate(run, prompts=["x"], template="plain", max_new_tokens=1)["results"][0]["text"]
        == "x"
    )


def test_rows_of_every_kind_become_prompts_and_samples_that_eval_reads(
    llama_dir, tmp_path, chat_template
):
    rows = [
        {"id": "q1", "instruction": "add", "input": "1 2", "output": "gold"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "gold"}]},
        {"prompt": "a prompt", "completion": "gold"},
        {"conversations": [{"from": "human", "value": "ho"}, {"from": "gpt", "value": "gold"}]},
        {"question": "why?", "answer": "gold"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out" / "answers.jsonl"
    result = generate(
        llama_dir, file=path, template=chat_template, system="short", output=output,
        max_new_tokens=4, batch_size=3,
    )  # fmt: skip
    texts = [row["text"] for row in result["results"]]
    asked = ["add\n\n1 2", "hi", "a prompt", "ho", "why?"]
    assert texts == [f"<system>short</s><user>{said}</s><assistant>" for said in asked]
    assert [row["output"] for row in result["results"]] == ask_plain(llama_dir, texts, 4, False)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == result["results"]
    assert lines[0]["id"] == "q1"
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(
        json.dumps(
            [
                {"instruction": row.get("instruction", "x"), "answer": "true", "output": ""}
                for row in rows
            ]
        )
    )
    data = load_questions(find_test_set("boolq"), data_dir=tmp_path, limit=None)
    samples = read_samples(output, data)
    assert samples == {row["index"]: row["output"] for row in lines}
    first = generate(
        llama_dir, file=path, template=chat_template, limit=2, system="short", max_new_tokens=4
    )
    assert first["results"] == lines[:2]


def test_samples_are_drawn_apart_and_again(llama_dir):
    told = generate(llama_dir, prompts=["a", "b"], decoding=DRAWN, num_samples=3, max_new_tokens=8)
    rows = told["results"]
    assert [(row["index"], row["sample"]) for row in rows] == [
        (index, sample) for index in range(2) for sample in range(3)
    ]
    assert len({row["output"] for row in rows}) == 6
    again = generate(
        llama_dir, prompts=["a", "b"], decoding=DRAWN, num_samples=2, max_new_tokens=8,
        batch_size=1,
    )  # fmt: skip
    kept = [row["output"] for row in rows if row["sample"] < 2]
    assert [row["output"] for row in again["results"]] == kept


def test_one_seed_gives_one_answer_by_eval_generate_and_chat(llama_dir, tmp_path):
    """LoRA-GA's GSM8K is drawn: what eval logs, the other two write from the same prompts."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [{"question": f"{n} + {n}?", "answer": f"so #### {2 * n}"} for n in range(3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = Decoding(1, temperature=0.8, top_p=0.95, seed=9)
    scored = evaluate(
        llama_dir, tasks=["gsm8k"], protocol="lora_ga", data_dir=tmp_path, max_new_tokens=20,
        options={"seed": 9}, output=tmp_path / "out.json",
    )  # fmt: skip
    samples = [json.loads(line) for line in Path(scored["samples_path"]).read_text().splitlines()]
    outputs = [sample["output"] for sample in samples]
    assert len(set(outputs)) == 3
    prompts = [sample["prompt"] for sample in samples]
    told = generate(
        llama_dir, prompts=prompts, template="plain", decoding=drawn, max_new_tokens=20,
        num_samples=2, batch_size=3,
    )  # fmt: skip
    assert [row["output"] for row in told["results"] if row["sample"] == 0] == outputs
    talk = open_conversation(llama_dir, template="plain", decoding=drawn, max_new_tokens=20)
    assert [talk.ask(prompt).text for prompt in prompts] == [text.strip() for text in outputs]


def test_a_plain_base_is_not_called_tuned(trained, llama_dir):
    for target, expected in ((llama_dir, "model"), (trained, "tuned")):
        told: list[tuple[str, str]] = []
        generate(
            target, prompts=["a"], max_new_tokens=2, on_text=lambda *words, t=told: t.append(words)
        )
        assert {who for who, _ in told} == {expected}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, "nothing is asked"),
        ({"prompts": ["a"], "file": "x.jsonl"}, "at the same time"),
        ({"file": "missing.jsonl"}, "no such file"),
        ({"file": "missing.txt"}, "no such file"),
        ({"prompts": ["a"], "num_samples": 2}, "all the same"),
        ({"prompts": ["a"], "template": "alpacca"}, "alpacca"),
        ({"prompts": ["a"], "template": "chat"}, "no chat template"),
        ({"prompts": ["a"], "system": "s"}, "no place for a system prompt"),
        ({"prompts": ["a\ud800"]}, "surrogate"),
        ({"prompts": ["a"], "max_new_tokens": 256}, "no room"),
        ({"prompts": ["a"], "output": "."}, "folder"),
    ],
)
def test_what_cannot_be_asked(llama_dir, monkeypatch, tmp_path, options, part):
    monkeypatch.chdir(tmp_path)
    options = {k: Path(v) if k == "output" else v for k, v in options.items()}
    with pytest.raises(UserError) as caught:
        generate(llama_dir, **options)
    assert part in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_bad_rows_are_told_with_their_lines(llama_dir, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"completion": "b"}\n{"prompt": 3}\n')
    with pytest.raises(ExceptionGroup) as caught:
        generate(llama_dir, file=path)
    assert [fault.file for fault in caught.value.exceptions] == [f"{path}:2", f"{path}:3"]


def test_somebodys_file_is_not_overwritten_and_a_long_prompt_is_told(llama_dir, tmp_path, listener):
    output = tmp_path / "mine.jsonl"
    output.write_text("mine\n")
    with pytest.raises(UserError, match="nothing else is overwritten"):
        generate(llama_dir, prompts=["a"], output=output)
    assert output.read_text() == "mine\n"
    told = generate(llama_dir, prompts=["x" * 400, "a"], max_new_tokens=2, reporter=listener)
    assert [row["truncated"] for row in told["results"]] == [True, False]
    assert "1 of 2 prompts" in listener.warnings[-1]


# --- conversations


def test_turns_follow_each_other_and_the_adapter_can_be_off(trained, llama_dir, chat_template):
    talk = open_conversation(trained, template=chat_template, system="be", max_new_tokens=8)
    pieces: list[str] = []
    first = talk.ask("one", on_text=pieces.append)
    assert "".join(pieces).strip() == first.text
    base = talk.ask("one", tuned=False)
    text = "<system>be</s><user>one</s><assistant>"
    assert [base.text] == [t.strip() for t in ask_plain(llama_dir, [text], 8, False)]
    assert first.text != base.text
    talk.keep("one", first)
    second = talk.ask("two", tuned=False)
    text += f"{first.text}</s><user>two</s><assistant>"
    assert [second.text] == [t.strip() for t in ask_plain(llama_dir, [text], 8, False)]
    assert talk.take_back() == "one"
    assert talk.ask("one").text == first.text


@pytest.mark.parametrize("kind", ["wegeft", "lora"])
def test_each_turn_goes_on_behind_what_was_read_with_the_adapter_on_and_off(
    tmp_path, write_recipe, chat_template, kind
):
    settings = ["train.learning_rate=0.1", f"adapter.type={kind}"]
    trained = train(write_recipe(data={"template": "question_answer"}), settings).run_dir
    kept = open_conversation(trained, template=chat_template, system="be", max_new_tokens=8)
    fresh = open_conversation(trained, template=chat_template, system="be", max_new_tokens=8)
    seen: list[int] = []
    kept.opened.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    asked: dict[str, list[int]] = {"kept": [], "all": []}
    for number, tuned in enumerate([True, True, False, True, False, False]):
        fresh.clear_prefix_caches()
        seen.clear()
        question = f"question {number}"
        reply = kept.ask(question, tuned=tuned)
        assert reply.text == fresh.ask(question, tuned=tuned).text
        asked["kept"].append(seen[0])
        asked["all"].append(kept._count(kept._fit(question)[0]))
        kept.keep(question, reply)
        fresh.keep(question, reply)
    # Two readings: the base's first turn reads all, later ones what came after its last turn.
    assert [few < all_ for few, all_ in zip(*asked.values(), strict=True)] == [
        False, True, False, True, True, True,
    ]  # fmt: skip


def test_the_oldest_turns_make_room_and_what_never_fits_is_refused(llama_dir, chat_template):
    talk = open_conversation(llama_dir, template=chat_template, system="be", max_new_tokens=16)
    for turn in range(12):
        talk.keep(f"question {turn}", Reply("an answer", "stop", 1, 0.0))
    reply = talk.ask("last")
    assert 0 < reply.num_left_out < 24
    assert reply.num_left_out % 2 == 0
    kept = talk.messages[reply.num_left_out :]
    text = "<system>be</s>" + "".join(f"<{m['role']}>{m['content']}</s>" for m in kept)
    text += "<user>last</s><assistant>"
    assert [reply.text] == [t.strip() for t in ask_plain(llama_dir, [text], 16, False)]
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    longer = text.replace("<user>", f"<user>{talk.messages[reply.num_left_out - 2]['content']}")
    assert len(tokenizer(longer, add_special_tokens=False)["input_ids"]) > 256 - 16
    with pytest.raises(UserError, match="more than the model reads"):
        talk.ask("x" * 400)
    assert len(talk.messages) == 24


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(llama_dir, chat_template):
    talk = open_conversation(llama_dir, template=chat_template, max_new_tokens=30)
    whole = talk.ask("hello").text
    said: list[str] = []

    def stop(piece: str) -> None:
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    reply = talk.ask("hello", on_text=stop)
    assert reply.finish_reason == "interrupted"
    assert whole.startswith(reply.text)
    assert reply.text != whole
    assert talk.ask("hello").text == whole


def test_a_form_without_turns_asks_each_question_alone(trained):
    talk = open_conversation(trained, max_new_tokens=8)
    assert talk.form.name == "question_answer"
    first = talk.ask("one")
    talk.keep("one", first)
    assert talk.ask("one").text == first.text
    with pytest.raises(UserError, match="no place for a system prompt"):
        talk.set_system("be")


def test_settings_change_the_answers_to_come(llama_dir, chat_template):
    talk = open_conversation(llama_dir, template=chat_template, max_new_tokens=12)
    greedy = talk.ask("hello").text
    talk.set_value("temperature", "1.5")
    assert len({greedy, talk.ask("hello").text, talk.ask("hello").text}) == 3
    talk.set_value("temperature", "0")
    assert talk.ask("hello").text == greedy
    talk.set_value("max_new_tokens", "2")
    assert talk.ask("hello").num_new_tokens == 2
    talk.set_value("repetition_penalty", "5")
    talk.set_value("max_new_tokens", "12")
    assert talk.decoding.do_sample is False
    assert talk.ask("hello").text != greedy
    for key, value in [("x", "1"), ("top_p", "2"), ("top_k", "a"), ("max_new_tokens", "256")]:
        with pytest.raises(UserError):
            talk.set_value(key, value)


def test_a_conversation_is_saved_as_a_row(llama_dir, chat_template, tmp_path):
    talk = open_conversation(llama_dir, template=chat_template, system="be", max_new_tokens=2)
    with pytest.raises(UserError, match="nothing was said"):
        talk.save(tmp_path / "talk.jsonl")
    talk.keep("one", Reply("two", "stop", 1, 0.0))
    talk.save(tmp_path / "talk.jsonl")
    assert json.loads((tmp_path / "talk.jsonl").read_text()) == {
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
        ]
    }
    with pytest.raises(UserError, match="something already"):
        talk.save(tmp_path / "talk.jsonl")


def test_a_turns_closing_token_ends_an_answer(llama_dir, tmp_path):
    """A tokenizer whose end of text is another token than the one that closes a turn."""
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE.replace("</s>", "<unk>"))
    talk = open_conversation(llama_dir, template=str(template))
    assert talk.form.find_turn_ends(talk.opened.tokenizer) == [0]  # <unk>, not </s>


@pytest.mark.parametrize("target", ["./nowhere", "nowhere/at/all"])
def test_a_target_that_is_not_there_is_told_by_the_argument(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ask in (lambda: generate(target, prompts=["a"]), lambda: open_conversation(target)):
        with pytest.raises(UserError, match=f"no folder '{target}'") as caught:
            ask()
        assert caught.value.key == "TARGET"
        assert "adapter, run or model folder" in caught.value.hint


def test_a_hub_id_that_cannot_be_had_says_so_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no folder 'nowhere/model', and not available") as caught:
        generate("nowhere/model", prompts=["a"])
    assert caught.value.key == "TARGET"
