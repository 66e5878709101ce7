"""`wegeft eval --num-processes`: the rows are shared, and come back in order."""

import json
import os
import subprocess
import sys

import pytest

from wegeft_cli.workflows.launch import words_without
from wegeft_cli.workflows.train import train

TIMEOUT_SECONDS = 240


def evaluate(run_dir, data_dir, output, *words):
    command = [sys.executable, "-m", "wegeft_cli", "eval", str(run_dir), "--task", "boolq"]
    command += ["--data-dir", str(data_dir), "--output", str(output), "--max-new-tokens", "5"]
    return subprocess.run(
        [*command, "--json", *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("limit", [5, 1])
def test_shared_rows_are_all_rows_in_order(write_recipe, data_dir, tmp_path, limit):
    """Of an odd number, and of one, which leaves a process without any."""
    run_dir = train(write_recipe()).run_dir
    told, samples = [], []
    for num_processes in (1, 2):
        output = tmp_path / f"{num_processes}.json"
        words = [] if num_processes == 1 else ["--num-processes", str(num_processes)]
        done = evaluate(run_dir, data_dir, output, "--limit", str(limit), *words)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert json.loads(output.read_text()) == result
        told.append({**result, "samples_path": None})
        samples.append(output.with_name(f"{num_processes}-samples.jsonl").read_text())
    assert told[0]["results"][0]["n"] == limit
    assert told[0]["results"] == told[1]["results"]
    assert samples[0] == samples[1]
    assert len(samples[0].splitlines()) == limit


def test_the_option_alone_is_taken_out():
    words = ["eval", "--num-processes", "2", "x", "--task=a", "--num-processes=3", "--limit", "2"]
    assert words_without("--num-processes", words) == ["eval", "x", "--task=a", "--limit", "2"]
