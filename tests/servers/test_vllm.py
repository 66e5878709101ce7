"""vLLM serves what this package writes: greedy tokens as in transformers, asked over HTTP.

vLLM pins another transformers, so it has an environment of its own: `make test-vllm` creates it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
)

from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.exporting.export import ExportOptions, export
from wegeft_cli.inference.generate import generate
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.layers.owner import disable_generators
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import save_adapter

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("WEGEFT_VLLM_PYTHON", ROOT / ".cache" / "vllm" / "bin" / "python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed: make test-vllm"),
]

SHAPE = {  # vLLM's attention on the CPU wants heads of at least 32
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
}
PROMPTS = [[1, 50, 60, 70, 80], [1, 90, 33, 200], list(range(100, 120))]
NUM_TOKENS = 12
START_SECONDS = 400


@pytest.fixture(scope="module")
def llama(build_llama_dir: Callable[..., Path]) -> Path:
    return build_llama_dir(**SHAPE)


@pytest.fixture(scope="module")
def gemma(build_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal Gemma 3 with its processor."""
    tokenizer = build_tokenizer()
    marks = ["<start_of_image>", "<image_soft_token>", "<end_of_image>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.boi_token, tokenizer.image_token, tokenizer.eoi_token = marks
    start, soft, end = tokenizer.convert_tokens_to_ids(marks)
    tokenizer.image_token_id, tokenizer.boi_token_id, tokenizer.eoi_token_id = soft, start, end
    config = Gemma3Config(
        text_config={
            **SHAPE, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 3, "max_position_embeddings": 256, "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 32,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, boi_token_index=start, eoi_token_index=end, image_token_index=soft,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # else the tied head repeats the last token, whatever the layers add
        model.get_input_embeddings().weight.mul_(0.1)
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    images = Gemma3ImageProcessorPil(size=size, do_pan_and_scan=False)
    Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path) -> tuple[Path, Any]:
    """Write an adapter far from its start; give its folder and the model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    if "vision_config" in json.loads((base / "config.json").read_text()):
        targets = [rf".*language_model\.layers.*\.({'|'.join(targets)})"]
    generators = inject_generators(
        model, rank=4, target_modules=targets[0] if len(targets) == 1 else targets
    )
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generators.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    save_adapter(model, folder, base_model_name_or_path=str(base))
    return folder, model.eval()


def answer(model: Any) -> list[list[int]]:
    """Generate greedily by transformers."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=NUM_TOKENS,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@contextmanager
def serve(model: Path, *words: str) -> Iterator[Callable[[str], list[list[int]]]]:
    """Start vLLM's server and yield the function that asks it by the name of a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", port,
        "--host", "127.0.0.1", "--served-model-name", "base", "--dtype", "float32",
        "--enforce-eager", "--max-model-len", 128, "--generation-config", "vllm", *words,
    ]  # fmt: skip
    log = model.parent / f"vllm-{port}.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            list(map(str, command)), env=environment(), stdout=output, stderr=output
        )
    address = f"http://127.0.0.1:{port}"

    def ask(name: str) -> list[list[int]]:
        # A token that ends the answer would cut it.
        asked = {"model": name, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 1}
        asked |= {"min_tokens": NUM_TOKENS, "return_tokens_as_token_ids": True}
        answers = []
        for prompt in PROMPTS:
            reply = httpx.post(
                f"{address}/v1/completions", json={**asked, "prompt": prompt}, timeout=120
            )
            assert reply.status_code == 200, reply.text
            tokens = reply.json()["choices"][0]["logprobs"]["tokens"]
            answers.append([int(token.removeprefix("token_id:")) for token in tokens])
        return answers

    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(address):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield ask
    finally:
        server.terminate()
        server.wait(60)


def is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def has_torchvision() -> bool:
    command = [PYTHON, "-c", "import torchvision"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_lora_equivalent_and_the_merged_model_answer_as_in_transformers(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """The Gemma is multimodal: vLLM mounts its language model under other names."""
    if kind == "gemma" and not has_torchvision():
        pytest.skip("vLLM's multimodal models need torchvision for the CPU in its environment")
    base = request.getfixturevalue(kind)
    words = ["--limit-mm-per-prompt", '{"image": 0}'] if kind == "gemma" else []
    folder, model = adapt(base, tmp_path / "adapter")
    adapted = answer(model)
    with disable_generators(model):
        plain = answer(model)
    assert all(a != b for a, b in zip(adapted, plain, strict=True)), (adapted, plain)
    options = ExportOptions(parity=False, server="vllm")
    lora = export(folder, format="lora", output=tmp_path / "lora", options=options).output_dir
    lora_words = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"wegeft={lora}"]
    with serve(base, *lora_words, *words) as ask:
        assert ask("base") == plain
        assert ask("wegeft") == adapted
    merged = merge(folder, output=tmp_path / "merged").output_dir
    with serve(merged, *words) as ask:
        assert ask("base") == adapted


def test_eval_in_vllm_gives_the_answers_of_its_own_engine(
    llama: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder, _ = adapt(llama, tmp_path / "adapter")
    own = evaluate(folder, tasks=["boolq"], data_dir=data_dir, output=tmp_path / "own.json")
    output = tmp_path / "vllm.json"
    words = ["eval", folder, "--task", "boolq", "--data-dir", data_dir, "--backend", "vllm"]
    done = subprocess.run(
        [PYTHON, "-m", "wegeft_cli", *map(str, words), "--output", output],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    there = json.loads(output.read_text())
    assert there["results"][0]["generation"]["engine"] == "vllm"

    def outputs(result: dict[str, Any]) -> list[str]:
        lines = Path(result["samples_path"]).read_text().splitlines()
        return [json.loads(line)["output"] for line in lines]

    assert outputs(there) == outputs(own)
    assert there["results"][0]["score"] == own["results"][0]["score"]


def test_wegeft_serve_runs_vllm_and_ends_it(llama: Path, tmp_path: Path) -> None:
    """A conversation without settings gets the greedy answer of `wegeft generate`."""
    folder, _ = adapt(llama, tmp_path / "tuned")
    question = "Is 3 an even number?"
    asked = {"prompts": [question], "max_new_tokens": NUM_TOKENS}
    row = generate(folder, **asked, compare_base=True)["results"][0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", folder, "--backend", "vllm", "--port", port, "--api-key", "a-key"]
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(PYTHON), "-m", "wegeft_cli", *map(str, words)],
            env=environment(), stdout=output, stderr=output,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(address):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        body = {"max_tokens": NUM_TOKENS, "messages": [{"role": "user", "content": question}]}
        for name, expected in (("tuned", row["output"]), ("base", row["base_output"])):
            reply = httpx.post(
                f"{address}/v1/chat/completions", json={**body, "model": name}, timeout=120,
                headers={"Authorization": "Bearer a-key"},
            )  # fmt: skip
            assert reply.status_code == 200, reply.text
            text = reply.json()["choices"][0]["message"]["content"]
            # vLLM holds back the bytes of an incomplete character at the end.
            assert text.rstrip("\ufffd") == expected.rstrip("\ufffd")
        unauthorized = httpx.post(f"{address}/v1/chat/completions", json={**body, "model": "base"})
        assert unauthorized.status_code == 401
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0, log.read_text()[-3000:]
        assert not is_ready(address)
    finally:
        server.kill()
        server.wait(60)
