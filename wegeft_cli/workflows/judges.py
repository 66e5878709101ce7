"""The judge of judged tasks: chosen by the user, asked once a question, its words kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.judging import Judge, JudgeRequest, ask_judge
from wegeft_cli.workflows.jobs import Asked


def choose_judge(options: Mapping[str, Any]) -> Judge | None:
    """Give the judge that the options name; None where they name none.

    Args:
        options: judge_url and judge_model, both or neither.

    Returns:
        The judge; nothing has been sent to it.

    Raises:
        UserError: If one of the two is missing, or the address is none.
    """
    url, model = options.get("judge_url"), options.get("judge_model")
    if url is None and model is None:
        return None
    if url is None or model is None:
        missing = "--judge-url" if url is None else "--judge-model"
        raise UserError(
            "a judge is an address and a model's name there", key=missing, hint=f"add {missing}"
        )
    from wegeft_cli.interop.judge import KEY_VARIABLE, OpenAIJudge

    return OpenAIJudge(url, model, os.environ.get(KEY_VARIABLE) or None)


def collect_verdicts(
    judge: Judge, requests: Sequence[JudgeRequest], asked: Asked
) -> dict[int, str]:
    """Ask the judge, this process its share of the questions.

    Verdicts are kept in the log as they come; those of another judge, or on another answer, do not
    count.

    Args:
        judge: Whom.
        requests: The questions.
        asked: Log and share.

    Returns:
        Number -> the judge's words, the same in every process.

    Raises:
        UserError: If the judge refuses.
        MachineError: If it cannot be reached.
    """
    log = asked.log
    prints = {request.number: _fingerprint(judge, request) for request in requests}
    kept = asked.share.agree({} if log is None else log.read())
    known = {
        number: kept[_place(number)]["text"]
        for number, told in prints.items()
        if kept.get(_place(number), {}).get("of") == told
    }

    def keep(number: int, text: str) -> None:
        if log is not None:
            log.append({_place(number): {"of": prints[number], "text": text}})

    mine = asked.share.deal(requests)
    done = f"{len(known)} of {len(requests)} verdicts are known" if known else ""
    if done:
        asked.warn(f"the judge is asked on: {done}")
    return asked.share.gather(ask_judge(judge, mine, known=known, on_answer=keep))


def name_answerer(model: Any, options: Mapping[str, Any], asked: Asked) -> str:
    """Give the name that public files carry: the target's folder, or the base's."""
    path = None if asked.title == "base" else options.get("target")
    if path is None:
        path = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(path).name if path else asked.title


def _place(number: int) -> int:
    """Where a verdict stands in a log that also holds answers: below zero."""
    return -1 - number


def _fingerprint(judge: Judge, request: JudgeRequest) -> str:
    text = json.dumps([judge.model, request.messages, request.temperature, request.max_tokens])
    return hashlib.sha256(text.encode()).hexdigest()
