"""MT-Bench and AlpacaEval from the model to the verdict, with a judge on this machine."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.evaluation.judged import judge_client as judge_module
from wegeft_cli.evaluation.judged.mt_bench_questions import TEMPERATURES
from wegeft_cli.planning.validate import validate_recipe
from wegeft_cli.runs.train import train

KEY = "a-key-that-nobody-may-see"
CATEGORIES = ["writing", "math", "stem", "coding"]
RANKING = "[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]"


class JudgeServer(ThreadingHTTPServer):
    """Speaks OpenAI's chat completions: says `say(prompt)`, or a status where that is a number."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.say: Any = lambda prompt: "Good. Rating: [[7]]"
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: JudgeServer = self.server  # type: ignore[assignment]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers.get("Authorization"))
            said = server.say(body["messages"][-1]["content"])
        status = 200
        if self.path != "/v1/chat/completions":
            status, content = 404, {"error": f"no {self.path}"}
        elif isinstance(said, int):
            status, content = said, {"error": f"not with {self.headers.get('Authorization')}"}
        else:
            content = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        told = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(judge_module.KEY_VARIABLE, raising=False)
    with JudgeServer() as opened:
        thread = threading.Thread(target=opened.serve_forever, args=(0.01,))
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the judge's client would have waited."""
    told: list[float] = []
    real = judge_module.OpenAIJudge.__init__

    def build(self: Any, *words: Any, **named: Any) -> None:
        real(self, *words, **{**named, "sleep": told.append})

    monkeypatch.setattr(judge_module.OpenAIJudge, "__init__", build)
    return told


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small sets in the public forms; the judge's prompts are this test's own."""
    folder = tmp_path / "data"
    (folder / "mt_bench/reference_answer").mkdir(parents=True)
    (folder / "alpaca_eval").mkdir()
    write_lines(
        folder / "mt_bench/question.jsonl",
        [
            {"question_id": 81 + n, "category": name, "turns": [f"Ask {n}?", f"And {{{n}}}?"]}
            for n, name in enumerate(CATEGORIES)
        ],
    )
    write_lines(
        folder / "mt_bench/reference_answer/gpt-4.jsonl",
        [
            {"question_id": number, "choices": [{"index": 0, "turns": ["ref one", "ref two"]}]}
            for number in (82, 84)
        ],
    )
    templates = {
        "single-v1": "Q {question} A {answer}",
        "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
        "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
        "single-math-v1-multi-turn": "Q {question_2} R {ref_answer_2} A {answer_2}",
    }
    write_lines(
        folder / "mt_bench/judge_prompts.jsonl",
        [
            {"name": name, "type": "single", "system_prompt": "Judge.", "prompt_template": text}
            for name, text in templates.items()
        ],
    )
    (folder / "alpaca_eval/alpaca_eval.json").write_text(
        json.dumps(
            [
                {
                    "instruction": f"Do thing {n}.",
                    "output": f"done {n} {{output_1}}",
                    "generator": "old",
                    "dataset": "x",
                }
                for n in range(6)
            ]
        )
    )
    (folder / "alpaca_eval/alpaca_eval.txt").write_text(
        "<|im_start|>system\nYou rank.\n<|im_end|>\n<|im_start|>user\n"
        "{instruction} | {output_1} | {output_2} | {keep}\n<|im_end|>"
    )
    monkeypatch.chdir(tmp_path)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(task: str, sets: Path, model: Path | None = None, **options: Any) -> dict[str, Any]:
    samples = options.pop("samples", None)
    if samples is not None:
        model = None
    result = evaluate(
        model, tasks=[task], data_dir=sets, max_new_tokens=6, samples=samples, options=options
    )
    (row,) = result["results"]
    return {**row, "samples_path": result["samples_path"]}


def judged(server: JudgeServer) -> dict[str, str]:
    return {"judge_url": server.url, "judge_model": "strict"}


def test_without_a_judge_answers_are_written_and_nothing_is_sent(sets, llama_dir, server):
    row = run("mt_bench", sets, llama_dir)
    assert (row["score"], row["num_correct"], row["n"], row["rating"]) == (None, None, 8, None)
    assert server.bodies == []
    (path,) = row["files"]
    answers = read_lines(path)
    assert [answer["question_id"] for answer in answers] == [81, 82, 83, 84]
    assert {answer["model_id"] for answer in answers} == {llama_dir.name}
    assert all(len(answer["choices"][0]["turns"]) == 2 for answer in answers)
    assert set(answers[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}


def test_each_category_is_answered_at_its_temperature_and_turn_two_sees_turn_one(
    sets, llama_dir, monkeypatch
):
    from wegeft_cli.evaluation import answers as module

    seen = []

    def write(model, tokenizer, prompts, decoding, **rest):
        seen.extend(
            (number, decoding.temperature, prompt)
            for number, prompt in zip(prompts.sample_ids, prompts.texts, strict=True)
        )
        return real(model, tokenizer, prompts, decoding, **rest)

    real = module.generate_texts
    monkeypatch.setattr(module, "generate_texts", write)
    row = run("mt_bench", sets, llama_dir)
    by_number = {number: (temperature, prompt) for number, temperature, prompt in seen}
    assert sorted(by_number) == list(range(8))
    for index, name in enumerate(CATEGORIES):
        assert {by_number[2 * index + turn][0] for turn in (0, 1)} == {TEMPERATURES[name]}
    answers = read_lines(row["files"][0])
    first = answers[1]["choices"][0]["turns"][0]
    assert by_number[3][1].endswith(
        f"### Instruction: Ask 1?\n\n### Response: {first}</s>"
        "### Instruction: And {1}?\n\n### Response:"
    )
    assert TEMPERATURES["math"] == 0.0
    assert row["generation"]["temperature"] == TEMPERATURES


def test_the_judge_rates_every_turn_and_words_without_a_rating_are_counted(
    sets, llama_dir, server, monkeypatch
):
    monkeypatch.setenv(judge_module.KEY_VARIABLE, KEY)
    says = {"Ask 0?": "[[2]]", "ref one": "Rating: [9]", "ref two": "no idea"}
    server.say = lambda prompt: next((s for k, s in says.items() if k in prompt), "fine [[4.5]]")
    row = run("mt_bench", sets, llama_dir, **judged(server))
    # writing 2, 2 (turn two shows the first question); math and coding 9, none; stem 4.5, 4.5
    told = row["rating"]
    assert (told["n"], told["n_invalid"], row["n_invalid"]) == (8, 2, 2)
    assert told["mean"] == pytest.approx((2 + 2 + 9 + 9 + 4.5 + 4.5) / 6)
    assert row["score"] == pytest.approx(told["mean"] / 10)
    assert told["turn_1"] == pytest.approx((2 + 9 + 4.5 + 9) / 4)
    assert told["categories"] == {"coding": 9, "math": 9, "stem": 4.5, "writing": 2}
    assert row["judge"] == "strict"
    assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(0, 2048)}
    assert set(server.keys) == {f"Bearer {KEY}"}
    written = "".join(path.read_text() for path in sets.parent.rglob("*.json*"))
    assert KEY not in written
    # What was written is scored as it is, to the same numbers.
    judgments = next(path for path in row["files"] if "judgments" in path)
    again = run("mt_bench", sets, samples=Path(judgments), is_judged=True)
    assert (again["rating"], again["score"], again["ci95"]) == (told, row["score"], row["ci95"])


def test_given_answers_are_judged_without_a_model(sets, llama_dir, server):
    answers = Path(run("mt_bench", sets, llama_dir)["files"][0])
    row = run("mt_bench", sets, samples=answers, **judged(server))
    assert (row["score"], len(server.bodies)) == (pytest.approx(0.7), 8)


def test_a_cut_off_judging_goes_on_where_it_was(sets, llama_dir, server, naps):
    server.say = lambda prompt: "[[3]]" if len(server.bodies) <= 3 else 500
    with pytest.raises(MachineError, match="no answer in 6 tries"):
        run("mt_bench", sets, llama_dir, **judged(server))
    assert naps[:2] == [1.0, 1.0] or 2.0 in naps
    server.say = lambda prompt: "[[8]]"
    server.bodies.clear()
    row = run("mt_bench", sets, llama_dir, **judged(server))
    assert len(server.bodies) == 5
    assert sorted(read["score"] for read in read_lines(row["files"][1])) == [3] * 3 + [8] * 5


def test_a_busy_judge_is_asked_again(sets, llama_dir, server, naps):
    server.say = lambda prompt: 429 if len(server.bodies) <= 2 else "[[6]]"
    assert run("mt_bench", sets, llama_dir, **judged(server))["score"] == pytest.approx(0.6)
    assert naps


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_judge_that_refuses_is_told_without_the_key(status, sets, llama_dir, server, monkeypatch):
    monkeypatch.setenv(judge_module.KEY_VARIABLE, KEY)
    server.say = lambda prompt: status
    with pytest.raises(UserError, match=f"status {status}") as caught:
        run("mt_bench", sets, llama_dir, **judged(server))
    assert "<key>" in str(caught.value)
    assert KEY not in str(caught.value)
    if status == 401:
        assert judge_module.KEY_VARIABLE in str(caught.value.hint)


def test_alpaca_eval_is_compared_with_the_reference_whatever_the_order(sets, llama_dir, server):
    # The first output shown is preferred: which that is, is drawn for each instruction.
    server.say = lambda prompt: RANKING
    row = run("alpaca_eval", sets, llama_dir, **judged(server))
    assert len(server.bodies) == 6
    annotations = json.loads(Path(row["files"][1]).read_text())
    for body, annotation in zip(
        sorted(server.bodies, key=lambda body: body["messages"][-1]["content"]),
        annotations,
        strict=True,
    ):
        system, user = body["messages"]
        assert system == {"role": "system", "content": "You rank."}
        shown = user["content"].removeprefix(annotation["instruction"])
        is_reference_first = shown.startswith(f" | {annotation['output_1']} | ")
        assert shown.endswith("| {keep}")
        assert annotation["preference"] == (1 if is_reference_first else 2)
    preferences = [annotation["preference"] for annotation in annotations]
    assert set(preferences) == {1, 2}
    assert row["score"] == pytest.approx(preferences.count(2) / 6)
    assert row["num_correct"] == row["preference"]["n_wins"] == preferences.count(2)
    again = run("alpaca_eval", sets, samples=Path(row["files"][1]), is_judged=True)
    assert (again["score"], again["preference"]) == (row["score"], row["preference"])


def test_alpaca_eval_counts_draws_and_words_that_rank_nothing(sets, llama_dir, server):
    rows = json.loads((sets / "alpaca_eval/alpaca_eval.json").read_text())
    outputs = sets.parent / "mine.json"
    outputs.write_text(
        json.dumps(
            [
                {"instruction": row["instruction"], "output": row["output"] if n < 2 else "other"}
                for n, row in enumerate(rows)
            ]
        )
    )
    server.say = lambda prompt: "both are fine" if "thing 5" in prompt else RANKING
    row = run("alpaca_eval", sets, samples=outputs, **judged(server))
    told = row["preference"]
    assert len(server.bodies) == 4  # equal answers are a draw without a question
    assert (told["n"], told["n_draws"], told["n_invalid"]) == (6, 2, 1)
    assert told["n_wins"] + told["n_wins_base"] == 3
    assert row["score"] == pytest.approx((told["n_wins"] + 1) / 5)


def test_gift_limits_prompt_and_answer_together(sets, llama_dir, monkeypatch):
    from wegeft_cli.evaluation import answers as module

    totals = []

    def write(model, tokenizer, prompts, decoding, **rest):
        lengths = [len(ids) for ids in prompts.encode(tokenizer)]
        totals.extend(length + decoding.max_new_tokens for length in lengths)
        return real(model, tokenizer, prompts, decoding, **rest)

    real = module.generate_texts
    monkeypatch.setattr(module, "generate_texts", write)
    path = sets / "alpaca_eval/alpaca_eval.json"
    rows = json.loads(path.read_text())
    rows[1]["instruction"] += " And another, longer one, at that." * 2
    path.write_text(json.dumps(rows))
    (row,) = evaluate(llama_dir, tasks=["alpaca_eval"], data_dir=sets, limit=2)["results"]
    assert totals == [256, 256]  # the tiny model's context is nearer than GIFT's 2,048
    assert row["generation"]["repetition_penalty"] == 1.1
    assert row["generation"]["no_repeat_ngram_size"] == 5
    assert (row["protocol"], row["score"]) == ("gift", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge_url": "http://localhost:1/v1"}, "a judge needs an address and a model's name"),
        ({"judge_model": "m"}, "a judge needs an address and a model's name"),
        ({"judge_url": "localhost:8000", "judge_model": "m"}, "is no address"),
        ({"judge_url": "http://a:b@c/v1", "judge_model": "m"}, "contains a name or password"),
    ],
)
@pytest.mark.parametrize("task", ["mt_bench", "alpaca_eval"])
def test_half_a_judge_is_refused_before_any_model_is_loaded(task, options, message, sets):
    with pytest.raises(UserError, match=message):
        run(task, sets, sets / "no-model", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "1 of 8 turns are not judged"),
        (lambda rows: [*rows, rows[0]], "again"),
        (lambda rows: [{**rows[0], "score": "7"}, *rows[1:]], "not a judgment"),
        (lambda rows: [{**rows[0], "score": 70}, *rows[1:]], "not within 0 to 10"),
        (lambda rows: [{**rows[0], "model": "other"}, *rows[1:]], "judgments of"),
    ],
)
def test_a_judgment_file_at_fault_is_refused(change, message, sets):
    rows = [
        {"question_id": 81 + n, "turn": turn, "score": 5, "model": "m", "judge": ["j", "p"]}
        for n in range(4)
        for turn in (1, 2)
    ]
    path = sets.parent / "judgments.jsonl"
    write_lines(path, change(rows))
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        run("mt_bench", sets, samples=path, is_judged=True)
    faults = getattr(caught.value, "exceptions", [caught.value])
    assert any(message in str(fault) for fault in faults)


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("mt_bench", "mt_bench/question.jsonl"),
        ("mt_bench", "mt_bench/judge_prompts.jsonl"),
        ("mt_bench", "mt_bench/reference_answer/gpt-4.jsonl"),
        ("alpaca_eval", "alpaca_eval/alpaca_eval.json"),
        ("alpaca_eval", "alpaca_eval/alpaca_eval.txt"),
    ],
)
def test_a_missing_file_is_told_with_its_source(task, file, sets, server):
    (sets / file).unlink()
    with pytest.raises(UserError) as caught:
        run(task, sets, sets / "no-model", **judged(server))
    assert file in str(caught.value)
    assert "put it at <data-dir>/" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("task", "protocol", "ends"),
    [
        ("mt_bench", "fastchat", [2, 7, 0]),
        ("mt_bench", "fastchat_alpaca", [2, 7]),
        ("alpaca_eval", "chat", [2, 7, 0]),
        ("alpaca_eval", "gift", [2]),
        ("boolq", "chat", [2, 7, 0]),
        ("boolq", "wegeft", [2]),
    ],
)
def test_answers_end_where_the_model_and_its_chat_template_say_so(
    sets, llama_dir, data_dir, tmp_path, task, protocol, ends
):
    """Ends of turns are <unk> (0); the generation config names 7; faithful ones know eos alone."""
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}<unk>{% endfor %}"
    )
    result = evaluate(
        folder,
        tasks=[task],
        protocol=protocol,
        data_dir=data_dir if task == "boolq" else sets,
        max_new_tokens=2,
    )
    assert result["results"][0]["generation"]["eos_token_id"] == ends


def test_training_scores_mt_bench_by_the_judge_of_the_environment(
    sets, server, write_recipe, read_metrics, monkeypatch
):
    recipe = write_recipe(
        train={"max_steps": 2, "eval_steps": 1, "eval_tasks": ["mt-bench", "alpaca_eval"]},
        eval={"data_dir": str(sets), "max_new_tokens": 4},
    )
    for check in (validate_recipe, train):
        with pytest.raises((UserError, ExceptionGroup)) as caught:
            check(recipe)
        faults = getattr(caught.value, "exceptions", [caught.value])
        assert [fault.key for fault in faults] == ["train.eval_tasks[0]", "train.eval_tasks[1]"]
        assert all("WEGEFT_JUDGE_URL" in fault.hint for fault in faults)
    monkeypatch.setenv("WEGEFT_JUDGE_URL", server.url)
    monkeypatch.setenv("WEGEFT_JUDGE_MODEL", "strict")
    server.say = lambda prompt: RANKING if " | " in prompt else "Good. Rating: [[7]]"
    validate_recipe(recipe)
    lines = [line for line in read_metrics(train(recipe).run_dir) if "eval_mt_bench" in line]
    assert [line["eval_mt_bench"] for line in lines] == pytest.approx([0.7, 0.7])
    assert all(0 <= line["eval_alpaca_eval"] <= 1 for line in lines)


def test_a_judge_scores_a_test_set_of_ones_own(
    write_recipe: Any, server: JudgeServer, tmp_path: Path
) -> None:
    file = tmp_path / "own.jsonl"
    write_lines(file, [{"question": f"Q{n}?", "answer": f"gold {n}"} for n in range(4)])
    server.say = lambda prompt: "[[correct]]" if "gold 1" in prompt else "no: [[incorrect]]"
    run_dir = train(write_recipe(train={"max_steps": 1})).run_dir
    options = {"judge_url": server.url, "judge_model": "j"}
    result = evaluate(run_dir, data=[file], metric="judge", max_new_tokens=2, options=options)
    (row,) = result["results"]
    assert (row["score"], row["n_invalid"], row["judge"]) == (0.25, 0, "j")
    assert len(server.bodies) == 4
    line = json.loads(Path(result["samples_path"]).read_text().splitlines()[1])
    assert (line["correct"], line["verdict"]) == (True, "[[correct]]")
