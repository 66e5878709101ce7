"""vLLM by the request that it is sent: no machine here has it, so a double of its surface answers.

The double holds what vLLM 0.10's `LLM`, `SamplingParams` and `LoRARequest` are called with. Its
answers come from transformers and PEFT on the very adapter folder that the request names, so that a
wrong twin, prompt or length shows in the scores.
"""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wegeft_cli.artifacts.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.generation import vllm_engine as vllm
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.sampling import sample_seed
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import save_adapter

EOS = 2


class SamplingParams:
    def __init__(self, **told: Any) -> None:
        self.told = told


class LoRARequest:
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
        self.told = (lora_name, lora_int_id, lora_path)


class LLM:
    """Answers greedily by transformers."""

    started: list[dict[str, Any]]
    asked: list[tuple[list[Any], list[SamplingParams], LoRARequest | None]]

    def __init__(self, **told: Any) -> None:
        type(self).started.append(told)
        self.path = told["model"]

    def generate(
        self,
        prompts: list[Any],
        params: list[SamplingParams],
        *,
        lora_request: LoRARequest | None,
        use_tqdm: bool,
    ) -> list[Any]:
        type(self).asked.append((prompts, params, lora_request))
        model = AutoModelForCausalLM.from_pretrained(self.path)
        if lora_request is not None:
            model = peft.PeftModel.from_pretrained(model, lora_request.told[2])
        model.eval()
        outputs = []
        for prompt, param in zip(prompts, params, strict=True):
            ids = torch.tensor([prompt["prompt_token_ids"]])
            new = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=param.told["max_tokens"],
                eos_token_id=param.told["stop_token_ids"],
                pad_token_id=EOS,
            )[0, ids.shape[1] :].tolist()
            reason = "stop" if new[-1] in param.told["stop_token_ids"] else "length"
            told = types.SimpleNamespace(token_ids=new, finish_reason=reason)
            outputs.append(types.SimpleNamespace(outputs=[told]))
        return outputs


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """The double in vLLM's place."""
    module = types.ModuleType("vllm")
    lora, request = types.ModuleType("vllm.lora"), types.ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for name, part in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, part)
    LLM.started, LLM.asked = [], []
    return LLM


@pytest.fixture(params=["input", "output"])
def adapter_dir(request: pytest.FixtureRequest, tmp_path: Path, llama_dir: Path) -> Path:
    """An adapter of rank 6, far from zero."""
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    targets = ["q_proj", "down_proj"]
    generators = inject_generators(model, rank=6, target_modules=targets, side=request.param)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generators.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    save_adapter(model, tmp_path / "mine", base_model_name_or_path=str(llama_dir))
    return tmp_path / "mine"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's use
def test_the_twin_in_vllm_scores_as_the_adapter_here(
    engine: type[LLM], adapter_dir: Path, llama_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"tasks": ["boolq"], "data_dir": data_dir, "max_new_tokens": 5}
    here = evaluate(adapter_dir, **settings, compare_base=True, output=tmp_path / "here.json")
    there = evaluate(
        adapter_dir, **settings, compare_base=True, backend="vllm", output=tmp_path / "there.json"
    )
    lines = [
        [json.loads(line) for line in (tmp_path / f"{name}-samples.jsonl").read_text().splitlines()]
        for name in ("here", "there")
    ]
    assert lines[0] == lines[1]
    told = [[line["output"] for line in lines[0] if line["model"] == m] for m in ("base", "target")]
    assert told[0] != told[1]  # else a twin of zeros would pass
    (started,) = engine.started
    assert started["model"] == started["tokenizer"] == str(llama_dir)
    assert (started["enable_lora"], started["max_loras"], started["max_lora_rank"]) == (True, 1, 8)
    assert started["generation_config"] == "vllm"
    assert started["dtype"] == "float32"  # of the checkpoint; vLLM's "auto" halves it
    assert [request is None for _, _, request in engine.asked] == [True, False]
    prompts, params, request = engine.asked[1]
    assert request is not None
    assert request.told[:2] == ("wegeft", 1)
    assert [set(prompt) for prompt in prompts] == [{"prompt_token_ids"}] * 6
    assert params[0].told == {
        "max_tokens": 5, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0,
        "min_p": 0.0, "stop": [], "stop_token_ids": [EOS],
    }  # fmt: skip
    row = there["results"][0]
    assert row["generation"]["engine"] == "vllm"
    for name in ("base_fingerprint", "adapter_fingerprint", "template_hash", "score"):
        assert row[name] == here["results"][0][name]


def test_a_model_folder_needs_no_lora(
    engine: type[LLM], llama_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"tasks": ["boolq"], "data_dir": data_dir, "max_new_tokens": 3}
    evaluate(llama_dir, **settings, backend="vllm", output=tmp_path / "a.json")
    assert "enable_lora" not in engine.started[0]
    assert engine.asked[0][2] is None


def test_draws_have_a_seed_of_their_own(engine: type[LLM]) -> None:
    params = vllm._sampling_params(Decoding(9, temperature=0.8, top_p=0.95, seed=4), [3, 1], [EOS])
    assert [param.told["seed"] for param in params] == [sample_seed(4, 3), sample_seed(4, 1)]
    assert params[0].told["temperature"] == 0.8
    assert len({sample_seed(0, 1), sample_seed(0, 2), sample_seed(1, 1), sample_seed(1, 2)}) == 4


