"""`wegeft eval --num-processes`: the rows are shared, and come back in order."""

import json
import sys

import pytest
from preloaded import run, run_group

from wegeft_cli.runs.train import train

TIMEOUT_SECONDS = 240


def evaluate(num_processes, run_dir, data_dir, output, limit):
    words = ["-m", "wegeft_cli", "eval", run_dir, "--task", "boolq", "--data-dir", data_dir]
    words += ["--output", output, "--max-new-tokens", "5", "--limit", str(limit), "--json"]
    if (num_processes, limit) == (2, 1):
        return run_group(num_processes, *words, timeout=TIMEOUT_SECONDS)
    if num_processes > 1:
        words += ["--num-processes", str(num_processes)]
    return run([sys.executable, *words], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)


@pytest.mark.slow
def test_shared_rows_are_all_rows_in_order(write_recipe, data_dir, tmp_path):
    """Of an odd number, and of one row, which leaves a process without any."""
    run_dir = train(write_recipe()).run_dir
    told, samples = {}, {}
    for num_processes, limit in ((1, 5), (2, 5), (2, 1)):
        output = tmp_path / f"{num_processes}-{limit}.json"
        done = evaluate(num_processes, run_dir, data_dir, output, limit)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert json.loads(output.read_text()) == result
        told[num_processes, limit] = result["results"]
        text = output.with_name(f"{output.stem}-samples.jsonl").read_text()
        samples[num_processes, limit] = text.splitlines()
    assert told[1, 5][0]["n"] == 5
    assert told[1, 5] == told[2, 5]
    assert samples[1, 5] == samples[2, 5]
    assert told[2, 1][0]["n"] == 1
    assert samples[2, 1] == samples[1, 5][:1]
