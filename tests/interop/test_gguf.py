"""A GGUF file holds the model's numbers, and llama.cpp generates the same tokens from it."""

import json
import shutil

import gguf
import httpx
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from wegeft_cli.errors import UserError
from wegeft_cli.exporting.export import ExportOptions, export
from wegeft_cli.exporting.gguf_layers import read_layers
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import save_adapter

NUM_TOKENS = 12
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# q8_0 keeps 8 bits of a number in units of the largest of 32.
EIGHT_BITS = 1 / 127
LONG = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PROMPT = "the correct answer is"


def adapt(base_dir, folder, **settings):
    """Write an adapter with factors far from zero; give its folder and the model."""
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    generators = inject_generators(model, rank=4, **{"target_modules": FIVE, **settings})
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generators.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    save_adapter(model, folder, base_model_name_or_path=str(base_dir))
    return folder, model.eval()


def to_bytes(tokenizer, ids):
    """Give the bytes of tokens, which need be no text; llama.cpp tells none of special ones."""
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = [tokenizer.backend_tokenizer.id_to_token(n) for n in ids if n not in special]
    if any(piece == "\u2581" or piece.startswith("<0x") for piece in tokenizer.get_vocab()):
        return b"".join(
            bytes([int(piece[3:5], 16)])
            if piece.startswith("<0x")
            else piece.replace("\u2581", " ").encode()
            for piece in pieces
        )
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {char: byte for byte, char in bytes_to_unicode().items()}
    return b"".join(
        bytes(table[char] for char in piece) if all(c in table for c in piece) else piece.encode()
        for piece in pieces
    )


def ask_transformers(model, tokenizer, prompt):
    model.generation_config.eos_token_id = None
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)
    return to_bytes(tokenizer, found[0, ids.shape[1] :].tolist())


def ask_llama_cpp(model_path, prompt, adapter_path=None):
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel here")
    params = xllamacpp.CommonParams()
    params.model.path = str(model_path)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 128, 1, 1
    params.warmup = False
    params.verbosity = 0
    if adapter_path is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter_path), 1.0
        params.lora_adapters = [info]
    server = xllamacpp.Server(params)
    asked = {
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "cache_prompt": False,
    }
    reply = httpx.post(f"{server.listening_address}/v1/completions", json=asked, timeout=60)
    assert reply.status_code == 200, reply.text
    told = reply.json()
    parts = told["choices"][0]["logprobs"]["content"]
    return b"".join(bytes(part["bytes"]) for part in parts)


def assert_same_start(found, expected):
    """What ends in the middle of a letter is kept back by llama.cpp: compare what both tell."""
    assert len(found) > NUM_TOKENS // 2
    assert expected.startswith(found)


@pytest.fixture
def build_qwen_dir(tmp_path, build_tokenizer):
    """A function that writes a small Qwen; its tokenizer adds no BOS."""

    def build(config_class, model_class, **changes):
        folder = tmp_path / model_class.__name__
        tokenizer = build_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config = config_class(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            vocab_size=len(tokenizer),
            bos_token_id=1,
            eos_token_id=2,
            **changes,
        )
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
        model.save_pretrained(folder)
        return folder

    return build


