"""A merged folder is an ordinary model: plain transformers loads it and computes the same."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import load_adapter_files
from wegeft_cli.errors import UserError
from wegeft_cli.exporting.export import ExportOptions, export
from wegeft_cli.inference.generate import generate
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.wegeft.equations import delta_weight
from wegeft_cli.methods.wegeft.folding import fold_generators
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import save_adapter
from wegeft_cli.runs.train import train
from wegeft_cli.storage import safetensors_reader

# The folded weight rounds once to float32, the adapter edits activations: two layers of that.
FLOAT32 = 1e-5
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_same_tensors(folder, model):
    """The folder's tensors are a folded model's, bit for bit."""
    merged = load(folder).state_dict()
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("wegeft.")}
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize(
    ("base", "settings", "num_folded"),
    [
        ({}, {"target_modules": FIVE}, 10),
        ({"max_shard_size": "30KB"}, {"target_modules": FIVE, "share": "none"}, 10),
        (
            {"attention_bias": True, "mlp_bias": True},
            {"target_modules": ["q_proj", "down_proj"], "side": "output"},
            8,
        ),
        ({"tie_word_embeddings": True}, {"target_modules": "all-linear", "share": "none"}, 14),
    ],
    ids=["one file", "shards", "output side with biases", "tied"],
)
def test_a_merged_llama_loads_plainly(
    build_llama_dir, make_adapter, ids, base, settings, num_folded
):
    base_dir = build_llama_dir(**base)
    folder, model = make_adapter(base_dir, **settings)
    result = merge(folder)
    assert result.output_dir == folder.with_name("mine-merged")
    assert result.num_folded == num_folded
    logits = model(ids).logits
    merged = load(result.output_dir)(ids).logits
    assert (merged - logits).abs().max() < FLOAT32 * logits.abs().max()
    assert (merged - load(base_dir)(ids).logits).abs().max() > 1e-2 * logits.abs().max()
    assert fold_generators(model) == num_folded
    assert_same_tensors(result.output_dir, model)
    assert len(list(result.output_dir.glob("*.safetensors"))) == len(
        list(base_dir.glob("*.safetensors"))
    )
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    assert tokenizer("a b").input_ids == AutoTokenizer.from_pretrained(base_dir)("a b").input_ids
    with safe_open(next(result.output_dir.glob("*.safetensors")), "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("targets", [["c_attn", "mlp.c_proj"], ["c_attn:q", "c_attn:v", "c_fc"]])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_merged_gpt2_loads_plainly(build_gpt2_dir, make_adapter, ids, prefix, targets, side):
    """Weights stored the other way round, rows of a fused projection, both spellings."""
    base_dir = build_gpt2_dir(prefix)
    folder, model = make_adapter(base_dir, target_modules=targets, share="none", side=side)
    result = merge(folder)
    assert result.num_folded == (4 if side == "input" else 8)  # weights; biases too
    logits = model(ids).logits
    merged = load(result.output_dir)(ids).logits
    assert (merged - logits).abs().max() < FLOAT32 * logits.abs().max()
    fold_generators(model)
    assert_same_tensors(result.output_dir, model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_base_folds_to_the_same_bits(build_llama_dir, make_adapter, dtype):
    base_dir = build_llama_dir(dtype=getattr(torch, dtype))
    folder, model = make_adapter(base_dir, target_modules=FIVE)
    assert model.dtype == getattr(torch, dtype)
    result = merge(folder)
    fold_generators(model)
    assert_same_tensors(result.output_dir, model)


def test_another_type_is_rounded_once(llama_dir, make_adapter):
    folder, model = make_adapter(llama_dir, target_modules=FIVE)
    result = merge(folder, dtype="bfloat16")
    fold_generators(model)
    assert_same_tensors(result.output_dir, model.to(torch.bfloat16))
    with pytest.raises(UserError, match="int8"):
        merge(folder, dtype="int8", output=folder.with_name("other"))


@pytest.mark.parametrize("are_found", [True, False])
def test_names_that_the_adapter_does_not_record_are_found_or_merged_in_memory(
    build_gpt2_dir, make_adapter, ids, tmp_path, listener, are_found, monkeypatch
):
    """The adapter was saved where its base was not, so it knows the model's names alone."""
    base_dir = build_gpt2_dir("")
    folder, model = make_adapter(base_dir, told="some-org/some-model", target_modules=["c_attn"])
    if not are_found:
        monkeypatch.setattr("wegeft_cli.merging.merge._find_changes", lambda job, shapes: None)
    result = merge(folder, base=str(base_dir), output=tmp_path / "merged", reporter=listener)
    assert any("in memory" in note for note in listener.notes) != are_found
    assert result.num_folded == 2
    fold_generators(model)
    assert_same_tensors(result.output_dir, model)
    assert AutoTokenizer.from_pretrained(result.output_dir)("a").input_ids


