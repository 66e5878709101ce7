"""`make gpu`: the parts on small shapes, time limits, and the page."""

from __future__ import annotations

import json
import sys
import time

import preloaded
import pytest
import torch


@pytest.fixture
def bench_gpu(load_script):
    return load_script("bench_gpu")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["steps", "settings"])
def test_a_part_measures_small_shapes(bench_gpu, tmp_path, monkeypatch, part):
    monkeypatch.setattr(bench_gpu.subprocess, "Popen", preloaded.Popen)
    assert bench_gpu.main(["--small", "--parts", part, "--folder", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["parts"][part]["results"]
    assert not [row for row in rows if "error" in row]
    page = (tmp_path / "gpu.md").read_text()
    labels = [row["label"] for row in rows]
    assert all(f"| {label} |" in page for label in labels)
    if part == "steps":
        assert {"frozen", "DoRA r 16 (PEFT)", "VeRA r 256 (PEFT)"} <= set(labels)
    elif not torch.cuda.is_available():
        skipped = [row["label"] for row in rows if "skipped" in row]
        assert skipped == ["Liger kernels", "torch.compile"]
        assert all(row["is_close"] for row in rows if "allowed" in row)


def test_a_part_ends_at_its_limit_and_the_others_run(bench_gpu, tmp_path, monkeypatch):
    commands = {
        "steps": [sys.executable, "-c", "import time; time.sleep(60)"],
        "quickstart": [sys.executable, "-c", "raise SystemExit(3)"],
        "settings": [sys.executable, "-c", "print(1)"],
    }
    monkeypatch.setattr(bench_gpu, "make_command", lambda part, *_: commands[part])
    monkeypatch.setitem(bench_gpu.SECONDS, "steps", 0.3)
    start = time.monotonic()
    parts = ",".join(commands)
    assert bench_gpu.main(["--small", "--parts", parts, "--folder", str(tmp_path)]) == 1
    assert time.monotonic() - start < 20
    report = json.loads((tmp_path / "gpu.json").read_text())
    found = [part["status"] for part in report["parts"].values()]
    assert found == ["stopped at its time limit", "exit 3", "ok"]
    assert "stopped at its time limit" in (tmp_path / "gpu.md").read_text()


def test_all_parts_fit_into_nine_minutes(bench_gpu):
    assert sum(bench_gpu.SECONDS.values()) <= 540


def test_the_tests_that_a_device_runs_exist(bench_gpu, repository):
    assert all((repository / "tests" / name).is_dir() for name in bench_gpu.FOLDERS)
    command = bench_gpu.make_command("tests", repository, False)
    assert "not slow" in command


def test_outcomes_are_counted_with_and_without_workers(bench_gpu):
    counted = bench_gpu.count_tests(
        "tests/a.py::test_one PASSED  [ 10%]\n"
        "tests/a.py::test_two[x y] FAILED [ 20%]\n"
        "[gw1] [ 30%] PASSED tests/b.py::test_three \n"
        "[gw0] [ 40%] ERROR tests/b.py::test_four \n"
        "FAILED tests/a.py::test_two[x y] - AssertionError\n"
    )
    assert counted["counts"] == {"passed": 2, "failed": 1, "error": 1, "skipped": 0}
    assert counted["failed"] == ["tests/a.py::test_two[x y]", "tests/b.py::test_four"]
