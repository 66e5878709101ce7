"""Client of a judge with OpenAI's chat completions API."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from wegeft_cli.errors import MachineError, UserError

KEY_VARIABLE = "WEGEFT_JUDGE_API_KEY"
"""Environment variable of the judge's key, which is never logged or written."""

_PATH = "/chat/completions"
_TRIES = 6
_TRY_SECONDS = 120.0
_QUESTION_SECONDS = 600.0
"""Time after which a question is not sent again."""
_MAX_ANSWER_BYTES = 4 << 20
_GRACE_SECONDS = 10.0
"""How long an interrupted evaluation waits for answers that the judge is writing."""
_LONGEST_WAIT_SECONDS = 60.0
_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_MAX_SHOWN = 300
_CHECK_SECONDS = 0.25


class OpenAIJudge:
    """A model behind an address.

    Args:
        url: Such as `http://localhost:8000/v1`.
        model: The model's name there.
        key: Bearer token. Default: none.
        sleep: Waits between retries.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import httpx

        self.url = check_judge_url(url)
        self._model = model
        self._key = key
        self._sleep = sleep
        headers = {"Accept-Encoding": "identity"}
        headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        # Redirects are not followed: the key is for this address.
        self._client = httpx.Client(headers=headers, timeout=_TRY_SECONDS)

    @property
    def model(self) -> str:
        """The judge's name."""
        return self._model

    def ask(self, request: JudgeRequest) -> str:
        """Send one request, with retries while the server is busy or unreachable.

        A try takes at most two minutes, a question ten.

        Raises:
            UserError: If the server rejects the address, the key or the model, or its answer is too
                long.
            MachineError: If there is no answer after several retries.
        """
        import httpx

        body = {
            "model": self._model,
            "messages": [dict(message) for message in request.messages],
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "n": 1,
        }
        problem, wait_seconds, num_tries = "", 0.0, 0
        end = time.monotonic() + _QUESTION_SECONDS
        while num_tries < _TRIES and time.monotonic() + wait_seconds < end:
            if num_tries:
                self._sleep(wait_seconds)
            wait_seconds = min(2.0**num_tries, _LONGEST_WAIT_SECONDS)
            num_tries += 1
            try:
                response, content = self._post(body)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                return self._read(content)
            problem = f"status {response.status_code}: {_show(content)}"
            if response.status_code not in _TRY_AGAIN:
                raise UserError(
                    f"the judge at {self.url} refuses: {self._hide(problem)}",
                    key="--judge-url",
                    hint=self._hint(response.status_code),
                )
            wait_seconds = _wait_of(response.headers, wait_seconds)
        tries = "1 try" if num_tries == 1 else f"{num_tries} tries"
        raise MachineError(
            f"the judge at {self.url} gave no answer in {tries}: {self._hide(problem)}",
            key="--judge-url",
            hint="the answers and verdicts so far are cached: the same command resumes from them",
        )

    def _post(self, body: Mapping[str, Any]) -> tuple[Any, bytes]:
        """Return the response and its content, which is read within the limits."""
        import httpx

        end = time.monotonic() + _TRY_SECONDS
        content = bytearray()
        with self._client.stream("POST", self.url, json=body) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > _MAX_ANSWER_BYTES:
                    raise UserError(
                        f"the judge at {self.url} sends more than "
                        f"{_MAX_ANSWER_BYTES >> 20} MiB as one answer: {_show(content)}",
                        key="--judge-url",
                        hint="give the address of an API of chat completions, up to /v1",
                    )
                if time.monotonic() > end:
                    raise httpx.ReadTimeout(f"the answer is not complete after {_TRY_SECONDS:g} s")
        return response, bytes(content)

    def _read(self, content: bytes) -> str:
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.url} answers, but not as OpenAI's chat completions do: "
                f"{self._hide(_show(content))}",
                key="--judge-url",
                hint="give the address up to /v1",
            ) from error
        # null is an empty answer: a verdict without a rating.
        return text if isinstance(text, str) else ""

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            return f"put the key into the environment variable {KEY_VARIABLE}"
        if status == 404:
            return "give the address up to /v1, and as --judge-model a name that is served there"
        return "look at what the address says"

    def _hide(self, text: str) -> str:
        """Remove the key, which some servers repeat in their error."""
        return text if not self._key else text.replace(self._key, "<key>")


def _show(content: bytes | bytearray) -> str:
    return content[:_MAX_SHOWN].decode(errors="replace")


def check_judge_url(url: str) -> str:
    """Return the full address of the chat completions.

    Raises:
        UserError: If it is no address, or contains a password, which results would record.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"{url!r} is no address",
            key="--judge-url",
            hint="give one such as http://localhost:8000/v1",
        )
    if parts.username is not None or parts.password is not None:
        raise UserError(
            "the address contains a name or password, which would be written into results",
            key="--judge-url",
            hint=f"remove it and put the key into {KEY_VARIABLE}",
        )
    address = url.rstrip("/")
    return address if address.endswith(_PATH) else address + _PATH


def _wait_of(headers: Mapping[str, str], otherwise: float) -> float:
    """Return the server's `retry-after` in seconds, within limits."""
    try:
        asked = float(headers.get("retry-after", ""))
    except ValueError:
        return otherwise
    return min(max(asked, 0.0), _LONGEST_WAIT_SECONDS) if math.isfinite(asked) else otherwise


NUM_AT_A_TIME = 4
"""Concurrent requests."""


@dataclass(frozen=True)
class JudgeRequest:
    """One question to the judge."""

    number: int
    """Among the questions of an evaluation, from 0."""
    messages: tuple[Mapping[str, str], ...]
    """Chat messages: role and content."""
    temperature: float
    max_tokens: int
    context: Mapping[str, Any]
    """Values that are written to the file of verdicts."""


class Judge(Protocol):
    """A model that answers chats."""

    @property
    def model(self) -> str:
        """Its name in files of verdicts."""
        ...

    def ask(self, request: JudgeRequest) -> str:
        """Return the judge's text.

        Raises:
            UserError: If the address, the key or the model is refused.
            MachineError: If there is no answer after several tries.
        """
        ...


def query_judge(
    judge: Judge,
    requests: Sequence[JudgeRequest],
    *,
    known: Mapping[int, str],
    on_answer: Callable[[int, str], None] = lambda number, text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[], None] = lambda: None,
) -> dict[int, str]:
    """Send all requests concurrently and return the judge's texts by number.

    `check` is called a few times per second and may raise.

    Raises:
        UserError: If the judge refuses; the answers so far were passed to `on_answer`.
        MachineError: If it cannot be reached.
    """
    answers = {
        request.number: known[request.number] for request in requests if request.number in known
    }
    waiting = [request for request in requests if request.number not in answers]
    on_progress(len(answers), len(requests))
    running: dict[Future[str], int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < NUM_AT_A_TIME:
                request = waiting.pop(0)
                running[_start(judge, request)] = request.number
            done, _ = wait(running, _CHECK_SECONDS, return_when=FIRST_COMPLETED)
            check()
            for future in done:
                number = running.pop(future)
                answers[number] = future.result()
                on_answer(number, answers[number])
                on_progress(len(answers), len(requests))
    except BaseException:
        # Requests in progress are paid for: keep their answers.
        done, _ = wait(running, _GRACE_SECONDS)
        for future in done:
            if future.exception() is None:
                on_answer(running[future], future.result())
        raise
    return dict(sorted(answers.items()))


def _start(judge: Judge, request: JudgeRequest) -> Future[str]:
    """Send a request in a thread that does not keep the process from ending."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(judge.ask(request))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
