"""Options of `wegeft eval` for code and for judged answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AllowCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution", help="Run the code that the model writes, in a sandbox."
    ),
]
NumSamplesOption = Annotated[
    int | None,
    typer.Option("--num-samples", metavar="N", min=1, help="Answers to each code problem."),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", min=0.0, help="Of code's draws; 0 is greedy."),
]
JudgeUrlOption = Annotated[
    str | None,
    typer.Option(
        "--judge-url",
        metavar="URL",
        help="An OpenAI-compatible address that judges answers; nothing is sent without it.",
    ),
]
JudgeModelOption = Annotated[
    str | None,
    typer.Option("--judge-model", metavar="NAME", help="The judge's name at that address."),
]
JudgmentsOption = Annotated[
    Path | None,
    typer.Option("--judgments", metavar="FILE", help="Score this judgment file, without a model."),
]
TrustTaskCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-task-code",
        help="Run Python that lm-eval task files under --data-dir name (without a sandbox).",
    ),
]
