"""Client of a judge with OpenAI's chat completions API."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from wegeft_cli.errors import MachineError, UserError

KEY_VARIABLE = "WEGEFT_JUDGE_API_KEY"
"""Environment variable of the judge's key, which is never logged or written."""

_PATH = "/chat/completions"
_TRIES = 6
_TIMEOUT_SECONDS = 120.0
_LONGEST_WAIT_SECONDS = 60.0
_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_MAX_SHOWN = 300


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
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # Redirects are not followed: the key is for this address.
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT_SECONDS)

    @property
    def model(self) -> str:
        """The judge's name."""
        return self._model

    def ask(self, request: JudgeRequest) -> str:
        """Send one request, with retries while the server is busy or unreachable.

        Raises:
            UserError: If the server rejects the address, the key or the model.
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
        problem, wait_seconds = "", 0.0
        for attempt in range(_TRIES):
            if attempt:
                self._sleep(wait_seconds)
            wait_seconds = min(2.0**attempt, _LONGEST_WAIT_SECONDS)
            try:
                response = self._client.post(self.url, json=body)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                return self._read(response)
            problem = f"status {response.status_code}: {response.text[:_MAX_SHOWN]}"
            if response.status_code not in _TRY_AGAIN:
                raise UserError(
                    f"the judge at {self.url} refuses: {self._hide(problem)}",
                    key="--judge-url",
                    hint=self._hint(response.status_code),
                )
            wait_seconds = _wait_of(response.headers, wait_seconds)
        raise MachineError(
            f"the judge at {self.url} gave no answer in {_TRIES} tries: {self._hide(problem)}",
            key="--judge-url",
            hint="the answers and verdicts so far are cached: the same command resumes from them",
        )

    def _read(self, response: Any) -> str:
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.url} answers, but not as OpenAI's chat completions do: "
                f"{self._hide(response.text[:_MAX_SHOWN])}",
                key="--judge-url",
                hint="give the address up to /v1",
            ) from error
        # null is an empty answer: a verdict without a rating.
        return content if isinstance(content, str) else ""

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            return f"put the key into the environment variable {KEY_VARIABLE}"
        if status == 404:
            return "give the address up to /v1, and as --judge-model a name that is served there"
        return "look at what the address says"

    def _hide(self, text: str) -> str:
        """Remove the key, which some servers repeat in their error."""
        return text if not self._key else text.replace(self._key, "<key>")


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
            "the address holds a name or password, which would be written into results",
            key="--judge-url",
            hint=f"leave it out and put the key into {KEY_VARIABLE}",
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
    """What the verdict is written down with."""


class Judge(Protocol):
    """A model that answers chats."""

    @property
    def model(self) -> str:
        """Its name, as judgment files tell it."""
        ...

    def ask(self, request: JudgeRequest) -> str:
        """The judge's words.

        Raises:
            UserError: If the address, the key or the model is refused.
            MachineError: If no answer came after several tries.
        """
        ...


def query_judge(
    judge: Judge,
    requests: Sequence[JudgeRequest],
    *,
    known: Mapping[int, str],
    on_answer: Callable[[int, str], None] = lambda number, text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, str]:
    """Send all requests concurrently and return the judge's texts by number.

    Raises:
        UserError: If the judge refuses; the answers so far were passed to `on_answer`.
        MachineError: If it cannot be reached.
    """
    answers = {
        request.number: known[request.number] for request in requests if request.number in known
    }
    waiting = [request for request in requests if request.number not in answers]
    on_progress(len(answers), len(requests))
    with ThreadPoolExecutor(NUM_AT_A_TIME) as pool:
        running: dict[Future[str], int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < NUM_AT_A_TIME:
                    request = waiting.pop(0)
                    running[pool.submit(judge.ask, request)] = request.number
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    number = running.pop(future)
                    answers[number] = future.result()
                    on_answer(number, answers[number])
                    on_progress(len(answers), len(requests))
        except BaseException:
            waiting.clear()
            # Requests in progress are paid for: keep their answers.
            for future, number in running.items():
                if future.exception() is None:
                    on_answer(number, future.result())
            raise
    return dict(sorted(answers.items()))
