"""A judge behind an address that speaks OpenAI's chat completions; nothing else calls out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.evaluation.judging import JudgeRequest

KEY_VARIABLE = "WEGEFT_JUDGE_API_KEY"
"""The environment variable that holds the judge's key; never logged, never written."""

_PATH = "/chat/completions"
_TRIES = 6
_TIMEOUT_SECONDS = 120.0
_LONGEST_WAIT_SECONDS = 60.0
_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_MAX_TOLD = 300


class OpenAIJudge:
    """Asks a model behind an address.

    Args:
        url: Such as `http://localhost:8000/v1`.
        model: The model's name there.
        key: Sent as a bearer token; None sends none.
        sleep: Waits between tries.
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
        """Ask once, and again where the address is busy or away.

        Args:
            request: The question.

        Returns:
            The judge's words.

        Raises:
            UserError: If the address, the key or the model is refused.
            MachineError: If no answer came after several tries.
        """
        import httpx

        body = {
            "model": self._model,
            "messages": [dict(message) for message in request.messages],
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "n": 1,
        }
        told, wait_seconds = "", 0.0
        for attempt in range(_TRIES):
            if attempt:
                self._sleep(wait_seconds)
            wait_seconds = min(2.0**attempt, _LONGEST_WAIT_SECONDS)
            try:
                response = self._client.post(self.url, json=body)
            except httpx.HTTPError as error:
                told = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                return self._read(response)
            told = f"status {response.status_code}: {response.text[:_MAX_TOLD]}"
            if response.status_code not in _TRY_AGAIN:
                raise UserError(
                    f"the judge at {self.url} refuses: {self._hide(told)}",
                    key="--judge-url",
                    hint=self._hint(response.status_code),
                )
            wait_seconds = _wait_of(response.headers, wait_seconds)
        raise MachineError(
            f"the judge at {self.url} gave no answer in {_TRIES} tries: {self._hide(told)}",
            key="--judge-url",
            hint="the answers and verdicts so far are kept: the same command goes on from there",
        )

    def _read(self, response: Any) -> str:
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.url} answers, but not as OpenAI's chat completions do: "
                f"{self._hide(response.text[:_MAX_TOLD])}",
                key="--judge-url",
                hint="give the address up to /v1",
            ) from error
        # A model that says nothing says null; that is a verdict without a rating.
        return content if isinstance(content, str) else ""

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            return f"put the key into the environment variable {KEY_VARIABLE}"
        if status == 404:
            return "give the address up to /v1, and as --judge-model a name that is served there"
        return "look at what the address says"

    def _hide(self, text: str) -> str:
        """Some servers repeat the key that they refuse."""
        return text if not self._key else text.replace(self._key, "<key>")


def check_judge_url(url: str) -> str:
    """The full address of the chat completions.

    Args:
        url: Up to `/v1`, or up to the end.

    Returns:
        The address that is asked.

    Raises:
        UserError: If it is no address, or holds a password, which would be logged with it.
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
    """What the server asks to wait, within reason."""
    try:
        asked = float(headers.get("retry-after", ""))
    except ValueError:
        return otherwise
    return min(max(asked, 0.0), _LONGEST_WAIT_SECONDS) if math.isfinite(asked) else otherwise