@pytest.mark.parametrize(
    "base",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "max_shard_size": "30KB"},
        {"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": LONG},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
    ],
    ids=["plain", "tied, biases, shards", "one kv head, Llama 3.1's frequencies", "linear"],
)
def test_llama_cpp_generates_the_same(build_llama_dir, tmp_path, base):
    """From the merged model, and from the base with the adapter."""
    base_dir = build_llama_dir(**base)
    folder, model = adapt(base_dir, tmp_path / "mine")
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    expected = ask_transformers(model, tokenizer, PROMPT)
    merged = export(merge(folder).output_dir, format="gguf").output_dir / "model.gguf"
    plain = export(base_dir, format="gguf", output=tmp_path / "base").output_dir / "model.gguf"
    adapter = export(folder, format="gguf").output_dir / "adapter.gguf"
    assert_same_start(ask_llama_cpp(merged, PROMPT), expected)
    assert_same_start(ask_llama_cpp(plain, PROMPT, adapter), expected)
    base_model = AutoModelForCausalLM.from_pretrained(base_dir).eval()
    alone = ask_transformers(base_model, tokenizer, PROMPT)
    assert alone != expected
    assert_same_start(ask_llama_cpp(plain, PROMPT), alone)


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)],
)
def test_qwen_too(build_qwen_dir, tmp_path, config_class, model_class):
    base_dir = build_qwen_dir(config_class, model_class)
    folder, model = adapt(base_dir, tmp_path / "mine")
    expected = ask_transformers(model, AutoTokenizer.from_pretrained(base_dir), PROMPT)
    merged = export(merge(folder).output_dir, format="gguf").output_dir / "model.gguf"
    plain = export(base_dir, format="gguf", output=tmp_path / "base").output_dir / "model.gguf"
    adapter = export(folder, format="gguf").output_dir / "adapter.gguf"
    assert_same_start(ask_llama_cpp(merged, PROMPT), expected)
    assert_same_start(ask_llama_cpp(plain, PROMPT, adapter), expected)


def build_sentencepiece(folder):
    """Write a tokenizer as Llama 2 has it: spaces are letters, unknown letters become bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.train_from_iterator(
        ["the correct answer is true or false, and the task is to answer it"] * 4,
        trainers.BpeTrainer(vocab_size=340, special_tokens=pieces, show_progress=False),
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    values = json.loads(backend.to_str())
    # The trainer calls the bytes special; in the real ones they are ordinary tokens.
    values["added_tokens"] = values["added_tokens"][:3]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    for path in folder.glob("token*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("prompt", [PROMPT, "is\u00e9 zebra: the answer", " two  spaces"])
def test_llama_2s_tokenizer(build_llama_dir, tmp_path, prompt):
    base_dir = shutil.copytree(build_llama_dir(), tmp_path / "base")
    tokenizer = build_sentencepiece(base_dir)
    ids = tokenizer(prompt).input_ids
    assert len(ids) < 2 + len(prompt.encode())
    model = AutoModelForCausalLM.from_pretrained(base_dir).eval()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base_dir)
    expected = ask_transformers(model, tokenizer, prompt)
    path = export(base_dir, format="gguf").output_dir / "model.gguf"
    # By text and by number: the file's tokenizer cuts as the model's own does.
    assert_same_start(ask_llama_cpp(path, ids), expected)
    assert ask_llama_cpp(path, prompt) == ask_llama_cpp(path, ids)


def read_back(path):
    """Give the tensors of a file as float32."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(path).tensors
    }


