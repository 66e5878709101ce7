"""A process that shares a base holds its part of it, and nothing of the files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("load_share.py")


@pytest.mark.parametrize("num_processes", [2, 3])
def test_a_share_is_read_and_gathered_without_a_copy(build_llama_dir, tmp_path, num_processes):
    """Three do not divide the 32 rows: parts are then of unequal size."""
    base_dir = build_llama_dir(max_shard_size="40KB")
    assert len(list(base_dir.glob("*.safetensors"))) > 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_processes), str(WORKER), str(base_dir), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(num_processes)]
    for each in told:
        whole, share = each["mapped"]
        assert whole > 0  # else this test says nothing
        assert share == 0
        assert each["same"]
        assert each["share"] == pytest.approx(1 / num_processes, rel=0.1)
    assert sum(each["share"] for each in told) == pytest.approx(1)
