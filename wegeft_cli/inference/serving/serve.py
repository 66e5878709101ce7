"""`wegeft serve`: an OpenAI-compatible address for an adapter, a run or a merged model."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from wegeft_cli.errors import UserError
from wegeft_cli.inference.form_choice import CHAT_TEMPLATES
from wegeft_cli.inference.serving.targets import BASE, NamedTarget
from wegeft_cli.reporter import Reporter

BACKENDS = ("auto", "transformers", "vllm")
_SERVER_PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the key that it asks for."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None

    def bind(self) -> socket.socket:
        """Return a socket that listens at the address; port 0 takes a free one.

        Raises:
            UserError: If the port is taken, or the host is not one of this machine.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.host, self.port))
            bound.listen()  # now, or a second server could bind it while the models are loaded
        except (OSError, OverflowError) as error:
            bound.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"{self.host}:{self.port} cannot be bound: {reason}",
                key="--port",
                hint="stop the program that uses it, or give another --port (0 takes a free one)",
            ) from error
        return bound

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def serve(
    targets: Sequence[NamedTarget],
    *,
    backend: str = "auto",
    address: Address,
    chat_template: str = "trained",
    reporter: Reporter,
    on_ready: Callable[[str, list[str]], None] = lambda url, names: None,
) -> None:
    """Serve models until SIGINT or SIGTERM.

    Args:
        targets: A model, or adapters of one base.
        backend: auto, transformers or vllm. `auto` is vLLM where it is installed.
        chat_template: Prompt form of conversations: trained, or base (the base's chat template).
        on_ready: Called with the address and the models' names; by vLLM before it loads them.

    Raises:
        UserError: If an argument or a model is at fault, the port is taken, or a package is
            missing.
    """
    for value, key, choices in (
        (backend, "--backend", BACKENDS),
        (chat_template, "--chat-template", CHAT_TEMPLATES),
    ):
        if value not in choices:
            raise UserError(f"got {value!r}", key=key, hint=f"one of {', '.join(choices)}")
    if address.api_key == "":
        raise UserError("the key is empty", key="--api-key", hint="set one, or omit the option")
    backend = _choose_backend(backend)
    as_trained = chat_template == "trained"
    if not address.is_local and address.api_key is None:
        reporter.warn(
            f"every machine that reaches {address.host} can use these models; --api-key asks for a "
            "key"
        )
    with address.bind() as listener:
        port = listener.getsockname()[1]
        url = f"http://{f'[{address.host}]' if ':' in address.host else address.host}:{port}/v1"
        names = _list_names(targets)
        if backend == "vllm":
            from wegeft_cli.inference.serving.vllm_server import serve_by_vllm

            listener.close()
            reporter.note("vLLM loads the models; it reports when it is ready")
            on_ready(url, names)
            serve_by_vllm(
                targets,
                host=address.host,
                port=port,
                api_key=address.api_key,
                as_trained=as_trained,
                warn=reporter.warn,
            )
            return
        from wegeft_cli.inference.serving.transformers_server import (
            build_app,
            load_models,
            run_server,
        )

        served = load_models(targets, as_trained=as_trained, warn=reporter.warn)
        app = build_app(served, address.api_key)
        run_server(app, listener, lambda: on_ready(url, names))


def _list_names(targets: Sequence[NamedTarget]) -> list[str]:
    names = [one.name for one in targets]
    return names if targets[0].target.adapter is None else [*names, BASE]


def _choose_backend(backend: str) -> str:
    """Return transformers or vllm; raise UserError if its packages are missing."""
    if backend == "auto":
        backend = "transformers" if find_spec("vllm") is None else "vllm"
    if backend == "vllm":
        if find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed", key="--backend", hint="pip install 'wegeft-cli[vllm]'"
            )
        return backend
    missing = [name for name in _SERVER_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"transformers' server needs {', '.join(missing)}",
            key="--backend",
            hint="pip install 'wegeft-cli[serve]'",
        )
    if find_spec("transformers.cli.serving") is None:
        raise UserError(
            "this transformers has no server that wegeft can use",
            key="--backend",
            hint="pip install 'transformers>=5.8'",
        )
    return backend
