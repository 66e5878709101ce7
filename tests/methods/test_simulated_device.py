"""Tensors left on the CPU, found without a GPU: a device whose tensors refuse those of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("activation", "weight", "dropout", "output activation", "output weight", "plain")


# A process of its own: torch registers one other device type for the life of a process.
@pytest.mark.slow
def test_training_and_generation_stay_on_the_device():
    script = Path(__file__).with_name("sim_check.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {row.pop("name"): row for row in map(json.loads, done.stdout.splitlines())}
    assert tuple(found) == CASES
    for name, row in found.items():
        assert "error" not in row, (name, done.stderr)
        assert row["refused"]
        assert row["devices"] == ["sim:0"]
        assert row["num_tokens"] > 8
        if name != "dropout":  # whose masks another generator draws
            assert row["loss"][1] == pytest.approx(row["loss"][0], rel=1e-5)
            assert row["norm"][1] == pytest.approx(row["norm"][0], rel=1e-4)
