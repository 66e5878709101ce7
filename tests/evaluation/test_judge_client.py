"""A judge that answers slowly, without end, or something else than JSON; files with gaps."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.evaluation.judged import judge_client
from wegeft_cli.evaluation.judged.judge_client import JudgeRequest, OpenAIJudge, query_judge
from wegeft_cli.evaluation.judged.mt_bench_questions import load_questions
from wegeft_cli.evaluation.judged.mt_bench_ratings import load_judge_files, read_judgments

REQUEST = JudgeRequest(0, ({"role": "user", "content": "Rate."},), 0.0, 8, {})
PART = b"x" * 65536


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for part in self.server.parts():  # type: ignore[attr-defined]
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a server of the given parts of an answer, and returns a judge."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def start(parts):
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        server.parts = parts
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        judge = OpenAIJudge(address, "strict", sleep=lambda seconds: None)
        servers.append((server, thread, judge))
        return judge

    yield start
    for server, thread, judge in servers:
        judge._client.close()
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_answer_without_end_is_cut_off(serve):
    num_sent = 0

    def parts():
        nonlocal num_sent
        while num_sent < 4000:
            num_sent += 1
            yield PART

    with pytest.raises(UserError, match="more than 4 MiB as one answer"):
        serve(parts).ask(REQUEST)
    assert num_sent < 1000


def test_a_slow_answer_is_given_up(serve, monkeypatch):
    monkeypatch.setattr(judge_client, "_TRY_SECONDS", 0.3)

    def parts():
        for _ in range(100):
            time.sleep(0.05)
            yield b" "

    start = time.monotonic()
    with pytest.raises(MachineError, match=r"in 6 tries: ReadTimeout: .* not complete after 0.3 s"):
        serve(parts).ask(REQUEST)
    assert time.monotonic() - start < 6
    monkeypatch.setattr(judge_client, "_QUESTION_SECONDS", 0.5)
    with pytest.raises(MachineError, match="in 1 try: "):
        serve(parts).ask(REQUEST)


@pytest.mark.parametrize(
    "content", [b"<html>", b"\xff\xfe", b"[]", b"[" * 100_000, b'{"choices": []}', b"1e999"]
)
def test_an_answer_that_is_no_chat_completion_is_an_error(serve, content):
    with pytest.raises(UserError, match="not as OpenAI's chat completions"):
        serve(lambda: [content]).ask(REQUEST)


def test_an_interruption_does_not_wait_for_a_slow_judge(monkeypatch):
    monkeypatch.setattr(judge_client, "_GRACE_SECONDS", 0.3)

    class Slow:
        model = "slow"

        def ask(self, request):
            time.sleep(30)

    def check():
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        query_judge(Slow(), [REQUEST], known={}, check=check)
    assert time.monotonic() - start < 5


NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question} {ref_answer_1}", "'ref_answer_1'"),
        ("{question} {", "cannot be filled in"),
        ("{} {question}", "cannot be filled in"),
        ({"text": 1}, "are not texts"),
        (None, "are not texts"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_named(tmp_path, template, message):
    folder = tmp_path / "mt_bench"
    folder.mkdir()
    question = {"question_id": 81, "category": "writing", "turns": ["Ask?", "And?"]}
    (folder / "question.jsonl").write_text(json.dumps(question))
    rows = [
        {"name": name, "system_prompt": "Judge.", "prompt_template": "{question}"} for name in NAMES
    ]
    rows[0]["prompt_template"] = template
    (folder / "judge_prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = load_questions(tmp_path, None)
    with pytest.raises(UserError, match=message) as caught:
        load_judge_files(tmp_path, questions)
    assert "judge_prompts.jsonl:1" in str(caught.value.file)


def test_judgments_with_other_types_are_read_or_named(tmp_path):
    folder = tmp_path / "mt_bench"
    folder.mkdir()
    question = {"question_id": 81, "category": "writing", "turns": ["Ask?", "And?"]}
    (folder / "question.jsonl").write_text(json.dumps(question))
    rows = [{"question_id": 81, "turn": turn, "score": 5, "judge": {"a": 1}} for turn in (1, 2)]
    rows += [{"question_id": [81], "turn": 1, "score": 5, "judge": 3}]
    path = tmp_path / "judgments.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert len(read_judgments(path, load_questions(tmp_path, None))) == 2
