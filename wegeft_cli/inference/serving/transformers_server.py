"""The server of `transformers serve`, with models that are loaded as `wegeft generate` does.

transformers' server loads folders by the name in a request. Here the models are in memory before it
starts: an adapter on a copy of the base's modules that shares the base's weights.
"""

from __future__ import annotations

import copy
import hmac
import inspect
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from torch import nn
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from wegeft_cli.data.text.trained_form import write_form
from wegeft_cli.errors import UserError
from wegeft_cli.generation.engine import context_length
from wegeft_cli.generation.stopping import stop_token_ids
from wegeft_cli.inference.defaults import GREEDY, default_new_tokens
from wegeft_cli.inference.prompt_format import PromptForm
from wegeft_cli.inference.serving.request_check import check_request
from wegeft_cli.inference.serving.targets import BASE, NamedTarget
from wegeft_cli.methods.registry import load_onto, method_of
from wegeft_cli.models.context import fitting_pad_id

_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
"""What is served; transformers' server can also load and unload models on request."""
_LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_SECONDS_TO_FINISH = 2
"""Time that a request has to finish after Ctrl-C."""


@dataclass(frozen=True)
class ServedModel:
    """A model in memory; its generation config has the settings of `wegeft generate`."""

    model: Any
    tokenizer: Any


def load_models(
    targets: Sequence[NamedTarget], *, as_trained: bool, warn: Callable[[str], None]
) -> dict[str, ServedModel]:
    """Load the models of a server by name; the base of adapters is one of them.

    Args:
        as_trained: Whether conversations have the prompt form of the training; else that of the
            tokenizer's chat template.

    Raises:
        UserError: If a model cannot be loaded, or its prompt form cannot be written.
    """
    first = targets[0]
    base, tokenizer = first.target.load_base(warn)
    if first.target.adapter is None:
        return {first.name: _prepare(base, tokenizer, first, as_trained)}
    served: dict[str, ServedModel] = {}
    for named in targets:
        adapter = named.target.adapter
        assert adapter is not None
        # A method that trains the base's own weights writes over them.
        trains_base = method_of(adapter).trains_in_place
        bare = named.target.load_base(warn)[0] if trains_base else share_weights(base)
        model = load_onto(bare, adapter, named.target.section, warn=warn).eval()
        served[named.name] = _prepare(model, copy.deepcopy(tokenizer), named, as_trained)
    return {**served, BASE: _prepare(base, tokenizer, first, as_trained)}


def share_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules with the model's own parameters and buffers."""
    shared: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _prepare(model: Any, tokenizer: Any, named: NamedTarget, as_trained: bool) -> ServedModel:
    if not as_trained and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            file=str(named.target.path),
            key="--chat-template",
            hint="use --chat-template trained",
        )
    form = named.choose_form(tokenizer) if as_trained else None
    if form is not None:
        tokenizer.chat_template = write_form(form.template, tokenizer)
    config = _build_config(model, tokenizer, form)
    for module in model.modules():
        # transformers fills what a request leaves open from the model's own config.
        if "generation_config" in vars(module):
            module.generation_config = config
    return ServedModel(model, tokenizer)


def _build_config(model: Any, tokenizer: Any, form: PromptForm | None) -> GenerationConfig:
    form = form or PromptForm.of_tokenizer(tokenizer)
    end_ids = stop_token_ids(model, tokenizer, GREEDY, form.find_turn_ends(tokenizer))
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end_ids[0] if end_ids else 0
    return GenerationConfig(
        do_sample=False,
        eos_token_id=end_ids or None,
        pad_token_id=fitting_pad_id(model, pad),
        max_new_tokens=default_new_tokens(model),
    )


class _Models:
    """transformers' model manager for models that are in memory already."""

    force_model = None

    def __init__(self, served: Mapping[str, ServedModel]) -> None:
        self.served = served
        self._started = int(time.time())

    def find(self, name: object) -> ServedModel:
        """Return a model by the name in a request; raise 404 if there is none."""
        found = self.served.get(name) if isinstance(name, str) else None
        if found is None:
            known = ", ".join(self.served)
            raise HTTPException(404, f"no model {name!r}; this server has {known}")
        return found

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        """Return text: the tokenizer alone is loaded."""
        return Modality.LLM

    def list_models(self) -> list[dict[str, Any]]:
        """Return the models as `/v1/models` lists them."""
        return [
            {"id": name, "object": "model", "created": self._started, "owned_by": "wegeft"}
            for name in self.served
        ]

    get_gen_models = list_models  # its name before transformers 5.24

    def shutdown(self) -> None:
        """Keep the models; the process ends with the server."""


