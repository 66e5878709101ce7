"""Arguments and options that several commands take: one alias each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wegeft_cli.cli.completion import complete_override, complete_recipe
from wegeft_cli.errors import UserError

if TYPE_CHECKING:
    from wegeft_cli.publishing.hub import HubTarget

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Recipe file, or the name of a shipped recipe.",
        autocompletion=complete_recipe,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides of the recipe, such as train.learning_rate=2e-4.",
        autocompletion=complete_override,
    ),
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
    typer.Option(
        "--base", metavar="PATH", help="Folder or hub id of the base. Default: the recorded base."
    ),
]
ChatTemplateOption = Annotated[
    str,
    typer.Option(
        "--chat-template",
        metavar="CHOICE",
        help="Chat template to write: base (the base's own) or trained (the prompt form of the "
        "training).",
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Folder with <set>/test.json of each test set. Default: the recipe's, else the hub.",
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
        "--revision",
        metavar="REV",
        help="Hub branch, tag or commit of the base. Default: the recorded one.",
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
    typer.Option(
        "--allow-code-execution",
        help="Allow code benchmarks to run the model's programs, in a sandbox.",
    ),
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
        help="OpenAI-compatible address of the model that judges open answers. They are sent only "
        "there.",
    ),
]
JudgeModelOption = Annotated[
    str | None,
    typer.Option("--judge-model", metavar="NAME", help="Name of the judge model at --judge-url."),
]
JudgmentsOption = Annotated[
    Path | None,
    typer.Option(
        "--judgments",
        metavar="FILE",
        help="Score the judgments in this JSONL file, without a model.",
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
    str | None,
    typer.Option("--system", metavar="TEXT", help="System message. Default: the training's."),
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
    bool, typer.Option("--raw", help="Use the text itself as the prompt, like --template plain.")
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
        "--repetition-penalty",
        metavar="X",
        help="Penalty on repeated tokens: above 1 discourages them, 1 is none.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the sampling.")]
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
    typer.Option("--stop", metavar="TEXT", help="End an answer at this text. Repeatable."),
]


def hub_target(repo_id: str | None, is_public: bool) -> HubTarget | None:
    """Return the target of --push-to-hub, or None; raise `UserError` if --public is alone."""
    if repo_id is None:
        if is_public:
            message = "requires --push-to-hub"
            raise UserError(message, key="--public", hint="set the repository, or remove --public")
        return None
    from wegeft_cli.publishing.hub import HubTarget

    return HubTarget(repo_id, is_public)


def is_model_name(text: str) -> bool:
    """Return whether a text is an existing path or has the form of a path or of a hub id."""
    return Path(text).exists() or not any(sign.isspace() for sign in text)
