"""What judged tasks have in common: a judge is asked, and its verdicts are kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

NUM_AT_A_TIME = 4
"""Questions that a judge answers side by side."""


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
    """Whoever answers a chat."""

    @property
    def model(self) -> str:
        """Its name, as judgment files tell it."""
        ...

    def ask(self, request: JudgeRequest) -> str:
        """The judge's words.

        Args:
            request: The question.

        Returns:
            Its answer.

        Raises:
            UserError: If the address, the key or the model is refused.
            MachineError: If no answer came after several tries.
        """
        ...


def ask_judge(
    judge: Judge,
    requests: Sequence[JudgeRequest],
    *,
    known: Mapping[int, str],
    on_answer: Callable[[int, str], None] = lambda number, text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, str]:
    """Ask all questions, some of them side by side.

    Args:
        judge: Whom.
        requests: The questions.
        known: Number -> answer, from an earlier call that was cut off; these are not asked again.
        on_answer: Called with each answer as it comes.
        on_progress: Called with (questions answered, questions in all).

    Returns:
        Number -> the judge's words, for all requests.

    Raises:
        UserError: If the judge refuses; the answers so far were handed to `on_answer`.
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
            # What is on its way has been paid for.
            for future, number in running.items():
                if future.exception() is None:
                    on_answer(number, future.result())
            raise
    return dict(sorted(answers.items()))
