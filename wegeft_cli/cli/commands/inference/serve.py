"""`wegeft serve`: an OpenAI-compatible address for an adapter, run or model."""

from __future__ import annotations

from typing import Annotated

import typer

from wegeft_cli.cli.arguments import BaseOption, TargetArgument
from wegeft_cli.cli.console import RichReporter, note, show


def serve(
    target: TargetArgument = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=PATH",
            help="Adapter or run folder, served under NAME. Repeatable; all share one base.",
        ),
    ] = None,
    base: BaseOption = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="Server: transformers, vllm, or auto (vLLM where it is installed).",
        ),
    ] = "auto",
    chat_template: Annotated[
        str,
        typer.Option(
            "--chat-template",
            metavar="CHOICE",
            help="Prompt format of conversations: trained (as in training), or base (the base's "
            "chat template).",
        ),
    ] = "trained",
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port", metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one."
        ),
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="WEGEFT_API_KEY",
            help="Key that every request must have. Default: none.",
        ),
    ] = None,
) -> None:
    """Serve an adapter, run or model at an OpenAI-compatible address. Ctrl-C ends it."""
    from wegeft_cli.inference.serving.serve import Address
    from wegeft_cli.inference.serving.serve import serve as run
    from wegeft_cli.inference.serving.targets import read_targets

    is_ready = False

    def announce(url: str, names: list[str]) -> None:
        nonlocal is_ready
        is_ready = True
        show(f"serving {', '.join(names)} at {url}", highlight=False, soft_wrap=True, markup=False)

    try:
        run(
            read_targets(target, adapter or [], base),
            backend=backend,
            address=Address(host, port, api_key),
            chat_template=chat_template,
            reporter=RichReporter(),
            on_ready=announce,
        )
    except KeyboardInterrupt:  # the usual end of a server
        if not is_ready:
            raise
    note("stopped")
