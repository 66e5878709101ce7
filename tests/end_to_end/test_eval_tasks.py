"""Tasks scored while training: the score that `wegeft eval` gives, on one process or two."""

import json

import preloaded
import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.registry import load_training_benchmarks
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.planning.validate import validate_recipe
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.runs.train import train

TIMEOUT_SECONDS = 240
STEPS = 40
# The sums of 40 steps of float32 are taken in another order, and the loss is far down its slope.
OTHER_SUMS = 0.02


@pytest.fixture
def learning(adapters_rows, data_dir):
    """Settings of a run that learns by heart which of the rows of boolq is true."""
    return {
        "rows": [{"instruction": r["instruction"], "output": r["output"]} for r in adapters_rows],
        "adapter": {"r": 16, "target_modules": "all-linear"},
        "data": {"template": "commonsense", "max_length": 200},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 6,
            "eval_steps": STEPS // 2,
            "eval_tasks": ["boolq"],
        },
        "eval": {"data_dir": str(data_dir), "max_new_tokens": 12, "batch_size": 2},
    }


def test_the_score_is_that_of_wegeft_eval(write_recipe, learning, read_metrics, read_run, data_dir):
    result = train(write_recipe(**learning))
    lines = [line for line in read_metrics(result.run_dir) if "eval_boolq" in line]
    assert [line["step"] for line in lines] == [STEPS // 2, STEPS]
    assert "eval_loss" not in lines[0]
    after = evaluate(result.run_dir, tasks=["boolq"])["results"][0]
    assert after["n"] == 6
    assert lines[-1]["eval_boolq"] == after["score"]
    assert after["score"] > 0  # else a count that is never taken would pass
    assert read_run(result.run_dir)["validation"][str(STEPS)] == {"eval_boolq": after["score"]}
    assert (result.best_metric, result.validation_loss) == (None, None)


def test_a_group_scores_its_sets_and_their_mean(write_recipe, learning, read_metrics, tmp_path):
    """The model learns to say 7, which is the answer of two sets of four."""
    data_dir = tmp_path / "maths"
    for folder, answer in {"gsm8k": "7", "mawps": "7.0", "SVAMP": "8", "AQuA": "B"}.items():
        (data_dir / folder).mkdir(parents=True)
        row = {"instruction": f"one of {folder}", "input": "", "output": "", "answer": answer}
        (data_dir / folder / "test.json").write_text(json.dumps([row]))
    learning["rows"] = [
        {"instruction": f"one of {name}", "output": "7"} for name in ("gsm8k", "mawps", "SVAMP")
    ]
    learning["data"] = {"template": "alpaca", "max_length": 220}
    learning["eval"] = {"data_dir": str(data_dir), "max_new_tokens": 3}
    learning["train"] |= {"eval_tasks": ["gsm8k", "Math10k"], "per_device_train_batch_size": 3}
    learning["train"] |= {"metric_for_best_model": "eval_math10k", "load_best_model_at_end": True}
    # A member may be watched, and one that is named beside its group is asked once.
    named = ["train.metric_for_best_model=eval_svamp", "train.eval_tasks=[math10k,SVAMP]"]
    watched = write_recipe("watched", **learning)
    validate_recipe(watched, named)
    with pytest.raises(UserError, match="there is eval_math10k and eval_gsm8k"):
        validate_recipe(watched, [*named, "train.metric_for_best_model=eval_boolq"])
    assert list(load_training_benchmarks(load_recipe(watched, named).recipe)) == [
        "gsm8k", "aqua", "mawps", "svamp",
    ]  # fmt: skip
    result = train(write_recipe(**learning))
    last = read_metrics(result.run_dir)[-1]
    scores = {name: last[f"eval_{name}"] for name in ("gsm8k", "mawps", "svamp", "aqua")}
    assert scores == {"gsm8k": 1.0, "mawps": 1.0, "svamp": 0.0, "aqua": 0.0}
    assert last["eval_math10k"] == 0.5
    assert result.best_metric is not None
    found = evaluate(result.run_dir, tasks=["math10k"], max_new_tokens=3)
    assert found["groups"][0]["score"] == 0.5


def test_scoring_leaves_no_mark_on_the_training(write_recipe, read_adapter, learning):
    learning["adapter"]["dropout"] = 0.1
    learning["train"]["max_steps"] = 4
    scored = train(write_recipe("scored", **learning), ["train.eval_steps=1"]).run_dir
    plain = train(write_recipe("plain", **learning), ["train.eval_tasks=[]", "train.eval_steps=0"])
    assert read_adapter(scored) == read_adapter(plain.run_dir)


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (["train.eval_tasks=[bolq]"], "train.eval_tasks[0]", "no task is called"),
        (
            ["train.metric_for_best_model=eval_bolq"],
            "train.metric_for_best_model",
            "there is eval_boolq",
        ),
        (["train.eval_tasks=[piqa]"], "eval.data_dir", "no test set"),
        (["train.eval_tasks=[mawps]", "eval.data_dir=null"], "eval.data_dir", "needs a folder"),
        (["eval.protocol=gft"], "eval.protocol", "no protocol"),
    ],
)
def test_a_missing_set_is_told_before_the_run(
    write_recipe, learning, tmp_path, changes, key, message
):
    with pytest.raises(UserError, match=message) as caught:
        train(write_recipe(**learning), changes, dry_run=True)
    assert caught.value.key == key
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("num_calls", [STEPS // 2 + 1, STEPS // 2 + 3, STEPS + 4])
def test_a_stop_while_scoring_is_made_good_when_the_run_goes_on(
    write_recipe, learning, stop_after, read_metrics, read_adapter, read_run, num_calls
):
    """Six rows by two are asked in three rounds, so that a scoring asks twice for a stop.

    A third time it is asked ahead of the answers.
    """
    learning["logging"] = {"sample_prompts": ["is 3 an even number?"]}
    whole = train(write_recipe("whole", **learning))
    recipe = write_recipe("parts", **learning)
    stopped = train(recipe, should_stop=stop_after(num_calls))
    step = STEPS // 2 if num_calls < STEPS else STEPS
    assert (stopped.status, stopped.num_steps) == ("interrupted", step)
    assert not any(line["step"] == step for line in read_metrics(stopped.run_dir) if "eval" in line)
    resumed = train(recipe, resume="auto")
    assert resumed.status == "finished"
    assert read_metrics(resumed.run_dir) == read_metrics(whole.run_dir)
    assert read_adapter(resumed.run_dir) == read_adapter(whole.run_dir)
    assert read_run(resumed.run_dir)["validation"] == read_run(whole.run_dir)["validation"]
    samples = [(run.run_dir / "samples.jsonl").read_text() for run in (whole, resumed)]
    assert samples[0] == samples[1]
    assert samples[0].count("\n") == 2


def test_a_stop_between_batches_of_the_validation_loss(
    write_recipe, stop_after, read_metrics, read_adapter
):
    settings = {
        "data": {"validation_fraction": 0.3},
        "train": {"eval_steps": 2, "per_device_eval_batch_size": 1, "num_train_epochs": 3},
    }
    whole = train(write_recipe("whole", **settings)).run_dir
    recipe = write_recipe("parts", **settings)
    stopped = train(recipe, should_stop=stop_after(3))
    assert (stopped.status, stopped.num_steps) == ("interrupted", 2)
    assert [line for line in read_metrics(stopped.run_dir) if "eval_loss" in line] == []
    resumed = train(recipe, resume="auto").run_dir
    assert read_metrics(resumed) == read_metrics(whole)
    assert read_adapter(resumed) == read_adapter(whole)


@pytest.mark.slow
def test_two_processes_share_the_rows(write_recipe, learning):
    """Five rows by two on each of two processes: in the second round one of them has no row.

    Of three validation rows, one at a time, one process has two and the other one.
    """
    learning["eval"]["limit"] = 5
    held_out = write_recipe("held", rows=learning["rows"][:3]).with_suffix(".jsonl")
    learning["data"]["validation"] = [{"path": str(held_out)}]
    learning["train"]["per_device_eval_batch_size"] = 1
    alone = train(write_recipe("alone", **learning), ["train.per_device_train_batch_size=6"])
    learning["train"]["per_device_train_batch_size"] = 3
    recipe = write_recipe(**learning)
    words = ["-m", "wegeft_cli", "train", recipe, "--json"]
    done = preloaded.run_group(2, *words, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    run_dir = recipe.parent / "runs" / "tiny"
    validation = json.loads((run_dir / "run.json").read_text())["validation"]
    after = evaluate(run_dir, tasks=["boolq"], limit=5)["results"][0]
    assert validation[str(STEPS)]["eval_boolq"] == after["score"]
    assert after["num_correct"] > 0
    assert validation[str(STEPS)]["eval_loss"] == pytest.approx(
        alone.validation_loss, rel=OTHER_SUMS
    )


@pytest.mark.parametrize("command", [validate_recipe, train])
def test_a_classifier_with_benchmarks_is_refused_before_the_run(write_recipe, command):
    changes = ["task=sequence_classification", "train.eval_tasks=[test]"]
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        command(write_recipe(), changes)
    faults = getattr(caught.value, "exceptions", [caught.value])
    assert [f.key for f in faults if "is not read by" in f.message] == ["train.eval_tasks"]
