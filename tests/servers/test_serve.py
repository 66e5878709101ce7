"""`wegeft serve`: transformers' server answers as `wegeft generate` does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import preloaded
import pytest
import torch
from transformers import AutoModelForCausalLM

from wegeft_cli.artifacts.prompt_record import PromptRecord
from wegeft_cli.errors import UserError
from wegeft_cli.inference.generate import generate
from wegeft_cli.inference.serving import serve as serving
from wegeft_cli.inference.serving.targets import read_targets
from wegeft_cli.inference.serving.transformers_server import (
    build_app,
    load_models,
    share_weights,
)
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import save_adapter
from wegeft_cli.reporter import SilentReporter

QUESTION = "Is 3 an even number?"
NUM_TOKENS = 12
KEY = "a-key"


@pytest.fixture(scope="module")
def adapters(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of one base, far from its start, trained with two prompt forms."""
    made = {}
    for number, (name, form) in enumerate({"first": "plain", "second": "alpaca"}.items()):
        model = AutoModelForCausalLM.from_pretrained(llama_dir)
        generators = inject_generators(model, rank=4, target_modules=["q_proj", "down_proj"])
        random = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in generators.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
        made[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(
            model,
            made[name],
            base_model_name_or_path=str(llama_dir),
            prompt=PromptRecord(form, None),
        )
    return made


def options_of(adapters: dict[str, Path]) -> list[str]:
    return [f"{name}={path}" for name, path in adapters.items()]


def answer(target: Path, **more: Any) -> dict[str, Any]:
    return generate(target, prompts=[QUESTION], max_new_tokens=NUM_TOKENS, **more)["results"][0]


def chat(client: openai.OpenAI, name: str, **more: Any) -> Any:
    return client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=NUM_TOKENS,
        **more,
    )