def side_by_side(weight, num_heads):
    """Bring the two numbers that a rotary embedding turns together next to each other."""
    rows = weight.shape[0] // num_heads
    order = np.arange(rows).reshape(2, rows // 2).T.reshape(-1)
    return np.concatenate([head[order] for head in np.split(weight, num_heads)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "q8_0", None])
def test_the_tensors_are_the_models(build_llama_dir, tmp_path, dtype):
    base_dir = build_llama_dir(dtype=torch.bfloat16)
    result = export(
        base_dir, format="gguf", output=tmp_path / "out", options=ExportOptions(dtype=dtype)
    )
    found = read_back(result.output_dir / "model.gguf")
    stored = load_file(base_dir / "model.safetensors")
    names = read_layers(base_dir)
    assert len(found) == len(stored) == result.num_tensors == 21
    for name, tensor in stored.items():
        expected = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            expected = side_by_side(expected, 4 if "q_proj" in name else 2)
        got = found[names.rename(name)]
        difference = np.abs(got - expected).max()
        if dtype == "float16":
            assert difference < 2**-11 * np.abs(expected).max(), name
        elif dtype == "q8_0" and expected.ndim > 1 and expected.shape[1] % 32 == 0:
            assert 0 < difference < EIGHT_BITS * np.abs(expected).max(), name
        else:
            assert difference == 0, name
    kinds = {
        t.name: t.tensor_type.name for t in GGUFReader(result.output_dir / "model.gguf").tensors
    }
    told = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0", None: "BF16"}
    assert kinds["blk.0.attn_q.weight"] == told[dtype]
    assert kinds["output_norm.weight"] == "F32"
    # 48 wide rows hold no whole number of blocks of 32.
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else told[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_adapters_tensors_are_the_twins(llama_dir, tmp_path, dtype):
    folder, _ = adapt(llama_dir, tmp_path / "mine")
    options = ExportOptions(dtype=dtype, pad_rank=True, parity=False)
    twin = load_file(
        export(folder, format="lora", options=options).output_dir / "adapter_model.safetensors"
    )
    path = export(folder, format="gguf", options=options).output_dir / "adapter.gguf"
    found = read_back(path)
    names = read_layers(llama_dir)
    assert len(found) == len(twin) == 20
    for name, tensor in twin.items():
        module, _, end = name.removeprefix("base_model.model.").rpartition(".lora_")
        expected = tensor.float().numpy()
        if end[0] == "B" and ("q_proj" in name or "k_proj" in name):
            expected = side_by_side(expected, 4 if "q_proj" in name else 2)
        got = found[f"{names.rename(module + '.weight')}.lora_{end[0].lower()}"]
        assert np.array_equal(got, expected), name
    fields = GGUFReader(path).fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    assert fields["adapter.lora.alpha"].contents() == 8.0
    assert fields["general.architecture"].contents() == "llama"


def test_the_long_contexts_frequencies_are_transformers_own(build_llama_dir, tmp_path):
    base_dir = build_llama_dir(num_key_value_heads=1, head_dim=16, rope_parameters=LONG)
    path = export(base_dir, format="gguf", output=tmp_path / "out").output_dir / "model.gguf"
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = plain / LlamaRotaryEmbedding(model.config).inv_freq
    assert factors.unique().numel() > 2
    assert np.allclose(read_back(path)["rope_freqs.weight"], factors.numpy(), rtol=1e-5)


def test_the_chat_template_and_the_special_tokens_come_along(llama_dir, tmp_path):
    base_dir = shutil.copytree(llama_dir, tmp_path / "base")
    (base_dir / "chat_template.jinja").write_text("{{ messages[0].content }}")
    path = export(base_dir, format="gguf").output_dir / "model.gguf"
    fields = GGUFReader(path).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.add_bos_token"].contents()
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def change_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda v: v.update(architectures=["OPTForCausalLM"]), "OPTForCausalLM"),
        ("config.json", lambda v: v.pop("architectures"), "None is not written"),
        ("config.json", lambda v: v.update(num_hidden_layers="2"), "whole number"),
        ("config.json", lambda v: v.update(use_sliding_window=True), "sliding windows"),
        (
            "config.json",
            lambda v: v.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}),
            "'yarn' is not written",
        ),
        ("tokenizer.json", lambda v: v["model"].update(type="Unigram"), "no byte-pair"),
        ("tokenizer.json", lambda v: v.update(pre_tokenizer=None), "not byte-level"),
        (
            "tokenizer.json",
            lambda v: v.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ],
                }
            ),
            "cuts text by",
        ),
        ("tokenizer.json", lambda v: v.update(added_tokens=[{"id": 1}]), "damaged"),
        ("tokenizer.json", lambda v: v.update(added_tokens=7), "damaged"),
    ],
)
def test_what_is_not_written_as_gguf_is_told(llama_dir, tmp_path, file, change, message):
    base_dir = shutil.copytree(llama_dir, tmp_path / "base")
    change_json(base_dir / file, change)
    with pytest.raises(UserError, match=message) as caught:
        export(base_dir, format="gguf", output=tmp_path / "out")
    assert caught.value.file == str(base_dir / file)
    assert not (tmp_path / "out").exists()


def test_a_missing_or_foreign_tokenizer_is_told(llama_dir, tmp_path):
    base_dir = shutil.copytree(llama_dir, tmp_path / "base")
    change_json(base_dir / "tokenizer.json", lambda v: v["model"]["vocab"].update(more=9999))
    with pytest.raises(UserError, match="token 9999 of a model with"):
        export(base_dir, format="gguf", output=tmp_path / "out")
    (base_dir / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="missing"):
        export(base_dir, format="gguf", output=tmp_path / "out")
