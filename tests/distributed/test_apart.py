"""Benchmarks on two processes of a training: errors, stops and waits; a sharded base generates."""

import json
from pathlib import Path

import pytest
from preloaded import run_group

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("score_apart.py")


@pytest.fixture(scope="module")
def told(build_llama_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    done = run_group(2, WORKER, build_llama_dir(), folder, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_work_takes_longer_than_the_timeout_of_the_group(told):
    assert [each["slow"] for each in told] == [None, None]


def test_a_stop_reaches_the_work_of_all_processes(told):
    assert [each["stop"] for each in told] == [["ValidationStopped", "", True]] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("judge", "--judge-url: the judge refuses (look there)"),
        ("harness", "--task: the harness refuses"),
    ],
)
def test_an_error_on_one_process_is_raised_on_both(told, name, message):
    assert [each[name] for each in told] == [["UserError", message, True]] * 2


@pytest.mark.parametrize("beams", [1, 2])
def test_a_sharded_base_generates_answers_of_unequal_number_and_length(told, beams):
    lengths = [len(ids) for each in told for ids in each[f"whole {beams}"]]
    assert len(set(lengths)) > 1 or beams > 1, lengths
    for each in told:
        assert each[f"shared {beams}"] == each[f"whole {beams}"]
