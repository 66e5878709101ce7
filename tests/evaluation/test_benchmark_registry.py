"""Benchmark families are found by folder, and looked up without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation import benchmarks
from wegeft_cli.evaluation.benchmarks import registry
from wegeft_cli.evaluation.benchmarks.base import BenchmarkContext, EvaluationRequest
from wegeft_cli.evaluation.evaluate import list_tasks

NEW_FAMILY = """
from dataclasses import dataclass

from wegeft_cli.evaluation.benchmarks.base import BenchmarkFamily
from wegeft_cli.evaluation.score import Score


@dataclass(frozen=True)
class Coin:
    name: str = "coin"
    protocol_name: str = "toss"
    num_examples: int = 2

    def cache_key(self):
        return {}

    def run(self, model, context):
        return Score("coin", "toss", 0.5, 1, 2, 0, None, "", "nowhere", [])

    def score_file(self, path):
        raise NotImplementedError


FAMILY = BenchmarkFamily(
    "coins",
    lambda name: "coin" if name.lower() == "coin" else None,
    lambda name, request: Coin(),
    lambda: [{"name": "coin", "file": None, "kind": "toss", "protocols": ["toss"]}],
)
"""


def test_one_new_file_adds_a_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "a_new_family"
    monkeypatch.setitem(sys.modules, f"{benchmarks.__name__}.{name}", None)
    monkeypatch.delitem(sys.modules, f"{benchmarks.__name__}.{name}")
    with pytest.raises(UserError, match="no task is called"):
        registry.check_benchmark("coin", "wegeft", must_fit=True)
    (tmp_path / f"{name}.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    registry.check_benchmark("coin", "wegeft", must_fit=True)
    registry.check_training_benchmark("Coin", "wegeft")
    (benchmark,) = registry.load_benchmarks(["COIN", "coin"], EvaluationRequest())
    assert benchmark.run(None, BenchmarkContext(1)).score == 0.5
    assert registry.load_benchmarks(["coin"], EvaluationRequest("toss"))
    with pytest.raises(UserError, match="`nonsense` does not score the task `coin`"):
        registry.load_benchmarks(["coin"], EvaluationRequest("nonsense"))
    assert list_tasks()["tasks"][-1]["type"] == "coins"
    assert registry.benchmark_name("Coin") == "coin"


@pytest.mark.parametrize("name", ["gsm8k", "humaneval", "mt-bench", "lm-eval:arc_easy", "arc_easi"])
def test_a_look_up_imports_no_torch(name: str) -> None:
    code = f"""
import sys
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks import registry
try:
    registry.check_benchmark({name!r}, "wegeft", must_fit=False)
    assert {name!r} != "arc_easi"
except UserError as fault:
    assert "arc_easy" in fault.hint
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
if {name!r} == "gsm8k":
    assert "wegeft_cli.evaluation.benchmarks.mt_bench" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["gsm8k", "humaneval", "mt_bench", "alpaca_eval", "lm-eval:any"])
def test_an_unknown_protocol_is_refused_for_every_family(name: str) -> None:
    with pytest.raises(UserError, match="nonsense") as caught:
        registry.load_benchmarks([name], EvaluationRequest("nonsense"))
    assert caught.value.key == "protocol"
