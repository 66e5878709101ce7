"""The vocabulary of arguments: one alias for each thing that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wegeft_cli.errors import UserError

if TYPE_CHECKING:
    from wegeft_cli.workflows.publish import HubTarget

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.learning_rate=2e-4."),
]
AdapterArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="ADAPTER",
        help="An adapter folder or a run folder; left out: the newest finished run under runs/.",
    ),
]
TargetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TARGET",
        help="An adapter, run or model folder, or a hub id; left out: the newest finished run.",
    ),
]
TargetsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TARGET",
        help="An adapter, run or model folder, or a hub id; left out: the newest finished run; for "
        "--task glue, fgvc or vtab a run of each set.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="PATH", help="The base model, where it is not as recorded."),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", metavar="DIR", help="Folder with <set>/test.json; left out: the hub."
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Only the first so many rows of each set."),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="REV", help="The base's hub revision, where it is not as recorded."
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="REPO",
        help="Upload what was written to this hub repository (owner/name); private when new.",
    ),
]
PublicOption = Annotated[
    bool, typer.Option("--public", help="With --push-to-hub: make a new repository public.")
]


def hub_target(repo_id: str | None, is_public: bool) -> HubTarget | None:
    """Give where --push-to-hub and --public send a folder, None for nowhere.

    Args:
        repo_id: The repository.
        is_public: Whether a new one is public.

    Returns:
        The target.

    Raises:
        UserError: If there is --public alone.
    """
    if repo_id is None:
        if is_public:
            message = "says nothing without --push-to-hub"
            raise UserError(message, key="--public", hint="name the repository, or leave it out")
        return None
    from wegeft_cli.workflows.publish import HubTarget

    return HubTarget(repo_id, is_public)
