"""Streamed batches: those of planned rows, on every process, and the same ones after a resume."""

import json
from dataclasses import replace

import pytest
import torch

from wegeft_cli.data.batches.sampler import build_step_plan
from wegeft_cli.data.batches.text import build_source, build_streamed_source
from wegeft_cli.data.text.dataset import build_datasets
from wegeft_cli.models.loading import load_tokenizer, pad_token_id
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.runs.train import train

NUM_STEPS = 8


@pytest.fixture
def load(write_recipe, unequal_rows):
    """A function: a recipe of ten rows, or of thirty in blocks of seven, and its tokenizer."""

    def read(*overrides, rows=unequal_rows):
        settings = {
            "train": {"per_device_train_batch_size": 2, "max_steps": NUM_STEPS},
            "data": {"streaming": True, "shuffle_buffer_size": 7},
        }
        loaded = load_recipe(write_recipe("streamed", rows=rows, **settings), overrides)
        return loaded, load_tokenizer(loaded.recipe.model.name_or_path)

    return read


def open_source(loaded, tokenizer, rank=0, world_size=1):
    recipe = loaded.recipe
    data = build_datasets(recipe.data, tokenizer=tokenizer, recipe_dir=loaded.path.parent)
    plan = build_step_plan(recipe, data, world_size)
    source = build_streamed_source(
        loaded, tokenizer, data, plan, rank=rank, pad_token_id=pad_token_id(tokenizer)
    )
    return source, data.report


def values(batch):
    return [x.tolist() if isinstance(x, torch.Tensor) else x for x in vars(batch).values()]


def walk(source, steps=range(NUM_STEPS)):
    """All that the loop asks a source for, step by step, in the loop's order."""
    seen = []
    for step in steps:
        labels = source.num_label_tokens(step)
        batches = [values(batch) for batch in source.micro_batches(step)]
        seen.append((labels, batches, source.num_tokens(step)))
        source.state_at(step + 1)
    return seen


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_unshuffled_batches_are_the_planned_ones(load, world_size, accumulation):
    loaded, tokenizer = load(
        "data.shuffle=false", f"train.gradient_accumulation_steps={accumulation}"
    )
    recipe = loaded.recipe
    whole = replace(recipe.data, streaming=False)
    data = build_datasets(whole, tokenizer=tokenizer, recipe_dir=None)
    plan = build_step_plan(recipe, data, world_size)
    assert plan.num_steps == NUM_STEPS > plan.steps_per_epoch  # several passes, with short ends
    for rank in range(world_size):
        planned = build_source(recipe, data, plan, rank=rank, pad_token_id=pad_token_id(tokenizer))
        streamed, report = open_source(loaded, tokenizer, rank, world_size)
        assert walk(streamed) == walk(planned)
        assert streamed.num_steps == planned.num_steps
        assert report.streaming
        assert streamed.padding_statistics() == {
            **planned.padding_statistics(),
            "estimated_from_rows": 10,
            "grouped_padding_share": None,  # a stream cannot be grouped by length
            "packed_padding_share": None,  # or packed
        }


@pytest.mark.parametrize("weights", [False, True])
def test_a_resumed_source_gives_the_same_batches(load, unequal_rows, tmp_path, weights):
    overrides = []
    if weights:
        other = tmp_path / "other.jsonl"
        other.write_text("".join(json.dumps(row) + "\n" for row in unequal_rows[:3]))
        overrides = [
            f"data.train=[{{path: {tmp_path / 'streamed.jsonl'}, weight: 2}}, "
            f"{{path: {other}, weight: 1}}]"
        ]
    loaded, tokenizer = load(*overrides, rows=unequal_rows * 3)
    source, _ = open_source(loaded, tokenizer)
    seen, states = [], []
    for step in range(NUM_STEPS):
        states.append(json.loads(json.dumps(source.state_at(step))))
        seen += walk(source, [step])
    assert len({json.dumps(state) for state in states}) == NUM_STEPS
    for step in range(1, NUM_STEPS):
        again, _ = open_source(loaded, tokenizer)
        again.seek(step, states[step])
        assert again.state_at(step) == states[step]
        assert walk(again, range(step, NUM_STEPS)) == seen[step:]
        assert again.epoch_at(NUM_STEPS) == source.epoch_at(NUM_STEPS)


def test_shuffled_processes_share_each_step(load, unequal_rows):
    def rows_of(source, step):
        return [
            ids[mask.bool()].tolist()
            for batch in source.micro_batches(step)
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]

    loaded, tokenizer = load(rows=unequal_rows * 3)
    alone, _ = open_source(loaded, tokenizer)
    pair = [open_source(loaded, tokenizer, rank, 2)[0] for rank in range(2)]
    twice = [rows_of(alone, step) for step in range(NUM_STEPS)]
    assert twice[0] != twice[1]
    for step in range(NUM_STEPS // 2):
        shares = [rows_of(source, step) for source in pair]
        assert [len(share) for share in shares] == [2, 2]
        assert sorted(shares[0] + shares[1]) == sorted(twice[2 * step] + twice[2 * step + 1])
        assert len({source.num_label_tokens(step) for source in pair}) == 1


def test_a_step_that_is_forgotten_is_refused(load):
    source, _ = open_source(*load())
    walk(source, range(3))
    assert source.num_tokens(2) == source.num_tokens(2) > 0
    for ask in (source.num_tokens, source.num_label_tokens, source.state_at, source.epoch_at):
        with pytest.raises(ValueError, match="a stream at step 2"):
            ask(1)
    with pytest.raises(ValueError, match="a stream at step 2"):
        next(source.micro_batches(5))


def test_validation_rows_are_read_whole(load, tmp_path):
    loaded, tokenizer = load(f"data.validation=[{{path: {tmp_path / 'streamed.jsonl'}}}]")
    source, report = open_source(loaded, tokenizer)
    assert report.num_validation_rows == 10
    (batches,) = map(list, source.validation_batches().values())
    assert sum(len(batch.input_ids) for batch in batches) == 10
    assert len(list(source.validation_batches()["streamed"])) == len(batches)


def test_a_streamed_run_that_was_stopped_ends_like_one_that_was_not(
    write_recipe, unequal_rows, read_metrics, read_adapter, stop_after
):
    settings = {
        "data": {"streaming": True, "shuffle_buffer_size": 7},
        "train": {"max_steps": 6, "save_steps": 2},
        "adapter": {"dropout": 0.2},
    }
    rows = unequal_rows * 2
    whole = train(write_recipe("whole", rows=rows, **settings)).run_dir
    recipe = write_recipe("stopped", rows=rows, **settings)
    stopped = train(recipe, should_stop=stop_after(3))
    assert (stopped.status, stopped.num_steps) == ("interrupted", 3)
    resumed = train(recipe, resume="auto")
    assert (resumed.status, resumed.num_steps) == ("finished", 6)
    assert read_adapter(resumed.run_dir) == read_adapter(whole)
    assert read_metrics(resumed.run_dir) == read_metrics(whole)
