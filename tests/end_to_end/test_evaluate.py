"""A model, or given outputs, become scores; what is left out comes from the run's recipe."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wegeft_cli.cli.app import app
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate, list_tasks
from wegeft_cli.merging.merge import merge
from wegeft_cli.runs.train import train

# recipes.md, section 2, and what a number must tell of itself to be trusted.
RESULT = {
    "task", "protocol", "score", "num_correct", "n", "n_invalid", "template_hash", "data_sha256",
    "generation",
}  # fmt: skip
SAMPLE = {"index", "output", "prompt", "prediction", "answer", "correct", "valid"}
SHORT = {"tasks": ["boolq"], "max_new_tokens": 6, "batch_size": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_recipe_in, adapters_rows, data_dir):
    """A working folder whose runs/tiny has learned to answer `true` to everything."""
    folder = tmp_path_factory.mktemp("work")
    recipe = write_recipe_in(
        folder,
        rows=adapters_rows * 2,
        adapter={"r": 8, "target_modules": "all-linear"},
        data={"max_length": 200, "template": "commonsense"},
        train={"max_steps": 40, "learning_rate": 0.05, "max_grad_norm": 0.0},
        eval={"tasks": ["boolq"], "limit": 5, "data_dir": str(data_dir), "max_new_tokens": 6},
    )
    merge(train(recipe).run_dir)
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "target", ["runs/tiny", "runs/tiny/adapter", "runs/tiny/merged", "tiny.yaml", None]
)
def test_every_kind_of_target_gives_the_same_answers(target, llama_dir):
    """Adapter and merged model differ in last bits; trained this far, no answer hangs on them."""
    result = evaluate(target)
    outputs = [line["output"] for line in read_lines(result["samples_path"])]
    assert outputs == ["the correct answer is true"] * 5
    (row,) = result["results"]
    assert (row["score"], row["num_correct"], row["n"], row["n_invalid"]) == (0.6, 3, 5, 0)
    if target is None:
        assert result["target"] == "runs/tiny"


def test_defaults_are_the_recipes_and_the_caller_wins(here, data_dir):
    (row,) = evaluate("runs/tiny")["results"]
    assert (row["task"], row["protocol"], row["n"]) == ("boolq", "wegeft", 5)
    assert row["generation"]["max_new_tokens"] == 6
    (row,) = evaluate("runs/tiny", protocol="gift", limit=2, max_new_tokens=3)["results"]
    assert (row["protocol"], row["n"], row["generation"]["max_new_tokens"]) == ("gift", 2, 3)
    (row,) = evaluate("runs/tiny", batch_size=1)["results"]
    assert row["generation"]["batch_size"] == 1


def test_a_set_that_is_not_the_published_one_is_told_once(listener):
    evaluate("runs/tiny", compare_base=True, reporter=listener)
    told = [text for text in listener.warnings if "is not the published set" in text]
    assert len(told) == 1
    assert "boolq/test.json" in told[0]


@pytest.mark.parametrize("target", ["runs/tiny", "runs/tiny/merged"])
def test_compare_base_is_the_base_evaluated_alone(target, llama_dir, data_dir):
    both = evaluate(target, compare_base=True)
    alone = evaluate(llama_dir, data_dir=data_dir, limit=5, **{**SHORT, "batch_size": 16})
    assert both["base_results"] == alone["results"]
    assert both["results"][0]["score"] > both["base_results"][0]["score"]
    lines = read_lines(both["samples_path"])
    base = [line["output"] for line in lines if line["model"] == "base"]
    assert base == [line["output"] for line in read_lines(alone["samples_path"])]
    # The base was asked first, and the adapter works afterwards as it did before.
    assert both["results"] == evaluate(target)["results"]


def test_compare_base_needs_to_know_the_base(llama_dir, data_dir):
    with pytest.raises(UserError, match="base of this model is not recorded") as caught:
        evaluate(llama_dir, data_dir=data_dir, compare_base=True, limit=1, **SHORT)
    assert caught.value.hint == "name it with --base"


def test_another_base_is_refused(build_llama_dir):
    with pytest.raises(UserError, match="not the one that this adapter was trained on"):
        evaluate("runs/tiny", base=str(build_llama_dir(seed=1)))


def test_a_lora_run_is_scored_beside_its_base(write_recipe, data_dir, llama_dir):
    run_dir = train(write_recipe("lora", adapter={"type": "lora"})).run_dir
    both = evaluate(run_dir, data_dir=data_dir, limit=2, compare_base=True, **SHORT)
    alone = evaluate(llama_dir, data_dir=data_dir, limit=2, **SHORT)
    assert both["base_results"] == alone["results"]


def test_the_object_holds_the_names_of_the_contract(here, tmp_path):
    output = tmp_path / "told.json"
    result = evaluate("runs/tiny", output=output)
    assert json.loads(output.read_text()) == result
    assert result["results"][0].keys() >= RESULT
    assert result["samples_path"] == str(tmp_path / "told-samples.jsonl")
    assert "base_results" not in result
    assert "torch" in result["versions"]
    lines = read_lines(result["samples_path"])
    assert len(lines) == 5
    for index, line in enumerate(lines):
        assert line.keys() >= SAMPLE
        assert (line["index"], line["model"]) == (index, "target")
        assert line["correct"] is (line["prediction"] == line["answer"])
    assert sum(line["correct"] for line in lines) == result["results"][0]["num_correct"]


def test_given_samples_are_scored_without_a_model(tmp_path, data_dir, monkeypatch):
    """Those of a run give the run's score; the working folder needs no run then."""
    run = evaluate("runs/tiny")
    samples = tmp_path / "samples.jsonl"
    samples.write_text(
        "".join(
            json.dumps({"index": line["index"], "output": line["output"]}) + "\n"
            for line in reversed(read_lines(run["samples_path"]))
        )
    )
    monkeypatch.chdir(tmp_path)
    given = evaluate(samples=samples, tasks=["boolq"], data_dir=data_dir, limit=5)
    row, expected = given["results"][0], run["results"][0]
    of_the_model = {"generation", "base_fingerprint", "adapter_fingerprint"}
    assert {k: v for k, v in row.items() if k not in of_the_model} == {
        k: v for k, v in expected.items() if k not in of_the_model
    }
    assert [row[name] for name in of_the_model] == [None] * 3
    assert given["samples_path"] == str(samples)
    with pytest.raises(UserError, match="no sample for 1 of 6 rows"):
        evaluate(samples=samples, tasks=["boolq"], data_dir=data_dir)
    more = shutil.copytree(data_dir, tmp_path / "more")
    (more / "piqa").mkdir()
    rows = [{"instruction": "?", "answer": "solution1"}]
    (more / "piqa" / "test.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="got 2 tasks"):
        evaluate(samples=samples, tasks=["boolq", "piqa"], data_dir=more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["bolq"]}, "no task is called"),
        ({"protocol": "gft"}, "gft"),
        ({"target": "runs/nothing/at/all"}, "no folder"),
        ({"target": "runs"}, "neither adapter_config.json"),
        ({"tasks": ["siqa"]}, "no test set"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(arguments, message, data_dir):
    given = {"target": "runs/tiny", "data_dir": data_dir, "tasks": ["boolq"], **arguments}
    with pytest.raises(UserError, match=message):
        evaluate(**given)


def test_no_task_and_no_run_are_told(tmp_path, monkeypatch, llama_dir):
    with pytest.raises(UserError, match="no task is named"):
        evaluate(llama_dir)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        evaluate(tasks=["boolq"])


def test_the_listing_names_every_task():
    listing = list_tasks()
    assert {row["name"] for row in listing["tasks"]} >= {
        "gsm8k", "svamp", "aqua", "mawps", "boolq", "piqa", "siqa", "hellaswag", "winogrande",
        "arc_easy", "arc_challenge", "openbookqa",
    }  # fmt: skip
    assert {row["name"] for row in listing["protocols"]} >= {"wegeft", "gift"}


def test_the_command_prints_one_object(here):
    done = CliRunner().invoke(app, ["eval", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["results"] == evaluate("runs/tiny")["results"]


def test_a_runs_own_protocol_does_not_reach_other_tasks(place, tmp_path, write_recipe_in):
    """`wegeft eval --task gsm8k` works right after a run whose recipe names its own protocol."""
    rows = [{"instruction": "1 + 1?", "input": "", "output": "2", "answer": "2"}] * 4
    own = tmp_path / "data" / "quickstart"
    own.mkdir(parents=True)
    (own / "test.json").write_text(json.dumps(rows))
    other = tmp_path / "more" / "gsm8k"
    other.mkdir(parents=True)
    (other / "test.jsonl").write_text('{"question": "1 + 2?", "answer": "so #### 3"}\n')
    recipe = write_recipe_in(
        tmp_path,
        rows=rows,
        train={"max_steps": 1},
        data={"template": "question_answer"},
        eval={
            "tasks": ["quickstart"],
            "protocol": "quickstart",
            "data_dir": str(tmp_path / "data"),
            "max_new_tokens": 2,
        },
    )
    run_dir = train(recipe).run_dir
    (row,) = evaluate(run_dir)["results"]
    assert (row["task"], row["protocol"]) == ("quickstart", "quickstart")
    assert row["generation"]["max_new_tokens"] == 2
    (row,) = evaluate(run_dir, tasks=["gsm8k"], data_dir=tmp_path / "more", max_new_tokens=3)[
        "results"
    ]
    assert (row["task"], row["protocol"], row["n"]) == ("gsm8k", "wegeft", 1)


def test_a_foreign_file_beside_the_output_stays(place, tmp_path):
    precious = tmp_path / "scores-samples.jsonl"
    precious.write_text("precious\n")
    with pytest.raises(UserError, match="no earlier result"):
        evaluate("runs/tiny", output=tmp_path / "scores.json")
    assert precious.read_text() == "precious\n"
    precious.unlink()
    for _ in range(2):  # its own it replaces
        evaluate("runs/tiny", output=tmp_path / "scores.json")
    assert len(read_lines(precious)) == 5


def test_a_run_asked_in_another_template_than_its_own_is_warned_of(place, data_dir, listener):
    evaluate("runs/tiny", reporter=listener)
    assert not any("template" in text for text in listener.warnings)
    evaluate("runs/tiny", protocol="llm_adapters_fixed", limit=1, reporter=listener)
    (told,) = [text for text in listener.warnings if "template" in text]
    assert "uses the template `llm_adapters`, but the run was trained with `commonsense`" in told


def test_compare_base_comes_with_the_paired_test(place):
    told = evaluate("runs/tiny", compare_base=True)
    (test,) = told["comparison"]
    assert (test["task"], test["protocol"], test["n"]) == ("boolq", "wegeft", 5)
    gain = told["results"][0]["score"] - told["base_results"][0]["score"]
    assert test["difference"] == pytest.approx(gain)
    assert test["only_b"] - test["only_a"] == 3
    assert told["results"][0]["adapter_fingerprint"] is not None
    assert told["base_results"][0]["adapter_fingerprint"] is None
    assert told["results"][0]["base_fingerprint"] == told["base_results"][0]["base_fingerprint"]


def test_the_recipes_limit_holds_for_a_set_under_its_other_name(place, data_dir):
    assert evaluate("runs/tiny", tasks=["BoolQ"])["results"][0]["n"] == 5


def test_own_test_set(place, tmp_path, adapters_rows):
    """`--data FILE --metric NAME`: prompts as in training; a file scores like a model."""
    file = tmp_path / "own.jsonl"
    rows = [{"instruction": r["instruction"], "answer": r["answer"]} for r in adapters_rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = evaluate("runs/tiny", tasks=["boolq"], limit=6)
    outputs = [line["output"] for line in read_lines(trained["samples_path"])]
    for metric, score in (("contains", 0.5), ("exact_match", 0.0)):
        result = evaluate("runs/tiny", data=[file], metric=metric, max_new_tokens=6)
        (row,) = result["results"]
        assert (row["task"], row["protocol"]) == ("data:own", metric)
        assert (row["score"], row["n"], row["num_rows"]) == (score, 6, 6)
        samples = read_lines(result["samples_path"])
        assert [line["output"] for line in samples] == outputs
        assert samples[0]["prompt"] == rows[0]["instruction"] + "\n"  # the form of training
        again = evaluate(samples=Path(result["samples_path"]), data=[file], metric=metric)
        assert again["results"][0]["score"] == score
    (row,) = evaluate("runs/tiny", data=[file], metric="rouge_l", max_new_tokens=6)["results"]
    assert row["num_correct"] is None
    assert 0 < row["score"] < 1
    with pytest.raises(UserError, match="no metric 'bleu'"):
        evaluate("runs/tiny", data=[file], metric="bleu")
    with pytest.raises(UserError, match="needs a judge"):
        evaluate("runs/tiny", data=[file], metric="judge")
    with pytest.raises(UserError, match="does not score the task"):
        evaluate("runs/tiny", data=[file], protocol="gift")
    other = tmp_path / "b" / "own.jsonl"
    other.parent.mkdir()
    other.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(UserError, match="two test sets have the name"):
        evaluate("runs/tiny", data=[file, other])
    words = ["eval", "runs/tiny", "--data", str(file), "--metric", "contains", "--compare-base"]
    done = CliRunner().invoke(app, [*words, "--max-new-tokens", "6", "--json"])
    printed = json.loads(done.stdout)
    assert printed["results"][0]["score"] == 0.5
    assert printed["comparison"][0]["task"] == "data:own"


def test_own_test_set_of_the_recipe(place, tmp_path, write_recipe, adapters_rows):
    """`eval.tasks` and `train.eval_tasks`, with the columns of the recipe."""
    file = tmp_path / "own.jsonl"
    rows = [{"frage": r["instruction"], "antwort": r["answer"]} for r in adapters_rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "frage", "completion": "antwort"}
    recipe = write_recipe(
        rows=rows,
        data={"train": [{"path": str(file), "columns": columns}], "max_length": 200},
        train={"max_steps": 1, "eval_steps": 1, "eval_tasks": [f"data:{file}"],
               "metric_for_best_model": "eval_data:own", "load_best_model_at_end": True},
        eval={"tasks": [f"data:{file}"], "answer_metric": "contains", "max_new_tokens": 4},
    )  # fmt: skip
    run_dir = train(recipe).run_dir
    record = json.loads((run_dir / "run.json").read_text())
    (row,) = evaluate(run_dir)["results"]
    assert (row["task"], row["protocol"]) == ("data:own", "contains")
    assert row["generation"]["max_new_tokens"] == 4
    assert record["validation"]["1"]["eval_data:own"] == row["score"]
