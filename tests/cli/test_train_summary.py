"""What `wegeft train` says at the end: only what there is to say."""

from pathlib import Path

from wegeft_cli.cli.commands.train import summary_lines
from wegeft_cli.runs.run import TrainResult

PLAIN = TrainResult(Path("runs/a"), Path("runs/a/adapter"), "finished", 10, 1.0, 5)


def change(**values):
    return TrainResult(**{**vars(PLAIN), **values})


def test_a_plain_run_needs_no_more_words():
    assert list(summary_lines(PLAIN)) == []


def test_estimate_stands_beside_the_measurement():
    assert list(summary_lines(change(peak_memory_gib=1.234, estimated_memory_gib=2.0))) == [
        "memory: 1.23 GiB peak, 2.00 GiB estimated"
    ]
    assert list(summary_lines(change(estimated_memory_gib=2.0))) == ["memory: 2.00 GiB estimated"]


def test_the_best_step_is_told_with_what_the_adapter_is_of():
    best = {"best_step": 4, "best_metric": 0.5}
    (line,) = summary_lines(change(**best, adapter_step=4))
    assert line == "best validation: 0.5000 at step 4; the adapter is from that step"
    (line,) = summary_lines(change(**best, adapter_step=10))
    assert line.endswith("the adapter is from the last step")


def test_skipped_steps_and_waste_are_told():
    waste = {"padding_share": 0.25, "packed_sequences": None, "head_share": 0.4}
    of_stream = list(summary_lines(change(waste={**waste, "estimated_from_rows": 10})))
    assert any("(estimated from the first 10 rows)" in line for line in of_stream)
    lines = list(summary_lines(change(num_skipped=2, waste=waste)))
    assert "estimated from" not in "".join(lines)
    assert lines[0].startswith("skipped: 2 steps")
    assert str(Path("runs/a/skipped")) in lines[0]
    assert "25% of the positions" in lines[1]
    assert "40% of them" in lines[1]


def test_much_padding_names_the_key_that_removes_it():
    waste = {"padding_share": 0.5, "packed_sequences": None, "head_share": 0.4}
    grouped = {**waste, "grouped_padding_share": 0.06, "packed_padding_share": None}
    lines = list(summary_lines(change(waste=grouped)))
    assert lines[1] == (
        "the padding can be reduced: train.group_by_length: true to 6% (47% fewer positions)"
    )
    lines = list(summary_lines(change(waste={**grouped, "packed_padding_share": 0.0})))
    assert lines[1].endswith(", or data.packing: bfd to 0% (50% fewer positions)")
    for other in (0.45, None):
        lines = list(summary_lines(change(waste={**waste, "grouped_padding_share": other})))
        assert len(lines) == 1
