"""A step that is not finite is skipped, counted, told, and its rows are written down."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import MachineError
from wegeft_cli.models.loading import load_tokenizer
from wegeft_cli.planning.run_setup import build_setup
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.reporter import SilentReporter
from wegeft_cli.runs.train import train


@pytest.fixture
def poisoned(write_recipe, llama_dir, tmp_path, unequal_rows):
    """A function: a recipe in which one row holds a token whose embedding is not a number."""
    base = shutil.copytree(llama_dir, tmp_path / "base")
    tokenizer = load_tokenizer(str(base))
    token = tokenizer.convert_tokens_to_ids("<unk>")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    bad = {"prompt": "poison<unk>", "completion": " here"}
    rows = [*unequal_rows[:9], bad]

    def write(name="tiny", **sections):
        return write_recipe(name, rows=rows, model={"name_or_path": str(base)}, **sections)

    return write


def test_the_rows_of_a_skipped_step_are_written_down(poisoned, listener, read_run, read_metrics):
    result = train(poisoned(), reporter=listener)
    # Ten rows by four for two epochs: the bad row comes once in each.
    assert (result.status, result.num_skipped) == ("finished", 2)
    assert read_run(result.run_dir)["num_skipped"] == 2
    files = sorted((result.run_dir / "skipped").iterdir())
    assert len(files) == 2
    steps = []
    for file in files:
        told = json.loads(file.read_text())
        assert file.name == f"step-{told['step']:08d}.json"
        assert (told["loss"], told["grad_norm"]) == ("nan", "nan")
        bad = [row for row in told["rows"] if "poison" in row["text"]]
        assert [row["row"] for row in bad] == [9]
        assert len(bad[0]["token_ids"]) == len(bad[0]["learned"]) > sum(bad[0]["learned"]) > 0
        steps.append(told["step"])
        assert any(f"step {told['step']} was skipped" in text for text in listener.warnings)
    assert [x["step"] for x in read_metrics(result.run_dir)] == [
        step for step in range(1, 7) if step not in steps
    ]


def test_a_resumed_run_counts_on(poisoned, stop_after, read_adapter, read_run):
    whole = train(poisoned("whole"))
    recipe = poisoned("parts")
    train(recipe, should_stop=stop_after(4))
    resumed = train(recipe, resume="auto")
    assert resumed.num_skipped == whole.num_skipped == 2
    assert read_adapter(resumed.run_dir) == read_adapter(whole.run_dir)


@pytest.mark.parametrize(
    ("data", "numbered"),
    [({}, True), ({"packing": "bfd", "max_length": 48}, True), ({"streaming": True}, False)],
)
def test_the_rows_told_are_those_of_the_batches(write_recipe, data, numbered):
    recipe = write_recipe(data=data, train={"max_steps": 3, "per_device_train_batch_size": 2})
    processes = Processes.single()
    source = build_setup(load_recipe(recipe), processes, SilentReporter(), resuming=False).source
    told = list(source.examples_at(0))
    batches = list(source.micro_batches(0))
    assert len(told) >= 2
    assert all((row["row"] is not None) == numbered for row in told)
    # With one row after the other, what is no padding stands in the order of the rows.
    ids = [token for row in told for token in row["token_ids"]]
    shown = [
        batch.input_ids.flatten()
        if batch.attention_mask is None
        else batch.input_ids[batch.attention_mask.bool()]
        for batch in batches
    ]
    kept = torch.cat(shown).tolist()
    assert sum(batch.num_tokens for batch in batches) == len(ids)
    if data.get("packing") is None:
        assert kept == ids
    else:  # the shorter packs are filled up at the right
        assert [token for token in kept if token != 2] == [token for token in ids if token != 2]


def test_more_than_allowed_ends_the_run(poisoned, read_run):
    recipe = poisoned(train={"max_skipped_steps": 0})
    with pytest.raises(MachineError, match="diverged"):
        train(recipe)
    run_dir = recipe.parent / "runs" / "tiny"
    assert read_run(run_dir)["status"] == "failed"
    assert len(list((run_dir / "skipped").iterdir())) == 1
