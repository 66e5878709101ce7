"""A recipe becomes an adapter: the same bits each time, whole files, and nothing overwritten."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from wegeft_cli.artifacts.checkpoint import find_newest_checkpoint
from wegeft_cli.cli.app import app
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.runs.train import train
from wegeft_cli.storage.lock import lock_folder

# recipes.md, section 3: other tools read these names.
METRICS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "tokens_per_second",
    "step_seconds", "peak_memory_gib",
}  # fmt: skip
RUN = {
    "status", "versions", "git_revision", "device", "seed", "base_fingerprint",
    "trainable_parameters",
}  # fmt: skip
CONFIG = {
    "peft_type", "format_version", "task_type", "base_model_name_or_path", "revision",
    "base_fingerprint", "r", "alpha", "scale", "side", "share", "dropout", "modules",
}  # fmt: skip


def test_one_seed_gives_one_adapter_to_the_bit(write_recipe, read_adapter, read_metrics):
    settings = {"adapter": {"dropout": 0.2}, "train": {"gradient_accumulation_steps": 2}}
    runs = [train(write_recipe(name, **settings)).run_dir for name in ("one", "two")]
    other = train(write_recipe("three", **settings), ["seed=8"]).run_dir
    assert read_adapter(runs[0]) == read_adapter(runs[1])
    assert read_metrics(runs[0]) == read_metrics(runs[1])
    assert read_adapter(runs[0]) != read_adapter(other)


def test_a_runs_own_recipe_repeats_it(write_recipe, read_adapter, tmp_path):
    first = train(write_recipe()).run_dir
    again = train(first / "recipe.yaml", [f"output_dir={tmp_path / 'again'}"]).run_dir
    assert read_adapter(first) == read_adapter(again)


def test_what_the_tokenizer_pads_with_has_no_say(write_recipe, build_llama_dir, read_adapter):
    """None, a token of its own, or EOS, which is learned: masks come from lengths."""
    adapters = {
        read_adapter(
            train(
                write_recipe(f"pad{n}", model={"name_or_path": str(build_llama_dir(pad=pad))})
            ).run_dir
        )
        for n, pad in enumerate((None, "<pad>", "</s>"))
    }
    assert len(adapters) == 1


def test_files_hold_the_names_of_the_contract(write_recipe, read_run, llama_dir):
    recipe = write_recipe(data={"validation_fraction": 0.2}, train={"eval_steps": 2})
    result = train(recipe)
    lines = [json.loads(x) for x in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(
        range(1, result.num_steps + 1)
    )
    assert all(line.keys() >= METRICS for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    run = read_run(result.run_dir)
    assert run.keys() >= RUN
    assert (run["status"], run["seed"]) == ("finished", 7)
    assert run["device"].partition(":")[0] in ("cpu", "cuda", "mps")
    assert run["base_fingerprint"].startswith("sha256:")
    assert run["trainable_parameters"] == result.trainable_parameters
    assert result.adapter_dir == result.run_dir / "adapter"
    names = {path.name for path in result.adapter_dir.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert config.keys() >= CONFIG
    assert (config["peft_type"], config["format_version"]) == ("WEGEFT", 1)
    assert config["base_fingerprint"] == run["base_fingerprint"]
    assert config["base_model_name_or_path"] == str(llama_dir)
    assert (result.run_dir / "checkpoints" / "step-00000004" / "manifest.json").is_file()
    told = result.to_json()
    assert told.keys() >= {
        "run_dir", "adapter_dir", "status", "num_steps", "final_loss", "trainable_parameters",
    }  # fmt: skip
    assert json.loads(json.dumps(told)) == told
    assert told["final_loss"] == lines[-2]["loss"] == run["final_loss"]


def test_the_card_shows_recipe_and_use(write_recipe):
    result = train(write_recipe())
    card = (result.adapter_dir / "README.md").read_text()
    assert (result.run_dir / "recipe.yaml").read_text() in card
    assert "load_adapter" in card


@pytest.mark.parametrize("status", ["finished", "interrupted", "failed"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(
    write_recipe, stop_after, files_in, status
):
    recipe = write_recipe()
    if status == "failed":
        with pytest.raises(MachineError):
            train(recipe, ["train.learning_rate=1e30"])
    else:
        assert train(recipe, should_stop=stop_after(2 if status[0] == "i" else 99)).status == status
    run_dir = recipe.parent / "runs" / "tiny"
    before = files_in(run_dir)
    with pytest.raises(UserError, match=f"already holds a run .*{status}") as caught:
        train(recipe)
    assert ("--resume auto" in caught.value.hint) == (status != "finished")
    assert files_in(run_dir) == before


def test_a_folder_in_use_is_refused_and_left_alone(write_recipe, files_in):
    recipe = write_recipe()
    run_dir = recipe.parent / "runs" / "tiny"
    with lock_folder(run_dir):
        before = files_in(run_dir)
        with pytest.raises(UserError, match="in use"):
            train(recipe)
        assert files_in(run_dir) == before
    assert train(recipe).status == "finished"


def test_a_dry_run_reads_no_weights_and_writes_nothing(write_recipe, build_llama_dir, tmp_path):
    folder = build_llama_dir(weights=False)
    assert not list(folder.glob("*.safetensors"))
    recipe = write_recipe(model={"name_or_path": str(folder)})
    result = train(recipe, dry_run=True)
    assert (result.status, result.num_steps, result.adapter_dir) == ("checked", 6, None)
    # q_proj and v_proj read 32 numbers, down_proj 48; rank 4.
    assert result.trainable_parameters == 2 * 4 * (32 + 32 + 48)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="cannot load the model"):
        train(recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"target_modules": ["q_prj"]}}, "matches no linear"),
        ({"data": {"max_length": 300}}, "exceed the model's context of 256"),
        ({"rows": [{"prompt": "a", "completion": "  "}]}, "anything to learn"),
        ({"model": {"name_or_path": "/no/such/model"}}, "no folder"),
    ],
)
def test_cheap_checks_come_before_the_folder(write_recipe, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train(write_recipe(**change))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"optim_args": {"bogus": 1}}, "train.optim_args"),
        ({"lr_scheduler_kwargs": {"bogus": 1}}, "train.lr_scheduler_kwargs"),
        ({"optim": "paged_adamw_8bit"}, "train.optim"),
    ],
)
def test_the_optimizer_is_tried_before_a_row_is_read(write_recipe, monkeypatch, settings, key):
    def read(*_, **__):
        raise AssertionError("rows are read")

    monkeypatch.setattr("wegeft_cli.data.text.dataset.build_datasets", read)
    with pytest.raises(UserError) as caught:
        train(write_recipe(train=settings), dry_run=True)
    assert caught.value.key == key


def test_divergence_keeps_the_earlier_checkpoints(write_recipe, read_run, steps_saved):
    recipe = write_recipe(train={"learning_rate": 1e30, "save_steps": 1, "max_skipped_steps": 0})
    with pytest.raises(MachineError, match="diverged at step 2") as caught:
        train(recipe)
    run_dir = recipe.parent / "runs" / "tiny"
    assert "skipped/" in caught.value.hint
    assert (run_dir / "skipped" / "step-00000002.json").exists()
    assert "train.max_skipped_steps" in caught.value.hint
    assert steps_saved(run_dir) == [1]
    checkpoint, notes = find_newest_checkpoint(run_dir / "checkpoints")
    assert (checkpoint.step, notes) == (1, [])
    run = read_run(run_dir)
    assert run["status"] == "failed"
    assert "diverged" in run["error"]
    assert not (run_dir / "adapter").exists()


def test_early_stopping_finishes_the_run(write_recipe, read_run):
    settings = {"eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 1e-30}
    result = train(write_recipe(data={"validation_fraction": 0.3}, train=settings))
    assert (result.status, result.num_steps, result.stopped_early) == ("finished", 3, True)
    assert result.adapter_dir.is_dir()
    assert read_run(result.run_dir)["stopped_early"] is True


def test_16_bit_bases_keep_float32_factors(write_recipe, build_llama_dir):
    from safetensors.torch import load_file

    folder = build_llama_dir(dtype=torch.bfloat16)
    result = train(write_recipe(model={"name_or_path": str(folder)}))
    tensors = load_file(result.adapter_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 6
    assert math.isfinite(result.final_loss)


def raise_full(*_):
    raise OSError(28, os.strerror(28))


def test_a_full_disk_while_saving_keeps_what_was_saved(
    write_recipe, monkeypatch, steps_saved, read_run
):
    """The lowest write, fsync, fails from the moment that the second checkpoint is due."""
    calls = 0

    def should_stop():
        nonlocal calls
        calls += 1
        if calls == 4:
            monkeypatch.setattr(os, "fsync", raise_full)
        return False

    recipe = write_recipe(train={"save_steps": 2})
    with pytest.raises(MachineError, match="No space left") as caught:
        train(recipe, should_stop=should_stop)
    assert "free some space" in caught.value.hint
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    run_dir = recipe.parent / "runs" / "tiny"
    assert steps_saved(run_dir) == [2]
    assert find_newest_checkpoint(run_dir / "checkpoints")[0].step == 2
    assert not [path for path in run_dir.rglob("*") if ".tmp-" in path.name]
    assert train(recipe, resume="auto").status == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's always full device")
def test_a_full_disk_under_the_metrics_is_told(write_recipe, tmp_path):
    """/dev/full answers every write as a full disk does."""
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"

    def should_stop():
        metrics.unlink()
        metrics.symlink_to("/dev/full")
        return False

    with pytest.raises(MachineError, match="No space left"):
        train(write_recipe(), should_stop=should_stop)


def test_a_disk_too_small_is_found_before_the_run(write_recipe, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(
        MachineError, match=r"are needed for the run's checkpoints, and .* are free"
    ):
        train(write_recipe())
    assert not (tmp_path / "runs").exists()


def test_the_command_exits_by_who_can_mend_it(write_recipe, monkeypatch):
    runner = CliRunner()
    recipe = str(write_recipe())
    monkeypatch.setattr(os, "fsync", raise_full)
    full = runner.invoke(app, ["train", recipe])
    assert full.exit_code == 1
    assert "No space left" in full.stderr
    monkeypatch.undo()
    done = runner.invoke(app, ["train", recipe, "--json", "output_dir=" + recipe + ".run"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["status"] == "finished"
    again = runner.invoke(app, ["train", recipe, "output_dir=" + recipe + ".run"])
    assert again.exit_code == 2
    assert "already holds a run" in again.stderr


def test_a_run_validates_and_saves_once_per_epoch(write_recipe, read_metrics, steps_saved):
    each = {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": None}
    recipe = write_recipe(data={"validation_fraction": 0.2}, train={"num_train_epochs": 3, **each})
    run_dir = train(recipe).run_dir
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6]
    assert [line["epoch"] for line in lines if "loss" in line][1::2] == [1.0, 2.0, 3.0]
    assert steps_saved(run_dir) == [2, 4, 6]


def test_a_run_can_end_before_its_schedule(write_recipe, read_metrics):
    recipe = write_recipe(train={"warmup_ratio": 0.25, "max_steps": 8})
    whole = [line["learning_rate"] for line in read_metrics(train(recipe).run_dir)]
    words = ["train.max_steps=4", "train.lr_scheduler_steps=8"]
    part = train(recipe, words, overwrite=True).run_dir
    assert [line["learning_rate"] for line in read_metrics(part)] == whole[:4]
    with pytest.raises(UserError) as caught:
        train(recipe, ["train.max_steps=-1", "train.lr_scheduler_steps=3"], overwrite=True)
    assert caught.value.key == "train.lr_scheduler_steps"
    assert "6 steps of the run" in caught.value.message
