"""vLLM's OpenAI-compatible server, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.served_ranks import SERVED_RANKS
from wegeft_cli.data.text.trained_form import write_form
from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.generation.stopping import stop_token_ids
from wegeft_cli.inference.defaults import GREEDY
from wegeft_cli.inference.loaded_in_vllm import find_dtype, find_lora
from wegeft_cli.inference.prompt_format import PromptForm
from wegeft_cli.inference.serving.targets import BASE, NamedTarget
from wegeft_cli.models.loading import fetch_base_folder, load_tokenizer_of, name_quantization

_SECONDS_TO_END = 30


def serve_by_vllm(
    targets: Sequence[NamedTarget],
    *,
    host: str,
    port: int,
    api_key: str | None,
    as_trained: bool,
    warn: Callable[[str], None],
) -> None:
    """Run vLLM's server until SIGINT or SIGTERM; its files are temporary.

    Raises:
        UserError: If vLLM does not read an adapter, or the adapters' prompt forms differ.
        MachineError: If the server fails.
    """
    section = targets[0].target.section
    if (quantized := name_quantization(section)) is not None:
        raise UserError(
            f"this adapter was trained on a base in {quantized}, which vLLM is not given here",
            file=str(targets[0].target.path),
            key="--backend",
            hint="use --backend transformers",
        )
    folder = fetch_base_folder(section.name_or_path, section.revision)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wegeft-serve-")))
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder), "--host", host, "--port", str(port)),
            *_describe_base(folder, targets, as_trained, scratch),
        ]
        if section.trust_remote_code:
            command.append("--trust-remote-code")
        first = targets[0]
        if first.target.adapter is None:
            command += ["--served-model-name", first.name]
        else:
            loras = {
                one.name: find_lora(one.target.adapter, folder, section, warn, stack)
                for one in targets
                if one.target.adapter is not None
            }
            command += ["--served-model-name", BASE, *_describe_loras(loras)]
        _run(command, api_key)


def _describe_base(
    folder: Path, targets: Sequence[NamedTarget], as_trained: bool, scratch: Path
) -> list[str]:
    """Return the options of the base: type, stop tokens, greedy decoding, chat template."""
    from transformers import AutoConfig, GenerationConfig

    section = targets[0].target.section
    config = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    tokenizer = load_tokenizer_of(replace(section, name_or_path=str(folder), revision=None))
    options = ["--dtype", find_dtype(section.dtype, config)]
    if as_trained:
        written = {
            write_form(one.choose_form(tokenizer).template, tokenizer): one for one in targets
        }
        if len(written) > 1:
            raise UserError(
                "the adapters were trained with several prompt forms, and vLLM has one chat "
                "template for all",
                key="--backend",
                hint="use --backend transformers, or --chat-template base",
            )
        text, named = next(iter(written.items()))
        template = scratch / "chat_template.jinja"
        template.write_text(text, encoding="utf-8")
        options += ["--chat-template", str(template)]
        form = named.choose_form(tokenizer)
    else:
        form = PromptForm.of_tokenizer(tokenizer)
    has_own = (folder / "generation_config.json").is_file()
    own = (
        GenerationConfig.from_pretrained(folder)
        if has_own
        else GenerationConfig.from_model_config(config)
    )
    end_ids = stop_token_ids(_Config(own), tokenizer, GREEDY, form.find_turn_ends(tokenizer))
    settings = {"eos_token_id": end_ids, "temperature": 0.0}
    (scratch / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return [*options, "--generation-config", str(scratch)]


class _Config:
    """A model of which the generation config alone is known."""

    def __init__(self, generation_config: Any) -> None:
        self.generation_config = generation_config


def _describe_loras(loras: dict[str, tuple[Path, int]]) -> list[str]:
    largest = max(rank for _, rank in loras.values())
    room = next((size for size in SERVED_RANKS if size >= largest), None)
    if room is None:
        raise UserError(
            f"vLLM serves ranks up to {SERVED_RANKS[-1]}, and an adapter has {largest}",
            key="--backend",
            hint="use --backend transformers, or merge the adapter",
        )
    return [
        *("--enable-lora", "--max-loras", str(len(loras)), "--max-lora-rank", str(room)),
        *("--lora-modules", *(f"{name}={folder}" for name, (folder, _) in loras.items())),
    ]


def _run(command: Sequence[str], api_key: str | None) -> None:
    """Run a server in a process group of its own and end it with this process."""
    environment = {**os.environ, **({} if api_key is None else {"VLLM_API_KEY": api_key})}
    with _termination_interrupts():
        server = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = server.wait()
        finally:
            _end(server)
    if code:
        raise MachineError(f"vLLM's server ended with exit code {code}; its messages are above")


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGTERM and SIGHUP too, so that the server is ended."""
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is not None:
        return
    server.send_signal(signal.SIGINT)
    try:
        server.wait(_SECONDS_TO_END)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
