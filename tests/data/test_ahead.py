"""A thread makes what the next step needs, and nothing else is different."""

import json
import threading
from types import SimpleNamespace

import pytest

from wegeft_cli.data.batches.ahead import StepAhead
from wegeft_cli.data.text.streaming import open_stream
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSection, DataSource

SECONDS = 10


def test_the_next_step_is_made_while_one_is_computed():
    begun = [threading.Event() for _ in range(4)]
    made = []

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        begun[step].set()
        return step * 10

    ahead = StepAhead(make, num_steps=3)
    for step in range(3):
        assert ahead.take(step) == step * 10
        if step < 2:
            assert begun[step + 1].wait(SECONDS)
    ahead.forget()
    assert made == [(0, False), (1, False), (2, False)]  # none after the last step


def test_an_error_of_the_thread_belongs_to_its_step():
    def make(step):
        if step == 2:
            raise UserError("a bad row", file="rows.jsonl:7")
        return step

    ahead = StepAhead(make, num_steps=5)
    assert [ahead.take(0), ahead.take(1)] == [0, 1]
    for _ in range(2):
        with pytest.raises(UserError, match="a bad row") as caught:
            ahead.take(2)
        assert caught.value.file == "rows.jsonl:7"


def test_another_step_is_made_anew():
    made = []
    ahead = StepAhead(lambda step: made.append(step) or step, num_steps=9)
    assert ahead.take(3) == 3
    ahead.forget()
    assert ahead.take(0) == 0
    assert ahead.take(7) == 7
    ahead.forget()
    assert made == [3, 4, 0, 1, 7, 8]


def test_a_stream_is_read_ahead_and_its_faults_wait_for_their_step(
    tokenizer, write_rows, monkeypatch
):
    from wegeft_cli.data.batches import text
    from wegeft_cli.data.batches.sampler import StepPlan

    # A chunk of rows is tokenized at once: the bad row is in the second.
    monkeypatch.setattr("wegeft_cli.data.text.streaming.CHUNK_ROWS", 4)
    rows = [{"prompt": f"{i}?", "completion": f" {i}"} for i in range(8)]
    path = write_rows(rows)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": 5}) + "\n")
    section = DataSection(train=[DataSource(path=str(path))], streaming=True, shuffle=False)
    stream = open_stream(section, tokenizer, None, 0)
    plan = StepPlan(
        num_rows=9, per_device_batch_size=4, accumulation_steps=1, world_size=1, seed=0,
        shuffle=False, num_epochs=1, max_steps=5,
    )  # fmt: skip
    first = SimpleNamespace(state_at=lambda step: {})
    source = text.StreamedBatches(stream, plan, first=first, num_first=0, rank=0, pad_token_id=0)
    for step in range(2):
        assert source.num_label_tokens(step) > 0
        source._ahead._pending[1].exception()  # the thread is done with the step after this one
        assert source.state_at(step + 1)["chains"][0]["row"] == 4 * (step + 1)
        assert source.num_tokens(step) > 0
    with pytest.raises(UserError) as caught:
        source.num_label_tokens(2)
    assert f"{path}:9" in str(caught.value)
