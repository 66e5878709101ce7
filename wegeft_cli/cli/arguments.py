"""Arguments and options that several commands take: one alias each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.learning_rate=2e-4."),
]
AdapterArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="ADAPTER",
        help="Adapter or run folder. Default: the newest finished run under runs/.",
    ),
]
TargetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TARGET",
        help="Adapter, run or model folder, or hub id. Default: the newest finished run.",
    ),
]
TargetsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TARGET",
        help="Adapter, run or model folder, or hub id. Default: the newest finished run. For "
        "--task glue, fgvc or vtab: one run per dataset.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object to standard output, and no other text."),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="PATH", help="Base model. Default: the recorded one."),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", metavar="DIR", help="Folder with <set>/test.json. Default: the hub."
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit", metavar="N", min=1, help="Use only the first N rows of each set. Default: all."
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="REV", help="Hub revision of the base. Default: the recorded one."
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="REPO",
        help="Upload the written folder to this hub repository (owner/name). A new repository is "
        "private.",
    ),
]
PublicOption = Annotated[
    bool, typer.Option("--public", help="With --push-to-hub: make a new repository public.")
]

AllowCodeOption = Annotated[
    bool,
    typer.Option("--allow-code-execution", help="Run model-written code in a sandbox."),
]
NumSamplesOption = Annotated[
    int | None,
    typer.Option(
        "--num-samples",
        metavar="N",
        min=1,
        help="Answers per code problem. Default: the protocol's.",
    ),
]
CodeTemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="T",
        min=0.0,
        help="Sampling temperature for code generation; 0 is greedy. Default: the protocol's.",
    ),
]
JudgeUrlOption = Annotated[
    str | None,
    typer.Option(
        "--judge-url",
        metavar="URL",
        help="OpenAI-compatible address of a judge model. Answers are sent only to this address.",
    ),
]
JudgeModelOption = Annotated[
    str | None,
    typer.Option("--judge-model", metavar="NAME", help="Model name of the judge at --judge-url."),
]
JudgmentsOption = Annotated[
    Path | None,
    typer.Option(
        "--judgments", metavar="FILE", help="Score the judgments in this file without a model."
    ),
]
TrustTaskCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-task-code",
        help="Run Python code of lm-eval task files under --data-dir (not sandboxed).",
    ),
]

SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System message. Default: none.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="NAME",
        help="Prompt format: a template's name, chat, or a .jinja file. Default: as in training, "
        "else the chat template, else plain.",
    ),
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="Use the text as the prompt; same as --template plain.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="T",
        help="Sampling temperature; 0 is greedy. Default: 0; 1 with --top-p, --top-k or --min-p.",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Sample from the most likely tokens with total probability P. Default: all tokens.",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k", metavar="K", help="Sample from the K most likely tokens. Default: all tokens."
    ),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="P",
        help="Sample from tokens with at least P times the highest probability. Default: 0.",
    ),
]
PenaltyOption = Annotated[
    float,
    typer.Option(
        "--repetition-penalty", metavar="X", help="Penalty on repeated tokens; 1 is none."
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Sampling seed.")]
LengthOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        min=1,
        help="Maximum length of an answer. Default: 512, or half of a smaller context.",
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="Text that ends an answer. Repeatable."),
]
