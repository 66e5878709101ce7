"""`wegeft eval --num-processes 2` of code, judged answers and lm-eval: as by one process."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from preloaded import run, run_group

TIMEOUT_SECONDS = 240
KINDS = ["humaneval", "mt_bench", "alpaca_eval", "lm-eval:tiny_choice"]
PROBLEM = {
    "prompt": 'def double(n):\n    """Twice n."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
}
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}} is"
doc_to_choice: ["one", "two"]
doc_to_target: gold
"""


class Judge(ThreadingHTTPServer):
    """Rates by the length of what it is asked, so that each answer has its own verdict."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Judge = self.server  # type: ignore[assignment]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with server.lock:
            server.asked.append(text)
        first, second = (1, 2) if len(text) % 2 else (2, 1)
        said = f"[[{len(text) % 10 + 1}]] [{{'model': 'model_1', 'rank': {first}}}, "
        said += f"{{'model': 'model_2', 'rank': {second}}}]"
        told = json.dumps(
            {"choices": [{"message": {"role": "assistant", "content": said}}]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def judge():
    with Judge() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Small sets of every kind, of a number of rows that two processes cannot halve."""
    folder = tmp_path / "data"
    for name in ("mt_bench", "alpaca_eval", "lm-eval"):
        (folder / name).mkdir(parents=True)
    problems = "".join(
        json.dumps({"task_id": f"HumanEval/{n}", **PROBLEM}) + "\n" for n in range(3)
    )
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(problems.encode()))
    write_lines(
        folder / "mt_bench/question.jsonl",
        [
            {"question_id": 81 + n, "category": name, "turns": [f"Ask {n}?", f"And {n}?"]}
            for n, name in enumerate(("writing", "stem", "roleplay"))
        ],
    )
    write_lines(
        folder / "mt_bench/judge_prompts.jsonl",
        [
            {"name": name, "type": "single", "system_prompt": "Judge.", "prompt_template": text}
            for name, text in {
                "single-v1": "Q {question} A {answer}",
                "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
                "single-v1-multi-turn": "Q {question_2} A {answer_2}",
                "single-math-v1-multi-turn": "Q {question_2} R {ref_answer_2} A {answer_2}",
            }.items()
        ],
    )
    rows = [
        {"instruction": f"Do {n}.", "output": f"done {n}", "generator": "old", "dataset": "x"}
        for n in range(3)
    ]
    (folder / "alpaca_eval/alpaca_eval.json").write_text(json.dumps(rows))
    (folder / "alpaca_eval/alpaca_eval.txt").write_text(
        "<|im_start|>system\nYou rank.\n<|im_end|>\n<|im_start|>user\n"
        "{instruction} | {output_1} | {output_2}\n<|im_end|>"
    )
    path = folder / "lm-eval/rows.jsonl"
    write_lines(path, [{"question": f"{n} + {n}", "gold": n % 2} for n in range(3)])
    (folder / "lm-eval/tiny.yaml").write_text(CHOICE.format(rows=path))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_every_kind_is_scored_by_two_processes_as_by_one(sets, llama_dir, judge, tmp_path):
    told: dict[str, dict[str, Any]] = {}
    for count in ("1", "2"):
        place = tmp_path / count
        place.mkdir()
        words = ["-m", "wegeft_cli", "eval", llama_dir]
        words += [word for kind in KINDS for word in ("--task", kind)]
        words += ["--data-dir", str(sets), "--output", place / "out.json", "--max-new-tokens", "6"]
        words += ["--allow-code-execution", "--num-samples", "3", "--temperature", "0.8"]
        words += ["--judge-url", f"http://127.0.0.1:{judge.server_address[1]}/v1"]
        words += ["--judge-model", "strict"]
        if count == "1":
            command = [sys.executable, *words]
            done = run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        else:
            done = run_group(2, *words, timeout=TIMEOUT_SECONDS)
        assert done.returncode == 0, done.stderr
        asked, judge.asked = sorted(judge.asked), []
        told[count] = {
            "results": [
                {key: value for key, value in row.items() if key != "files"}
                for row in json.loads((place / "out.json").read_text())["results"]
            ],
            "samples": (place / "out-samples.jsonl").read_text().splitlines(),
            "asked": asked,
        }
    assert [row["task"] for row in told["1"]["results"]] == KINDS
    assert len(told["1"]["asked"]) == 2 * 3 + 3
    assert len(told["1"]["samples"]) == 9 + 6 + 3 + 3
    assert told["1"] == told["2"]