def test_a_run_is_merged_beside_its_adapter(write_recipe, ids, tmp_path, monkeypatch, llama_dir):
    run = train(write_recipe()).run_dir
    monkeypatch.chdir(tmp_path)
    results = [
        merge(output=tmp_path / "newest"),
        merge(run),
        merge(run / "adapter", output=tmp_path / "by-name"),
    ]
    assert results[1].output_dir == run / "merged"
    logits = [load(result.output_dir)(ids).logits for result in results]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    provenance = json.loads((run / "merged" / "wegeft_merge.json").read_text())
    assert provenance["base_model_name_or_path"] == str(llama_dir)
    told = results[0].to_json()
    assert told.keys() >= {
        "output_dir", "num_tensors", "num_folded", "seconds", "peak_memory_gib",
    }  # fmt: skip
    assert json.loads(json.dumps(told)) == told
    with pytest.raises(UserError, match="not empty"):
        merge(run)


def test_a_lora_run_is_merged_by_peft(write_recipe, ids, llama_dir):
    from wegeft_cli.methods.peft.loading import load_peft

    result = train(write_recipe(adapter={"type": "lora"}, train={"learning_rate": 0.05}))
    merged = merge(result.run_dir)
    assert merged.num_folded == 6
    logits = load_peft(load(llama_dir), Adapter.open(result.adapter_dir))(ids).logits
    got = load(merged.output_dir)(ids).logits
    assert (got - logits).abs().max() < FLOAT32 * logits.abs().max()
    assert (got - load(llama_dir)(ids).logits).abs().max() > 1e-3 * logits.abs().max()


