"""Tasks of the lm-evaluation-harness, offline: one of the folder, one of its own on local rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.evaluation.lm_eval import bridge
from wegeft_cli.evaluation.lm_eval.bridge import load_harness_task
from wegeft_cli.planning.validate import validate_recipe
from wegeft_cli.runs.train import train

# The harness and what it imports take seconds to load, and warn of their own affairs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROWS = [
    ("2 + 2", ["4", "five", "a"], 0),
    ("the sky", ["green", "blue"], 1),
    ("a cat", ["x", "y"], 1),
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a task file, and rows for the harness's own arc_easy."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tasks = tmp_path / "data" / "lm-eval"
    (tasks / "arc_easy").mkdir(parents=True)
    rows = tasks / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"question": question, "options": options, "gold": gold}) + "\n"
            for question, options, gold in ROWS
        )
    )
    (tasks / "tiny.yaml").write_text(CHOICE.format(rows=rows))
    (tasks / "arc_easy" / "test.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": str(number),
                    "question": question,
                    "choices": {"text": options, "label": list("ABCD"[: len(options)])},
                    "answerKey": "ABCD"[gold],
                }
            )
            + "\n"
            for number, (question, options, gold) in enumerate(ROWS)
        )
    )
    return tmp_path / "data"


def count_right(folder: Path) -> int:
    """How many of the rows a model answers by the likelihood of each option: the definition."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    num_right = 0
    for question, options, gold in ROWS:
        prompt = f"Question: {question}\nAnswer:"
        start = len(tokenizer(prompt)["input_ids"])
        scores = []
        for option in options:
            ids = torch.tensor([tokenizer(f"{prompt} {option}")["input_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logits[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        num_right += scores.index(max(scores)) == gold
    return num_right


def test_two_tasks_stand_in_one_result_with_the_likelihoods_of_their_definition(folder, llama_dir):
    result = evaluate(
        llama_dir, tasks=["lm-eval:tiny_choice", "lm-eval:arc_easy"], data_dir=folder, batch_size=2
    )
    assert [row["task"] for row in result["results"]] == ["lm-eval:tiny_choice", "lm-eval:arc_easy"]
    for row in result["results"]:
        assert (row["protocol"], row["metric"], row["n"]) == ("lm_eval", "acc,none", 3)
        assert row["num_correct"] == count_right(llama_dir)
        assert row["score"] == row["metrics"]["acc,none"] == pytest.approx(row["num_correct"] / 3)
        assert "acc_norm,none" in row["metrics"]
        assert row["ci95"][0] <= row["score"] <= row["ci95"][1]
    samples = [json.loads(line) for line in Path(result["samples_path"]).read_text().splitlines()]
    assert [sample["prompt"] for sample in samples[:3]] == [
        f"Question: {question}\nAnswer:" for question, _, _ in ROWS
    ]
    assert sum(sample["correct"] for sample in samples[3:]) == result["results"][1]["num_correct"]
    json.dumps(result, allow_nan=False)


def test_the_limit_holds_and_the_model_stays_in_training(folder, llama_dir):
    from wegeft_cli.evaluation.lm_eval.bridge import run_harness

    model = AutoModelForCausalLM.from_pretrained(llama_dir).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    task = load_harness_task("tiny_choice", data_dir=folder)
    result = run_harness(
        model, AutoTokenizer.from_pretrained(llama_dir), task, batch_size=2, limit=2
    )
    assert len(result.samples) == 2
    assert [module.training for module in model.modules()] == before


def test_a_task_file_that_names_code_is_refused_until_it_is_trusted(folder):
    mark = folder.parent / "ran"
    (folder / "lm-eval" / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\ndef text(doc): return ['a', 'b']"
    )
    path = folder / "lm-eval" / "tiny.yaml"
    path.write_text(path.read_text().replace('"{{options}}"', "!function own.text"))
    with pytest.raises(UserError, match="names Python code") as caught:
        load_harness_task("tiny_choice", data_dir=folder)
    assert "tiny.yaml:" in str(caught.value.file)
    assert not mark.exists()
    load_harness_task("tiny_choice", data_dir=folder, trust_code=True)
    assert mark.exists()


def change_task(folder: Path, old: str, new: str) -> Path:
    path = folder / "lm-eval" / "tiny.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_an_included_file_of_any_name_and_encoding_is_read_for_code(folder):
    mark = folder.parent / "ran"
    tasks = folder / "lm-eval"
    (tasks / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef text(doc): return 'a'")
    for number, name in enumerate(("deeper/other.txt", "../outside.cfg")):
        included = tasks / name
        included.parent.mkdir(exist_ok=True)
        included.write_bytes("doc_to_text: !function own.text\n".encode("utf-16"))
        (tasks / f"more{number}.yaml").write_text(f"include: {name}\ntask: more{number}\n")
        with pytest.raises(UserError, match=r"Python code by !function") as caught:
            load_harness_task("tiny_choice", data_dir=folder)
        assert f"{included.resolve()}:1" == caught.value.file
        (tasks / f"more{number}.yaml").unlink()
    # An alias gives the included file's name another key at its anchor.
    (tasks / "alias.yaml").write_text(
        "group: x\nmetadata: {version: &file deeper/other.txt}\ninclude: *file\n"
    )
    with pytest.raises(UserError, match="Python code"):
        load_harness_task("tiny_choice", data_dir=folder)
    assert not mark.exists()


def test_a_metric_that_is_a_script_is_refused(folder):
    mark = folder.parent / "ran"
    script = folder / "evil_metric.py"
    script.write_text(f"open({str(mark)!r}, 'w').close()")
    change_task(folder, "metric: acc_norm", f"metric: {script}")
    with pytest.raises(UserError, match="metric as Python code"):
        load_harness_task("tiny_choice", data_dir=folder)
    assert not mark.exists()


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "gen_prefix", "description"])
def test_a_template_cannot_run_code(folder, llama_dir, key):
    """Some are rendered as the task is loaded, others as it runs."""
    mark = folder.parent / "ran"
    evil = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    old = {"doc_to_text": '"Question: {{question}}\\nAnswer:"', "doc_to_target": "gold"}
    if key in old:
        change_task(folder, f"{key}: {old[key]}", f'{key}: "{evil}"')
    else:
        change_task(folder, "metric_list", f'{key}: "{evil}"\nmetric_list')
    with pytest.raises(UserError, match="would run Python code") as caught:
        evaluate(llama_dir, tasks=["lm-eval:tiny_choice"], data_dir=folder)
    assert caught.value.key == "--trust-task-code"
    assert not mark.exists()


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "doc_to_choice"])
def test_a_template_that_loops_is_interrupted(folder, llama_dir, monkeypatch, key):
    monkeypatch.setattr(bridge, "_RENDER_SECONDS", 0.3)
    loop = "{% for i in range(99999) %}"
    text = loop + loop + "{{ i }}" + 2 * "{% endfor %}"
    path = next(folder.rglob("tiny.yaml"))
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*lines, f'{key}: "{text}"']) + "\n")
    with pytest.raises(UserError, match="takes more than 0 seconds"):
        evaluate(llama_dir, tasks=["lm-eval:tiny_choice"], data_dir=folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("arc_challenge", "cannot be read"), ("humaneval", "cannot be read|without a sandbox")],
)
def test_what_cannot_be_had_offline_is_told(name, message, folder):
    with pytest.raises(UserError, match=message) as caught:
        load_harness_task(name, data_dir=folder)
    assert caught.value.hint


