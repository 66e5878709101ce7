"""A process that shares a base holds its part of it, and nothing of the files."""

import json
from pathlib import Path

import pytest
from preloaded import run_group

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("load_share.py")


@pytest.mark.parametrize("num_processes", [2, 3])
def test_a_share_is_read_and_gathered_without_a_copy(build_llama_dir, tmp_path, num_processes):
    """Three do not divide the 32 rows: parts are then of unequal size."""
    base_dir = build_llama_dir(max_shard_size="40KB")
    assert len(list(base_dir.glob("*.safetensors"))) > 1
    done = run_group(num_processes, WORKER, base_dir, tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(num_processes)]
    for each in told:
        whole, share = each["mapped"]
        assert whole > 0  # else this test says nothing
        assert share == 0
        assert each["same"]
        assert each["share"] == pytest.approx(1 / num_processes, rel=0.1)
    assert sum(each["share"] for each in told) == pytest.approx(1)
