"""The best validation: its checkpoint stays, the adapter is of it, and patience looks at it."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from wegeft_cli.runs.train import train

# Unlike the training rows: their loss falls at first and rises while those are learned by heart.
HELD_OUT = [
    {"prompt": "Q1:", "completion": " xyz zyx qqq"},
    {"prompt": "R2:", "completion": " 12 the correct answer"},
]


@pytest.fixture
def overfitting(tmp_path):
    """A function: settings of such a run of 24 steps, with changes of `train`."""
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))

    def build(**train_section):
        return {
            "data": {"validation": [{"path": str(path)}]},
            "train": {
                "num_train_epochs": 8, "learning_rate": 0.02, "eval_steps": 2, **train_section
            },
        }  # fmt: skip

    return build


def read_losses(read_run, run_dir):
    return {int(k): v["eval_loss"] for k, v in read_run(run_dir)["validation"].items()}


def read_factors(run_dir):
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def test_the_adapter_is_of_the_best_validation(
    write_recipe, overfitting, read_run, steps_saved, read_adapter
):
    recipe = write_recipe(**overfitting(load_best_model_at_end=True, save_total_limit=1))
    result = train(recipe)
    run = read_run(result.run_dir)
    losses = read_losses(read_run, result.run_dir)
    best = min(losses, key=losses.get)
    assert best < result.num_steps  # else this test says nothing
    assert (result.best_step, result.adapter_step) == (best, best)
    assert (run["best_step"], run["best_metric"]) == (best, losses[best])
    assert run["adapter_step"] == best
    assert steps_saved(result.run_dir) == [best, result.num_steps]
    kept = load_file(result.run_dir / "checkpoints" / f"step-{best:08d}" / "parameters.safetensors")
    written = read_factors(result.run_dir)
    assert {t.numpy().tobytes() for t in written.values()} == {
        t.numpy().tobytes() for t in kept.values()
    }
    assert f"step {best}" in (result.adapter_dir / "README.md").read_text()
    last = train(write_recipe("last", **overfitting()))
    assert (last.adapter_step, last.best_step) == (last.num_steps, best)
    assert read_adapter(last.run_dir) != read_adapter(result.run_dir)


def test_with_an_average_the_adapter_is_the_best_average(write_recipe, overfitting):
    result = train(write_recipe(**overfitting(load_best_model_at_end=True, ema_decay=0.5)))
    assert result.best_step < result.num_steps
    folder = result.run_dir / "checkpoints" / f"step-{result.best_step:08d}"
    average = load_file(folder / "ema.safetensors")
    plain = load_file(folder / "parameters.safetensors")
    written = {t.numpy().tobytes() for t in read_factors(result.run_dir).values()}
    assert written == {t.numpy().tobytes() for t in average.values()}
    assert written != {t.numpy().tobytes() for t in plain.values()}


def test_stopped_behind_the_best_and_resumed(
    write_recipe, overfitting, stop_after, read_adapter, read_run
):
    settings = overfitting(load_best_model_at_end=True, save_total_limit=1)
    whole = train(write_recipe("whole", **settings))
    recipe = write_recipe("parts", **settings)
    stopped = train(recipe, should_stop=stop_after(whole.num_steps - 1))
    assert stopped.best_step == whole.best_step < stopped.num_steps
    resumed = train(recipe, resume="auto")
    assert resumed.best_step == resumed.adapter_step == whole.best_step
    assert read_adapter(resumed.run_dir) == read_adapter(whole.run_dir)
    assert read_run(resumed.run_dir)["validation"] == read_run(whole.run_dir)["validation"]


def test_a_best_checkpoint_that_is_gone_costs_a_warning(
    write_recipe, overfitting, stop_after, listener, read_run
):
    recipe = write_recipe(**overfitting(load_best_model_at_end=True))
    stopped = train(recipe, should_stop=stop_after(20))
    shutil.rmtree(stopped.run_dir / "checkpoints" / f"step-{stopped.best_step:08d}")
    result = train(recipe, resume="auto", reporter=listener)
    assert (result.status, result.adapter_step) == ("finished", result.num_steps)
    assert any("since the checkpoint of the best step" in text for text in listener.warnings)
    assert read_run(result.run_dir)["best_step"] == stopped.best_step


def test_patience_watches_a_task(write_recipe, overfitting, data_dir, read_run):
    """A score that stays at 0 is no improvement; the loss meanwhile falls."""
    settings = overfitting(
        eval_tasks=["boolq"],
        metric_for_best_model="eval_boolq",
        early_stopping_patience=2,
        learning_rate=1e-4,
    )
    settings["eval"] = {"data_dir": str(data_dir), "limit": 2, "max_new_tokens": 2}
    result = train(write_recipe(**settings))
    assert (result.stopped_early, result.num_steps) == (True, 6)
    assert (result.best_step, result.best_metric) == (2, 0.0)
    losses = read_losses(read_run, result.run_dir)
    assert losses[2] > losses[4] > losses[6]


def test_the_summary_of_a_finished_run_is_told_again(write_recipe, overfitting):
    recipe = write_recipe(**overfitting(load_best_model_at_end=True))
    first, again = train(recipe), train(recipe, resume="auto")
    told = json.loads(json.dumps(first.to_json()))
    kept = ("best_step", "best_metric", "adapter_step", "num_skipped", "peak_memory_gib", "waste")
    assert {key: again.to_json()[key] for key in kept} == {key: told[key] for key in kept}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.metric_for_best_model=eval_lss", "not measured"),
        ("train.eval_steps=0", "requires validation during training"),
    ],
)
def test_what_cannot_be_watched_is_refused(write_recipe, overfitting, change, message):
    from wegeft_cli.errors import UserError

    with pytest.raises(UserError, match=message):
        train(write_recipe(**overfitting(load_best_model_at_end=True)), [change])