def test_another_protocol_a_samples_file_vllm_and_a_missing_harness_are_refused(
    folder, monkeypatch, tmp_path, llama_dir
):
    with pytest.raises(UserError, match="does not score"):
        evaluate("x", tasks=["lm-eval:tiny_choice"], data_dir=folder, protocol="gift")
    (tmp_path / "s.jsonl").write_text('{"index": 0, "output": ""}\n')
    with pytest.raises(UserError, match="from the model"):
        evaluate(tasks=["lm-eval:tiny_choice"], data_dir=folder, samples=tmp_path / "s.jsonl")
    with pytest.raises(UserError, match="needs the model in memory") as caught:
        evaluate(llama_dir, tasks=["lm-eval:tiny_choice"], data_dir=folder, backend="vllm")
    assert caught.value.key == "--backend"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed") as caught:
        load_harness_task("tiny_choice", data_dir=folder)
    assert "wegeft-cli[lm-eval]" in str(caught.value.hint)


def test_training_scores_a_task_and_goes_on_as_without_it(folder, write_recipe):
    settings = {
        "adapter": {"dropout": 0.1},
        "train": {"max_steps": 3, "eval_steps": 1, "eval_tasks": ["lm-eval:tiny_choice"]},
        "eval": {"data_dir": str(folder), "batch_size": 2},
    }
    recipe = write_recipe("scored", **settings)
    validate_recipe(recipe)
    run_dir = train(recipe).run_dir
    plain = train(write_recipe("plain", **settings), ["train.eval_tasks=[]", "train.eval_steps=0"])
    scored, alone = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (run_dir, plain.run_dir)
    )
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (scored, alone)]
    assert losses[0] == losses[1]
    last = scored[-1]
    (row,) = evaluate(run_dir, tasks=["lm-eval:tiny_choice"], data_dir=folder)["results"]
    assert last["eval_lm-eval:tiny_choice"] == row["score"]