class _AsInGenerate:
    """What every handler of a request does: greedy by default, and only models of this server."""

    model_manager: _Models
    needed: str
    """The request's field with the prompt."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Check a request, then answer it."""
        check_request(body, self.needed)
        return await super().handle_request(body, request_id)  # type: ignore[misc]

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        found = self.model_manager.find(body.get("model"))
        return body["model"], found.model, found.tokenizer

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        config = super()._build_generation_config(  # type: ignore[misc]
            body, model_generation_config, use_cb=use_cb
        )
        if body.get("generation_config") is not None:
            return config
        if all(body.get(name) is None for name in _LENGTHS):
            config.max_new_tokens = model_generation_config.max_new_tokens
        temperature, top_p = body.get("temperature"), body.get("top_p")
        config.do_sample = temperature is not None or top_p is not None
        if temperature is not None and float(temperature) == 0:
            config.do_sample = False
        if not config.do_sample:
            config.temperature = config.top_p = None
        return config


class _Chat(_AsInGenerate, ChatCompletionHandler):
    """Handles /v1/chat/completions."""

    needed = "messages"


class _Completion(_AsInGenerate, CompletionHandler):
    """Handles /v1/completions."""

    needed = "prompt"


class _Response(_AsInGenerate, ResponseHandler):
    """Handles /v1/responses."""

    needed = "input"


class _Generation(GenerateManager):
    """Generate within the model's context."""

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any
    ) -> Any:
        """Start an answer."""
        _fit(model, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, **more)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any
    ) -> Any:
        """Generate an answer."""
        _fit(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, **more)


def _fit(model: Any, inputs: Any, config: Any) -> None:
    """Limit the answer to the room behind the prompt; raise 400 if there is none."""
    context, length = context_length(model), inputs["input_ids"].shape[-1]
    if context is None:
        return
    if length >= context:
        raise HTTPException(400, f"the prompt has {length} tokens, and the model reads {context}")
    room = context - length
    config.max_new_tokens = min(config.max_new_tokens or room, room)


class _State(GenerationState):
    """One thread for each model."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """Return the model's generation thread."""
        return self._generate_managers.setdefault(model_id, _Generation())


def build_app(served: Mapping[str, ServedModel], api_key: str | None) -> Any:
    """Build transformers' server for models in memory."""
    models, state = _Models(served), _State()
    given = {
        "model_manager": models,
        "generation_state": state,
        "chat_handler": _Chat(models, state),
        "completion_handler": _Completion(models, state),
        "response_handler": _Response(models, state),
    }
    # Handlers of routes that are not served, which depend on the version.
    needed = inspect.signature(build_server).parameters.values()
    others = {one.name: None for one in needed if one.default is one.empty}
    app = build_server(**{**others, **given})
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", None) in _ROUTES
    ]

    app.add_exception_handler(TemplateError, _refuse)
    app.add_exception_handler(HTTPException, _report)
    if api_key is not None:
        app.add_middleware(_KeyCheck, key=api_key)
    return app


async def _refuse(request: Any, error: TemplateError) -> JSONResponse:
    return _error(400, f"the prompt form refuses this conversation: {error.message}")


async def _report(request: Any, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail))


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)


class _KeyCheck:
    """Refuse requests without the API key; /health needs none."""

    def __init__(self, app: Any, key: str) -> None:
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(
        self, scope: Mapping[str, Any], receive: Any, send: Callable[..., Awaitable[None]]
    ) -> None:
        """Pass on a request with the key."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        is_open = scope["type"] != "http" or scope["path"] == "/health"
        if is_open or hmac.compare_digest(given, self._expected):
            await self.app(scope, receive, send)
        else:
            await _error(401, "the API key is missing or wrong")(scope, receive, send)


class _Server(uvicorn.Server):
    """Reports when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def run_server(app: Any, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM."""
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # a line per request
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_SECONDS_TO_FINISH)
    _Server(config, on_ready).run(sockets=[listener])
