"""A run that was stopped and goes on ends with the bits of one that was never stopped."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file

from wegeft_cli.errors import UserError
from wegeft_cli.runs.train import train
from wegeft_cli.storage.lock import lock_folder

# The same gradients, summed in another order; AdamW divides what is near zero by what is.
SAME_SUMS = 1e-3

# Ten rows by four are three steps an epoch; two epochs unless told otherwise.
CASES = {
    "plain, at an epoch's end": (3, {}),
    "dropout, accumulation, checkpointing": (
        1,
        {
            "adapter": {"dropout": 0.3},
            "train": {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": True,
                "logging_steps": 4,
            },
        },
    ),
    "a line of metrics over the stop, warm-up, validation": (
        4,
        {
            "data": {"validation_fraction": 0.2},
            "train": {
                "num_train_epochs": 4,
                "logging_steps": 3,
                "eval_steps": 3,
                "save_steps": 3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 5,
                "early_stopping_patience": 2,
            },
        },
    ),
    "fp16 with its scaler, momentless optimizer": (
        1,
        {"train": {"mixed_precision": "fp16", "optim": "sgd", "logging_steps": 2}},
    ),
    "rmsprop in bf16, sharing nothing": (
        5,
        {
            "adapter": {"share": "none", "side": "output", "init": "psi_zero"},
            "train": {"mixed_precision": "bf16", "optim": "rmsprop", "max_grad_norm": 0},
        },
    ),
}

FAST = list(CASES)[1:3]


@pytest.mark.parametrize(
    "case",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    write_recipe, stop_after, read_adapter, read_metrics, read_run, case
):
    stop_at, settings = CASES[case]
    whole = train(write_recipe("whole", **settings))
    recipe = write_recipe("parts", **settings)
    # Asked once a pass: after the last one of a step, or else in the middle of the next step.
    num_passes = settings.get("train", {}).get("gradient_accumulation_steps", 1)
    num_asked = stop_at * num_passes + (num_passes > 1)
    stopped = train(recipe, should_stop=stop_after(num_asked))
    assert (stopped.status, stopped.num_steps) == ("interrupted", stop_at)
    assert stopped.adapter_dir is None
    assert read_run(stopped.run_dir)["status"] == "interrupted"
    assert whole.num_steps > stop_at
    resumed = train(recipe, resume="auto")
    assert (resumed.status, resumed.num_steps) == ("finished", whole.num_steps)
    assert read_adapter(resumed.run_dir) == read_adapter(whole.run_dir)
    assert read_metrics(resumed.run_dir) == read_metrics(whole.run_dir)
    assert resumed.final_loss == whole.final_loss
    assert resumed.validation_loss == whole.validation_loss


def test_a_run_that_saves_no_more_leaves_no_remains(write_recipe):
    """Its last checkpoint was being replaced when it was killed, and its adapter was not there."""
    run_dir = train(write_recipe(train={"max_steps": 2})).run_dir
    shutil.rmtree(run_dir / "adapter")
    train(run_dir / "recipe.yaml", resume="auto")  # notes that no validation is due any more
    (last,) = (run_dir / "checkpoints").iterdir()
    remains = last.parent / f".trash-{last.name}-0a"
    shutil.copytree(last, remains)
    manifest = json.loads((remains / "manifest.json").read_text())
    (remains / "manifest.json").write_text(json.dumps({**manifest, "serial": 0}))
    shutil.rmtree(run_dir / "adapter")
    assert train(run_dir / "recipe.yaml", resume="auto").adapter_dir.is_dir()
    assert list(last.parent.iterdir()) == [last]


@pytest.mark.slow
def test_stopped_at_every_step(write_recipe, stop_after, read_adapter, read_metrics):
    settings = {"train": {"logging_steps": 4}, "adapter": {"dropout": 0.1}}
    whole = train(write_recipe("whole", **settings)).run_dir
    recipe = write_recipe("parts", **settings)
    resume = None
    for step in range(1, 6):
        result = train(recipe, should_stop=stop_after(1), resume=resume)
        assert (result.status, result.num_steps) == ("interrupted", step)
        resume = "auto"
    last = train(recipe, resume="auto").run_dir
    assert read_adapter(last) == read_adapter(whole)
    assert read_metrics(last) == read_metrics(whole)


@pytest.mark.parametrize(
    "damage",
    ["truncated", *(pytest.param(x, marks=pytest.mark.slow) for x in ("missing", "all"))],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    write_recipe, stop_after, read_adapter, read_metrics, steps_saved, listener, damage
):
    # The line of step 5 is written before the stop, and again after the return to step 4.
    settings = {"train": {"save_steps": 2, "logging_steps": 5}, "adapter": {"dropout": 0.1}}
    whole = train(write_recipe("whole", **settings)).run_dir
    recipe = write_recipe("parts", **settings)
    run_dir = train(recipe, should_stop=stop_after(5)).run_dir
    assert steps_saved(run_dir) == [4, 5]
    for step in (5,) if damage != "all" else (4, 5):
        file = run_dir / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors"
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1])
    train(recipe, resume="auto", reporter=listener)
    assert any("step-00000005 is damaged" in text for text in listener.warnings)
    expected = "starts from step 0" if damage == "all" else "resuming from step 4"
    assert any(expected in text for text in listener.notes)
    assert read_adapter(run_dir) == read_adapter(whole)
    assert read_metrics(run_dir) == read_metrics(whole)


@pytest.mark.slow
def test_an_earlier_checkpoint_can_be_named(write_recipe, read_adapter, read_metrics, stop_after):
    settings = {"train": {"save_steps": 2, "save_total_limit": None}}
    whole = train(write_recipe("whole", **settings)).run_dir
    recipe = write_recipe("parts", **settings)
    run_dir = train(recipe, should_stop=stop_after(5)).run_dir
    train(recipe, resume=str(run_dir / "checkpoints" / "step-00000002"))
    assert read_adapter(run_dir) == read_adapter(whole)
    assert read_metrics(run_dir) == read_metrics(whole)


def test_nothing_to_resume_from_is_a_fresh_start(write_recipe, read_adapter):
    fresh = train(write_recipe("fresh")).run_dir
    resumed = train(write_recipe("resumed"), resume="auto").run_dir
    assert read_adapter(resumed) == read_adapter(fresh)


@pytest.mark.slow
def test_a_peft_baseline_resumes_to_the_same_bits(
    write_recipe, stop_after, read_adapter, read_metrics
):
    settings = {"adapter": {"type": "lora", "peft": {"lora_dropout": 0.2}}}
    whole = train(write_recipe("whole", **settings)).run_dir
    recipe = write_recipe("parts", **settings)
    train(recipe, should_stop=stop_after(2))
    run_dir = train(recipe, resume="auto").run_dir
    assert read_adapter(run_dir) == read_adapter(whole)
    assert read_metrics(run_dir) == read_metrics(whole)


def test_another_recipe_is_refused_with_the_keys(write_recipe, stop_after, files_in):
    recipe = write_recipe()
    run_dir = train(recipe, should_stop=stop_after(2)).run_dir
    before = files_in(run_dir)
    changes = ["train.learning_rate=0.5", "adapter.r=2", "data.train[0].limit=5"]
    with pytest.raises(UserError, match="another recipe") as caught:
        train(recipe, changes, resume="auto")
    for change in changes:
        assert change.partition("=")[0] in caught.value.message
    assert "train.max_steps" not in caught.value.message
    assert files_in(run_dir) == before


def test_what_only_prolongs_or_tells_may_change(write_recipe, stop_after):
    recipe = write_recipe()
    train(recipe, should_stop=stop_after(2))
    changes = ["train.max_steps=8", "train.logging_steps=4", "train.save_steps=3"]
    assert train(recipe, changes, resume="auto").num_steps == 8


def test_a_changed_base_is_refused(write_recipe, stop_after, llama_dir, build_llama_dir, tmp_path):
    base = shutil.copytree(llama_dir, tmp_path / "base")
    recipe = write_recipe(model={"name_or_path": str(base)})
    train(recipe, should_stop=stop_after(2))
    shutil.copy(build_llama_dir(seed=1) / "model.safetensors", base)
    with pytest.raises(UserError, match="has changed since the run began"):
        train(recipe, resume="auto")


def test_a_finished_run_is_told_and_left_alone(write_recipe, listener, read_adapter):
    recipe = write_recipe()
    first = train(recipe)
    before = read_adapter(first.run_dir)
    again = train(recipe, resume="auto", reporter=listener)
    assert (again.status, again.num_steps) == ("finished", first.num_steps)
    assert again.adapter_dir == first.adapter_dir
    assert any("finished already" in note for note in listener.notes)
    assert read_adapter(first.run_dir) == before


def test_a_finished_run_goes_on_for_longer_as_the_hint_says(write_recipe, read_adapter, tmp_path):
    recipe = write_recipe(train={"num_train_epochs": 2})
    train(recipe)
    longer = "train.num_train_epochs=3"
    with pytest.raises(UserError, match="has its adapter already") as caught:
        train(recipe, [longer], resume="auto")
    checkpoint, folder = re.search(r"--resume (\S+) output_dir=(\S+)", caught.value.hint).groups()
    assert folder == "NEW"
    longest = train(recipe, [longer, f"output_dir={tmp_path / 'new'}"], resume=checkpoint)
    assert (longest.status, longest.num_steps) == ("finished", 9)


def test_a_folder_in_use_is_refused(write_recipe, stop_after):
    recipe = write_recipe()
    run_dir = train(recipe, should_stop=stop_after(2)).run_dir
    with lock_folder(run_dir), pytest.raises(UserError, match="in use"):
        train(recipe, resume="auto")
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"


def test_an_early_stop_stays_a_stop(write_recipe, read_adapter, read_run):
    """Killed between its last checkpoint and its adapter, the run does not train on."""
    settings = {
        "data": {"validation_fraction": 0.2},
        "train": {"eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 1e-30},
    }
    recipe = write_recipe(**settings)
    done = train(recipe)
    assert (done.num_steps, done.stopped_early) == (3, True)
    validation = read_run(done.run_dir)["validation"]
    before = read_adapter(done.run_dir)
    shutil.rmtree(done.run_dir / "adapter")
    again = train(recipe, resume="auto")
    assert (again.num_steps, again.stopped_early, again.status) == (3, True, "finished")
    assert read_adapter(again.run_dir) == before
    assert read_run(again.run_dir)["validation"] == validation
    assert len(validation) == 3


def test_a_finished_run_keeps_its_record(write_recipe, read_run):
    recipe = write_recipe(train={"save_steps": 2})
    done = train(recipe)
    record = read_run(done.run_dir)
    assert train(recipe, resume="auto").num_steps == done.num_steps
    for resume, overrides in [
        (str(done.run_dir / "checkpoints" / "step-00000004"), []),
        ("auto", ["train.num_train_epochs=4"]),
    ]:
        with pytest.raises(UserError, match="has its adapter already"):
            train(recipe, overrides, resume=resume)
    after = read_run(done.run_dir)
    assert (after["num_steps"], after["final_loss"]) == (record["num_steps"], record["final_loss"])


def test_the_runs_own_recipe_finds_a_template_beside_the_first(
    write_recipe, tmp_path, monkeypatch, stop_after
):
    (tmp_path / "my.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(8)]
    recipe = write_recipe(rows=rows, data={"template": "my.jinja"})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    stopped = train(recipe, should_stop=stop_after(1))
    assert train(stopped.run_dir / "recipe.yaml", resume="auto").status == "finished"


def test_a_steps_rows_are_kept_on_another_number_of_processes(
    write_recipe, stop_after, read_adapter
):
    recipe = write_recipe()
    whole = train(recipe, ["output_dir=" + str(recipe.parent / "whole")])
    stopped = train(recipe, should_stop=stop_after(3))
    path = stopped.run_dir / "run.json"
    told = json.loads(path.read_text())
    # As if two processes had made them, of four rows each.
    path.write_text(json.dumps({**told, "num_processes": 2}))
    with pytest.raises(UserError, match="have 8 rows, on 2 processes; on 1") as caught:
        train(recipe, resume="auto")
    assert "gradient_accumulation_steps=2" in caught.value.hint
    path.write_text(json.dumps(told))
    overrides = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    resumed = train(recipe, overrides, resume="auto")
    assert resumed.num_steps == whole.num_steps
    one, other = (
        load_file(result.adapter_dir / "adapter_model.safetensors") for result in (whole, resumed)
    )
    for key, tensor in one.items():
        assert (other[key] - tensor).abs().max() < SAME_SUMS * tensor.abs().max()