def test_another_base_is_refused(llama_dir, build_llama_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    with pytest.raises(UserError, match="not the one that this adapter was trained on") as caught:
        merge(folder, base=str(build_llama_dir(seed=1)))
    assert caught.value.exit_code == 2
    assert "--base" in caught.value.hint
    assert not folder.with_name("mine-merged").exists()
    copy = shutil.copytree(llama_dir, tmp_path / "copy")
    assert merge(folder, base=str(copy)).num_folded == 2


def test_what_is_damaged_or_not_there_is_told_and_nothing_written(
    llama_dir, make_adapter, tmp_path, monkeypatch
):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    output = tmp_path / "merged"
    with pytest.raises(UserError) as caught:
        merge(folder, output=output)
    assert caught.value.file == str(weights)
    weights.write_bytes(whole)
    with pytest.raises(UserError, match="no folder"):
        merge(folder, base=str(tmp_path / "gone"), output=output)
    with pytest.raises(UserError, match="no such path"):
        merge(tmp_path / "nothing", output=output)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        merge(output=output)
    assert not output.exists()
    assert merge(folder, output=output).num_folded == 2


def read_weights(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def draw_again(model, folder, base_dir, seed):
    """Save another adapter of the same layers, with other factors."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.wegeft.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    save_adapter(model, folder, base_model_name_or_path=str(base_dir))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("sides", [("input", "input"), ("input", "output"), ("output", "output")])
def test_several_adapters_add_up_with_their_weights(
    build_gpt2_dir, build_llama_dir, make_adapter, tmp_path, sides, in_memory
):
    """Each change is that of the base's own weight, computed here in float64 from the equation."""
    if in_memory:  # the adapters know the model's names alone
        base_dir, targets, told = build_gpt2_dir(""), ["c_attn", "c_fc"], "some-org/some-model"
    else:
        base_dir, told = build_llama_dir(attention_bias=True, mlp_bias=True), None
        targets = ["q_proj", "down_proj"]
    folders, changes, weights = [], [], [0.75, -0.5]
    for number, side in enumerate(sides):
        _, model = make_adapter(
            base_dir, f"a{number}", told=told, target_modules=targets, side=side
        )
        draw_again(model, tmp_path / f"b{number}", told or base_dir, seed=10 + number)
        folders.append(tmp_path / f"b{number}")
        changes.append(
            {
                (name, kind): (generator.phi.double(), generator.psi.double(), generator.scale)
                for group, members in model.wegeft["default"].groups.items()
                for name in (target.name for target in members)
                for generator in [model.wegeft["default"][group]]
                for kind in (("weight", "bias") if side == "output" else ("weight",))
            }
        )
    result = merge(folders, weights=weights, base=str(base_dir), output=tmp_path / "out")
    base, merged = load(base_dir).state_dict(), load(tmp_path / "out").state_dict()
    touched = {key for each in changes for key in each}
    assert result.num_folded == len(touched)
    for name, tensor in base.items():
        module, _, kind = name.rpartition(".")
        expected = tensor.double()
        turned = in_memory and kind == "weight"
        for side, weight, change in zip(sides, weights, changes, strict=True):
            if (module, kind) in change:
                phi, psi, scale = change[module, kind]
                W = tensor.double().t() if turned else tensor.double()
                delta = delta_weight(W, phi, psi, scale, side)
                expected = expected + weight * (delta.t() if turned else delta)
        difference = (merged[name].double() - expected).abs().max()
        assert difference <= 1e-6 * expected.abs().max(), name
        if (module, kind) in touched:
            assert (merged[name] - tensor).abs().max() > 1e-2 * tensor.abs().max(), name


def test_weights_act_and_one_of_a_half_is_half_the_change(llama_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    whole = read_weights(merge(folder, output=tmp_path / "whole").output_dir)
    half = read_weights(merge(folder, weights=[0.5], output=tmp_path / "half").output_dir)
    none = read_weights(merge([folder], weights=[0], output=tmp_path / "none").output_dir)
    twice = read_weights(merge([folder, folder], output=tmp_path / "twice").output_dir)
    base = read_weights(llama_dir)
    name = "model.layers.0.self_attn.q_proj.weight"
    change = whole[name] - base[name]
    assert (half[name] - base[name] - change / 2).abs().max() < 1e-6
    assert (twice[name] - base[name] - 2 * change).abs().max() < 1e-6
    assert torch.equal(none[name], base[name])
    assert change.abs().max() > 0.1


def test_modules_trained_whole_are_weighted_too(llama_dir, tmp_path):
    folders = []
    for seed in (1, 2):
        model = load(llama_dir)
        inject_generators(model, rank=2, target_modules=["q_proj"], modules_to_save=["model.norm"])
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.wegeft.trainable():
                parameter.add_(torch.randn(parameter.shape))
        folders.append(tmp_path / str(seed))
        save_adapter(model, folders[-1], base_model_name_or_path=str(llama_dir))
    name = "model.norm.weight"
    base = read_weights(llama_dir)[name]
    one, two = (load_adapter_files(folder).saved_modules[name] for folder in folders)
    merged = read_weights(merge(folders[0], output=tmp_path / "one").output_dir)
    assert torch.equal(merged[name], one)
    merged = read_weights(merge(folders, weights=[0.25, 2], output=tmp_path / "both").output_dir)
    expected = base + 0.25 * (one - base) + 2 * (two - base)
    assert (merged[name] - expected).abs().max() < 1e-6


def test_what_cannot_be_added_up_is_told(llama_dir, build_llama_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    other, _ = make_adapter(build_llama_dir(seed=1), "other", target_modules=["q_proj"])
    out = tmp_path / "out"
    with pytest.raises(UserError, match="2 weights for 1 adapters"):
        merge(folder, weights=[1, 2], output=out)
    with pytest.raises(UserError, match="finite"):
        merge(folder, weights=[float("nan")], output=out)
    with pytest.raises(UserError, match="not the one that this adapter was trained on") as caught:
        merge([folder, other], output=out)
    assert caught.value.file == str(other)
    lora = export(folder, format="lora", options=ExportOptions(parity=False)).output_dir
    with pytest.raises(UserError, match="a LORA adapter can only be merged alone"):
        merge([folder, lora], output=out)
    with pytest.raises(UserError, match="is no size"):
        merge(folder, max_shard_size="big", output=out)
    assert not out.exists()


@pytest.mark.parametrize("in_memory", [False, True])
def test_shards_of_another_size(build_gpt2_dir, llama_dir, make_adapter, tmp_path, ids, in_memory):
    base_dir = build_gpt2_dir("") if in_memory else llama_dir
    told = "some-org/some-model" if in_memory else None
    targets = ["c_attn"] if in_memory else FIVE
    folder, _ = make_adapter(base_dir, told=told, target_modules=targets)
    one = merge(folder, base=str(base_dir), output=tmp_path / "one").output_dir
    many = merge(
        folder, base=str(base_dir), output=tmp_path / "many", max_shard_size="40KB"
    ).output_dir
    files = list(many.glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    found, expected = read_weights(many), read_weights(one)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(load(many)(ids).logits, load(one)(ids).logits)


def test_the_source_is_never_touched_and_everything_of_it_comes_along(
    build_llama_dir, make_adapter, tmp_path, files_in
):
    base_dir = shutil.copytree(build_llama_dir(max_shard_size="30KB"), tmp_path / "base")
    (base_dir / "chat_template.jinja").write_text("{{ messages }}")
    (base_dir / "LICENSE").write_text("terms")
    (base_dir / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    folder, _ = make_adapter(base_dir, target_modules=["q_proj"])
    before = files_in(base_dir) | {"adapter": files_in(folder)}
    for path in base_dir.iterdir():
        path.chmod(0o444)
    result = merge(folder)
    assert files_in(base_dir) | {"adapter": files_in(folder)} == before
    after = files_in(result.output_dir)
    assert after.keys() == {*before, "wegeft_merge.json"} - {"adapter"}
    kept = {name for name in after if after[name] == before.get(name)}
    assert kept >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "model.safetensors.index.json",
    }  # fmt: skip
    card = (result.output_dir / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "# The base" not in card
    provenance = json.loads((result.output_dir / "wegeft_merge.json").read_text())
    assert provenance["adapters"] == [{"path": str(folder), "weight": 1.0}]


def test_a_failing_merge_leaves_no_half_folder(llama_dir, make_adapter, tmp_path, monkeypatch):
    folder, _ = make_adapter(llama_dir, target_modules=["down_proj"])
    from wegeft_cli.methods import tensor_changes as edits

    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(edits, "merge_stored", fail)
    with pytest.raises(KeyboardInterrupt):
        merge(folder, output=tmp_path / "out")
    assert calls
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_merge_reads_the_config_and_each_header_once(build_llama_dir, make_adapter, monkeypatch):
    base_dir = build_llama_dir(max_shard_size="30KB")
    folder, _ = make_adapter(base_dir, target_modules=FIVE)
    read_shard, headers = safetensors_reader.read_shard, []
    monkeypatch.setattr(
        safetensors_reader, "read_shard", lambda path: headers.append(path) or read_shard(path)
    )
    configs = []

    def count(event, arguments):
        if event == "open" and str(arguments[0]) == str(folder / "adapter_config.json"):
            configs.append(arguments)

    sys.addaudithook(count)  # it stays, and looks at this folder alone
    merge(folder)
    assert len(configs) == 1
    of_base = [path for path in headers if path.parent == base_dir]
    assert sorted(of_base) == sorted(base_dir.glob("*.safetensors"))
    assert len(of_base) > 1


@pytest.mark.parametrize("read", ["merge", "generate"])
def test_a_config_of_a_newer_format_is_refused_before_the_base_is_looked_for(
    llama_dir, make_adapter, tmp_path, read
):
    folder, _ = make_adapter(llama_dir)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | {"format_version": 99}
    path.write_text(json.dumps(values | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="format 99"):
        merge(folder) if read == "merge" else generate(folder, prompts=["a"])