@pytest.mark.parametrize(
    "decoding", [Decoding(9, num_beams=4), Decoding(9, no_repeat_ngram_size=5)]
)
def test_what_vllm_does_not_have_is_refused(engine: type[LLM], decoding: Decoding) -> None:
    with pytest.raises(UserError, match="vLLM does not support") as caught:
        vllm._sampling_params(decoding, [0], [EOS])
    assert caught.value.key == "--backend"


def test_an_adapter_that_no_lora_can_say_is_refused(
    engine: type[LLM], tmp_path: Path, llama_dir: Path, data_dir: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    inject_generators(model, rank=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    save_adapter(model, tmp_path / "mine", base_model_name_or_path=str(llama_dir))
    with pytest.raises(UserError):
        evaluate(tmp_path / "mine", tasks=["boolq"], data_dir=data_dir, backend="vllm")
    assert engine.started == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "it reads no DoRA"),
        ({"modules_to_save": ["lm_head"]}, "it reads no modules that were trained whole"),
        ({"lora_bias": True}, "it reads no changed biases"),
        ({"init_lora_weights": "pissa"}, "changes its base at the start"),
        ({"peft_type": "ADALORA"}, "it reads LoRA alone, and this is 'ADALORA'"),
    ],
)
def test_an_adapter_of_peft_that_vllm_refuses_is_refused_before_the_engine_starts(
    engine: type[LLM],
    tmp_path: Path,
    llama_dir: Path,
    data_dir: Path,
    config: dict[str, Any],
    reason: str,
) -> None:
    lora = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    values = {**lora, "base_model_name_or_path": str(llama_dir), **config}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        evaluate(tmp_path, tasks=["boolq"], data_dir=data_dir, backend="vllm")
    assert reason in caught.value.message
    assert caught.value.key == "--backend"
    assert engine.started == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's use
def test_the_values_and_ranks_of_an_adapter_of_peft_are_read_before_the_engine_starts(
    engine: type[LLM], tmp_path: Path, llama_dir: Path, data_dir: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama_dir)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 12})
    peft.get_peft_model(base, lora).save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_NAME
    settings: dict[str, Any] = {"data_dir": data_dir, "max_new_tokens": 3, "backend": "vllm"}
    evaluate(tmp_path, tasks=["boolq"], output=tmp_path / "a.json", **settings)
    assert engine.started[0]["max_lora_rank"] == 16
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(UserError, match="NaN or infinite"):
        evaluate(tmp_path, tasks=["boolq"], **settings)
    assert len(engine.started) == 1


def test_beams_are_refused_before_the_engine_starts(
    engine: type[LLM], adapter_dir: Path, data_dir: Path
) -> None:
    with pytest.raises(UserError, match="'llm_adapters' uses 4 beams") as caught:
        evaluate(
            adapter_dir,
            tasks=["boolq"],
            data_dir=data_dir,
            backend="vllm",
            protocol="llm_adapters",
        )
    assert caught.value.key == "--backend"
    assert engine.started == []


def test_an_adapter_of_a_quantised_base_is_refused(
    engine: type[LLM], adapter_dir: Path, data_dir: Path
) -> None:
    path = adapter_dir / CONFIG_NAME
    told = json.loads(path.read_text()) | {"base_quantization": "bitsandbytes_4bit"}
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="base in bitsandbytes_4bit") as caught:
        evaluate(adapter_dir, tasks=["boolq"], data_dir=data_dir, backend="vllm")
    assert caught.value.key == "--backend"
    assert engine.started == []


def test_the_models_other_ends_are_named_where_the_protocol_ends_there(
    engine: type[LLM], llama_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 7]}))
    template = "{% for m in messages %}{{ m['content'] }}<unk>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    for protocol, ends in (("wegeft", [EOS]), ("chat", [EOS, 7, 0])):
        result = evaluate(
            folder, tasks=["boolq"], protocol=protocol, data_dir=data_dir, backend="vllm",
            max_new_tokens=3, output=tmp_path / "a.json",
        )  # fmt: skip
        assert engine.asked[-1][1][0].told["stop_token_ids"] == ends
        assert result["results"][0]["generation"]["eos_token_id"] == ends


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (64, 64), (65, 128), (513, None)])
def test_the_next_rank_that_vllm_has(
    engine: type[LLM], tmp_path: Path, rank: int, room: int | None
) -> None:
    def start() -> None:
        vllm.open_model("m", config=None, generation_config=None, lora_dir=tmp_path, rank=rank)

    if room is None:
        with pytest.raises(UserError, match="ranks up to 512"):
            start()
    else:
        start()
        assert engine.started[0]["max_lora_rank"] == room


def test_without_vllm_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, llama_dir: Path, data_dir: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="not installed") as caught:
        evaluate(llama_dir, tasks=["boolq"], data_dir=data_dir, backend="vllm")
    assert "wegeft-cli[vllm]" in str(caught.value.hint)


def test_another_backend_is_refused(llama_dir: Path, data_dir: Path) -> None:
    with pytest.raises(UserError, match="no backend is called 'tgi'"):
        evaluate(llama_dir, tasks=["boolq"], data_dir=data_dir, backend="tgi")