@contextmanager
def served(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `wegeft serve` and yield the process and its address."""
    command = [sys.executable, "-m", "wegeft_cli", "serve", *words, "--port", "0"]
    server = preloaded.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, server.communicate()[1]
        yield server, line.split()[-1]
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
def test_a_client_gets_the_answers_of_generate_and_ctrl_c_ends_the_server(
    adapters: dict[str, Path],
) -> None:
    words = [word for option in options_of(adapters) for word in ("--adapter", option)]
    with served(*words, "--api-key", KEY, "--backend", "transformers") as (server, url):
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
        assert sorted(model.id for model in client.models.list()) == ["base", "first", "second"]
        texts = {}
        for name, path in adapters.items():
            expected = answer(path)
            whole = chat(client, name)
            assert whole.choices[0].message.content == expected["output"]
            assert whole.usage.completion_tokens == expected["num_new_tokens"]
            pieces = [chunk.choices[0].delta.content for chunk in chat(client, name, stream=True)]
            assert "".join(filter(None, pieces)) == expected["output"]
            texts[name] = expected["output"]
        base = answer(adapters["first"], compare_base=True)["base_output"]
        assert chat(client, "base").choices[0].message.content == base
        assert len({*texts.values(), base}) == 3
        with pytest.raises(openai.NotFoundError, match="no model 'third'; this server has first"):
            chat(client, "third")
        with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
            chat(openai.OpenAI(base_url=url, api_key="other", max_retries=0), "first")
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert server.stderr is not None
        assert "stopped" in server.stderr.read()


def ask(app: Any, path: str, **more: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request("POST" if "json" in more else "GET", path, **more)

    return asyncio.run(send())


@pytest.fixture(scope="module")
def app(adapters: dict[str, Path]) -> Any:
    targets = read_targets(None, options_of(adapters), None)
    return build_app(load_models(targets, as_trained=True, warn=lambda text: None), None)


def test_decoding_is_greedy_unless_the_request_samples(app: Any, adapters: dict[str, Path]) -> None:
    body = {
        "model": "first",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": NUM_TOKENS,
    }

    def text(**more: Any) -> str:
        reply = ask(app, "/v1/chat/completions", json={**body, **more})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["message"]["content"])

    greedy = answer(adapters["first"])["output"]
    assert text() == text(temperature=0) == greedy
    assert text(temperature=1.0, seed=1) != greedy
    assert text(temperature=1.0, seed=1) == text(temperature=1.0, seed=1)


def test_what_a_request_gets_wrong_is_said(app: Any) -> None:
    def refused(messages: list[dict[str, str]]) -> str:
        body = {"model": "first", "messages": messages}
        reply = ask(app, "/v1/chat/completions", json=body)
        assert reply.status_code == 400
        return str(reply.json()["error"]["message"])

    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert "no place for a turn of the role system" in refused(system)
    assert "the model reads 256" in refused([{"role": "user", "content": "x" * 400}])
    # transformers' own server loads and unloads models on request.
    assert ask(app, "/reset", json={}).status_code == 404
    assert ask(app, "/load_model", json={"model": "other"}).status_code == 404


TURNS = {"messages": [{"role": "user", "content": QUESTION}]}


@pytest.mark.parametrize(
    ("route", "fields", "message"),
    [
        ("chat/completions", {**TURNS, "temperature": "hot"}, "`temperature` must be a number"),
        ("chat/completions", {**TURNS, "temperature": -1}, "`temperature` must be a number of at"),
        ("chat/completions", {**TURNS, "top_p": 2}, "`top_p` must be a number in (0, 1]"),
        ("chat/completions", {**TURNS, "max_tokens": "many"}, "`max_tokens` must be a whole num"),
        ("chat/completions", {**TURNS, "max_tokens": -1}, "`max_tokens` must be a whole number"),
        ("chat/completions", {**TURNS, "seed": 1.5}, "`seed` must be a whole number"),
        ("chat/completions", {**TURNS, "stop": [1]}, "`stop` must be a text or a list of texts"),
        ("chat/completions", {**TURNS, "stream": "yes"}, "`stream` must be true or false"),
        ("chat/completions", {**TURNS, "logit_bias": {"a": 1}}, "`logit_bias` must be a map"),
        ("chat/completions", {**TURNS, "chat_template_kwargs": 1}, "`chat_template_kwargs` must"),
        ("chat/completions", {**TURNS, "generation_config": "{"}, "`generation_config` must be"),
        ("chat/completions", {}, "`messages` is missing"),
        ("chat/completions", {"messages": "Hello"}, "`messages` must be a list of objects"),
        ("chat/completions", {"messages": []}, "`messages` must be a list of objects"),
        ("chat/completions", {"messages": [{"content": "a"}]}, "`messages[0].role` must be a text"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "`messages[0].content[0].text` must be a text",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
            "`messages[0].tool_calls[0].function.arguments` must be a JSON object",
        ),
        ("completions", {}, "`prompt` is missing"),
        ("completions", {"prompt": [1, 2]}, "`prompt` must be a text"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "`max_tokens` must be a whole number"),
        ("responses", {}, "`input` is missing"),
        ("responses", {"input": 5}, "`input` must be a text or a list of objects"),
        ("responses", {"input": [{"role": 5, "content": "a"}]}, "`input[0].role` must be a text"),
        ("responses", {"input": [{"type": "function_call"}]}, "`input[0].call_id` must be a text"),
        ("responses", {"input": "a", "max_output_tokens": None, "top_p": "x"}, "`top_p` must be"),
    ],
)  # fmt: skip
def test_a_faulty_field_is_named(
    app: Any, route: str, fields: dict[str, Any], message: str
) -> None:
    reply = ask(app, f"/v1/{route}", json={"model": "first", **fields})
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]


def test_null_fields_are_absent_and_parts_are_read(app: Any) -> None:
    empty = dict.fromkeys(("temperature", "top_p", "seed", "stop", "tools", "chat_template_kwargs"))
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    body = {"model": "first", "messages": parts, "max_tokens": 3, **empty}
    assert ask(app, "/v1/chat/completions", json=body).status_code == 200
    for given in (QUESTION, [{"role": "user", "content": QUESTION}],
                  [{"type": "input_text", "text": QUESTION}]):  # fmt: skip
        body = {"model": "first", "input": given, "stream": False, "max_output_tokens": 3}
        assert ask(app, "/v1/responses", json=body).status_code == 200


def test_a_fault_of_the_server_is_no_fault_of_the_request(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise ValueError("a fault in the model")

    monkeypatch.setattr("wegeft_cli.inference.serving.transformers_server._fit", fail)
    with pytest.raises(ValueError, match="a fault in the model"):  # a server answers with 500
        ask(app, "/v1/chat/completions", json={"model": "first", **TURNS})


def test_an_answer_ends_with_the_context(app: Any) -> None:
    body = {"model": "base", "prompt": "x" * 240, "max_tokens": 100, "temperature": 0}
    usage = ask(app, "/v1/completions", json=body).json()["usage"]
    assert usage["total_tokens"] <= 256


def test_adapters_share_the_bases_weights(llama_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama_dir)
    copied = share_weights(base)
    inject_generators(copied, rank=2, target_modules=["q_proj"])
    assert copied.model.layers[0] is not base.model.layers[0]
    assert (
        copied.model.layers[0].self_attn.q_proj.weight
        is base.model.layers[0].self_attn.q_proj.weight
    )
    assert not base.model.layers[0].self_attn.q_proj._forward_hooks


def test_names_and_bases_are_checked_before_weights_are_loaded(
    adapters: dict[str, Path], build_llama_dir: Callable[..., Path], tmp_path: Path
) -> None:
    first = adapters["first"]
    assert [one.name for one in read_targets(first, [], None)] == ["first"]
    for options, message in (
        ([f"a={first}", f"a={first}"], "the name 'a' is used twice"),
        ([f"base={first}"], "`base` names the base"),
        ([str(first)], "is not NAME=PATH"),
    ):
        with pytest.raises(UserError, match=message):
            read_targets(None, options, None)
    other = build_llama_dir(seed=5)
    model = AutoModelForCausalLM.from_pretrained(other)
    inject_generators(model, rank=2, target_modules=["q_proj"])
    save_adapter(model, tmp_path / "other", base_model_name_or_path=str(other))
    with pytest.raises(UserError, match="share a base"):
        read_targets(None, [f"a={first}", f"b={tmp_path / 'other'}"], None)
    with pytest.raises(UserError, match="several names need adapters"):
        read_targets(other, [f"a={first}"], None)


def test_a_taken_port_and_missing_packages_are_said_before_anything_is_loaded(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(**more: Any) -> None:
        serving.serve(targets, reporter=SilentReporter(), **more)

    targets = read_targets(adapters["first"], [], None)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"127.0.0.1:{port} cannot be bound") as error:
            serve(address=serving.Address(port=port), backend="transformers")
        assert "another --port" in (error.value.hint or "")
        assert time.monotonic() - start < 1
    with serving.Address(port=0).bind() as first:  # a server that loads its models
        port = first.getsockname()[1]
        with pytest.raises(UserError, match="cannot be bound"):
            serving.Address(port=port).bind()
    present = serving.find_spec
    monkeypatch.setattr(
        serving, "find_spec", lambda name: None if name in ("fastapi", "vllm") else present(name)
    )
    with pytest.raises(UserError, match="server needs fastapi") as error:
        serve(address=serving.Address(port=0))
    assert error.value.hint == "pip install 'wegeft-cli[serve]'"
    with pytest.raises(UserError, match="vLLM is not installed"):
        serve(address=serving.Address(port=0), backend="vllm")
    with pytest.raises(UserError, match="one of auto, transformers, vllm"):
        serve(address=serving.Address(port=0), backend="sglang")


def test_rows_of_a_file_name_their_adapters(adapters: dict[str, Path], tmp_path: Path) -> None:
    names = ["first", "base", "second", "first"]
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{QUESTION} {n}", "adapter": name} for n, name in enumerate(names)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more: dict[str, Any] = {"template": "plain", "max_new_tokens": NUM_TOKENS}
    result = generate(file=file, adapters=options_of(adapters), batch_size=4, **more)
    assert [row["adapter"] for row in result["results"]] == names
    for row, answered in zip(rows, result["results"], strict=True):
        target = adapters["first" if row["adapter"] == "base" else row["adapter"]]
        alone = generate(target, prompts=[row["prompt"]], compare_base=True, **more)["results"][0]
        key = "base_output" if row["adapter"] == "base" else "output"
        assert answered["output"] == alone[key]
    file.write_text('{"prompt": "x", "adapter": "third"}\n')
    with pytest.raises(UserError, match="names 'third'"):
        generate(file=file, adapters=options_of(adapters), **more)
    with pytest.raises(UserError, match="several prompt forms"):
        generate(file=file, adapters=options_of(adapters))
