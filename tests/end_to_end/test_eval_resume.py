"""A killed evaluation goes on where it was; processes share the rows, none lost or doubled."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import preloaded
import pytest
import torch

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.evaluation import answers
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.evaluation.response_cache import ResponseCache

TIMEOUT_SECONDS = 240
NUM_ROWS = 12
SETTINGS = {"tasks": ["boolq"], "max_new_tokens": 20, "batch_size": 2}


class Interrupter:
    """Ends the evaluation once some rows are done, as Ctrl-C or a crash would."""

    def __init__(self, after=NUM_ROWS + 1):
        self.after = after
        self.notes = []
        self.warnings = []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)

    @contextmanager
    def progress(self, title, total):
        def advance(done, **figures):
            if done >= self.after:
                raise KeyboardInterrupt

        yield advance


@pytest.fixture
def rows_dir(tmp_path, adapters_rows):
    (tmp_path / "data" / "boolq").mkdir(parents=True)
    rows = [{**row, "instruction": f"{n} {row['instruction']}"} for n, row in
            enumerate(adapters_rows * 2)]  # fmt: skip
    (tmp_path / "data" / "boolq" / "test.json").write_text(json.dumps(rows))
    return tmp_path / "data"


@pytest.fixture
def asked(monkeypatch):
    """The prompts that the model was asked."""
    prompts = []
    plain = answers.generate_texts

    def count(model, tokenizer, texts, *more, **named):
        prompts.extend(texts.texts)
        return plain(model, tokenizer, texts, *more, **named)

    monkeypatch.setattr(answers, "generate_texts", count)
    return prompts


def test_a_killed_evaluation_goes_on_where_it_was(llama_dir, rows_dir, tmp_path, asked):
    settings = {**SETTINGS, "data_dir": rows_dir, "output": tmp_path / "a.json"}
    whole = evaluate(llama_dir, **{**settings, "output": tmp_path / "whole.json"})
    assert len(asked) == NUM_ROWS
    asked.clear()
    interrupter = Interrupter(after=5)
    with pytest.raises(KeyboardInterrupt):
        evaluate(llama_dir, **settings, reporter=interrupter)
    assert "the same command resumes" in interrupter.notes[0]
    logs = tmp_path / "a-samples.partial"
    (log,) = logs.glob("*/0.jsonl")
    num_kept = log.read_text().count("\n")
    assert 5 <= num_kept < NUM_ROWS
    # What the kill cut off is asked again.
    log.write_bytes(log.read_bytes() + b'{"index": 11, "answer": {"te')
    asked.clear()
    listener = Interrupter()
    result = evaluate(llama_dir, **settings, reporter=listener)
    assert len(asked) == NUM_ROWS - num_kept
    assert f"resuming after {num_kept} of {NUM_ROWS} answers" in listener.notes[0]
    assert result["results"] == whole["results"]
    samples = [(tmp_path / f"{name}-samples.jsonl").read_text() for name in ("a", "whole")]
    assert samples[0] == samples[1]
    assert not logs.exists()


@pytest.mark.parametrize(
    "change",
    [{"max_new_tokens": 19}, {"protocol": "gift"}, {"limit": 11}, "data"],
)
def test_answers_to_other_questions_are_not_taken_up(llama_dir, rows_dir, tmp_path, asked, change):
    settings = {**SETTINGS, "data_dir": rows_dir, "output": tmp_path / "a.json"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(llama_dir, **settings, reporter=Interrupter(after=5))
    if change == "data":
        file = rows_dir / "boolq" / "test.json"
        file.write_text(file.read_text() + "\n")
        change = {}
    asked.clear()
    evaluate(llama_dir, **{**settings, **change})
    # The same rows, fewer of them, are the same questions.
    expected = change.get("limit", NUM_ROWS)
    assert (len(asked) == expected) is ("limit" not in change)


def test_another_model_starts_anew(build_llama_dir, rows_dir, tmp_path, asked):
    settings = {**SETTINGS, "data_dir": rows_dir, "output": tmp_path / "a.json"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(build_llama_dir(), **settings, reporter=Interrupter(after=5))
    asked.clear()
    evaluate(build_llama_dir(seed=1), **settings)
    assert len(asked) == NUM_ROWS


def test_other_ends_of_an_answer_start_anew(llama_dir, rows_dir, tmp_path, asked):
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    settings = {**SETTINGS, "data_dir": rows_dir, "output": tmp_path / "a.json"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, **settings, reporter=Interrupter(after=5))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    asked.clear()
    evaluate(folder, **settings)
    assert len(asked) == NUM_ROWS


def test_a_log_survives_a_line_that_was_cut(tmp_path):
    log = ResponseCache(tmp_path, {"a": 1})
    log.append({3: {"text": "drei"}})
    with (log.folder / "0.jsonl").open("ab") as file:
        file.write(b'{"index": 4, "ans')
    again = ResponseCache(tmp_path, {"a": 1}, process_index=0)
    again.append({5: {"text": "f\u00fcnf\n"}})
    other = ResponseCache(tmp_path, {"a": 1}, process_index=1)
    other.append({7: {"text": "sieben"}})
    assert again.read() == {
        3: {"text": "drei"}, 5: {"text": "f\u00fcnf\n"}, 7: {"text": "sieben"},
    }  # fmt: skip
    assert ResponseCache(tmp_path, {"a": 2}).read() == {}


def test_shares_are_whole_and_even(monkeypatch):
    items = list(range(11))
    device = torch.device("cpu")
    shares = [Processes(rank, 3, device).shard(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert [len(share) for share in shares] == [4, 4, 3]
    assert Processes.single().shard(items) == items
    parts = [{2: "c", 0: "a"}, {1: "b"}]
    monkeypatch.setattr(Processes, "gather", lambda self, value: parts)
    merged = Processes(0, 2, device).merge({})
    assert list(merged.items()) == [(0, "a"), (1, "b"), (2, "c")]
    parts[0][1] = "a"
    with pytest.raises(RuntimeError, match="two processes"):
        Processes(0, 2, device).merge({})


def run_eval(*words, **more):
    return preloaded.Popen(
        [sys.executable, "-m", "wegeft_cli", "eval", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **more,
    )


@pytest.mark.slow
def test_two_processes_give_what_one_gives_also_after_a_kill(llama_dir, rows_dir, tmp_path):
    """SIGKILL in the middle of one process's work; two go on with what it left."""
    settings = {**SETTINGS, "data_dir": rows_dir, "max_new_tokens": 150}
    expected = evaluate(llama_dir, **settings, output=tmp_path / "one.json")
    output = tmp_path / "two.json"
    words = [llama_dir, "--task", "boolq", "--data-dir", rows_dir, "--max-new-tokens", "150"]
    words += ["--batch-size", "1", "--output", output]
    killed = run_eval(*words)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    logs = "two-samples.partial/*/0.jsonl"
    while not any(b"\n" in path.read_bytes() for path in tmp_path.glob(logs)):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not output.exists()
    both = run_eval(*words, "--num-processes", "2", "--json")
    told, errors = both.communicate(timeout=TIMEOUT_SECONDS)
    assert both.returncode == 0, errors
    assert "resuming after" in errors
    assert errors.count("resuming after") == 1
    result = json.loads(told)
    assert result == json.loads(output.read_text())
    row, alone = result["results"][0], expected["results"][0]
    assert row["generation"].pop("batch_size") == 1
    alone["generation"].pop("batch_size")
    assert row == alone
    samples = [(tmp_path / f"{name}-samples.jsonl").read_text() for name in ("one", "two")]
    assert samples[0] == samples[1]
    assert [json.loads(line)["index"] for line in samples[1].splitlines()] == list(range(NUM_ROWS))
