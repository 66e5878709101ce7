"""`edit`: an adapter without parts, or scaled, is an ordinary adapter; its original comes back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wegeft_cli.analysis.edit import edit
from wegeft_cli.artifacts.adapter_files import load_adapter_files
from wegeft_cli.errors import UserError
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.wegeft.equations import merged_weight
from wegeft_cli.methods.wegeft.save_load import load_adapter

TARGETS = ["q_proj", "v_proj", "down_proj"]
ROUNDING = 2e-6  # float32 factors, multiplied once more


def read_base(base_dir):
    return load_file(base_dir / "model.safetensors")


def expect(base, files, factor_of):
    """Fold a whole adapter with a factor a module, in float64."""
    manifest = files.manifest
    weights = {}
    for name, (entry,) in manifest.modules.items():
        phi, psi = (factor.double() for factor in files.factors[entry.group])
        phi, s = factor_of(name, entry.group, phi)
        weights[name] = merged_weight(
            base[f"{name}.weight"].double(), phi, psi, manifest.scale * s, manifest.side
        )
    return weights


EDITS = {
    "a group off": (
        {"drop": ["group:q_proj"]},
        lambda n, g, phi: (phi, 0.0 if g == "q_proj" else 1.0),
    ),
    "a layer off": ({"drop": ["layer:1"]}, lambda n, g, phi: (phi, 0.0 if ".1." in n else 1.0)),
    "a layer halved": (
        {"scale": {"layer:0": 0.5}},
        lambda n, g, phi: (phi, 0.5 if ".0." in n else 1.0),
    ),
    "a module turned round": (
        {"scale": {"module:model.layers.1.mlp.down_proj": -1.5}},
        lambda n, g, phi: (phi, -1.5 if n.endswith("1.mlp.down_proj") else 1.0),
    ),
    "factors multiply": (
        {"scale": {"group:v_proj": 3.0, "layer:1": 0.5}},
        lambda n, g, phi: (phi, (3.0 if g == "v_proj" else 1.0) * (0.5 if ".1." in n else 1.0)),
    ),
    "a direction off": (
        {"drop": ["direction:v_proj:2"]},
        lambda n, g, phi: (
            phi * torch.tensor([1.0, 1, 0, 1]).double() if g == "v_proj" else phi,
            1.0,
        ),
    ),
}


@pytest.mark.parametrize(
    ("name", "side"),
    [*((name, "input") for name in EDITS), ("a layer halved", "output")],
)
def test_merge_and_load_give_the_edited_weights(llama_dir, make_adapter, tmp_path, ids, name, side):
    arguments, factor_of = EDITS[name]
    folder, _ = make_adapter(llama_dir, target_modules=TARGETS, side=side)
    files, base = load_adapter_files(folder), read_base(llama_dir)
    edited = edit(folder, output=tmp_path / "edited", **arguments).output_dir

    merge(edited, output=tmp_path / "merged")
    merged = read_base(tmp_path / "merged")
    wanted = expect(base, files, factor_of)
    assert len(wanted) == 6
    for module, weight in wanted.items():
        found = merged[f"{module}.weight"].double()
        assert torch.allclose(found, weight, atol=ROUNDING, rtol=ROUNDING), module
        merged.pop(f"{module}.weight")
    assert all(torch.equal(merged[key], base[key]) for key in merged)

    loaded = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    load_adapter(loaded, edited, base_dir=llama_dir)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, whole(ids).logits, atol=1e-4)


def test_original_is_kept_and_restored_to_the_byte(llama_dir, make_adapter, tmp_path, files_in):
    folder, _ = make_adapter(llama_dir, target_modules=TARGETS)
    before = files_in(folder)
    first = edit(folder, drop=["layer:0"], output=tmp_path / "first").output_dir
    second = edit(first, scale={"group:q_proj": 2.0}, output=tmp_path / "second").output_dir
    assert files_in(folder) == before
    manifest = load_adapter_files(second).manifest
    assert [(e.part, e.factor) for e in manifest.edits] == [("layer:0", 0.0), ("group:q_proj", 2.0)]
    assert json.loads((second / "adapter_config.json").read_text())["edits"][0] == {
        "part": "layer:0",
        "factor": 0.0,
    }
    assert "layer:0 dropped, group:q_proj x 2" in (second / "README.md").read_text()
    restored = edit(second, restore=True, output=tmp_path / "restored").output_dir
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert files_in(restored)[name] == before[name]
    assert "Edited with" not in (restored / "README.md").read_text()


def test_without_its_original_it_can_be_edited_but_not_restored(llama_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(llama_dir, target_modules=TARGETS)
    edited = edit(folder, drop=["layer:0"]).output_dir
    shutil.rmtree(edited / "original")
    with pytest.raises(UserError, match="is gone"):
        edit(edited, restore=True, output=tmp_path / "restored")
    again = edit(edited, drop=["group:q_proj"], output=tmp_path / "again").output_dir
    assert not (again / "original").exists()
    assert len(load_adapter_files(again).manifest.edits) == 2


def test_a_scaled_layer_leaves_its_group(llama_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    result = edit(folder, scale={"layer:1": 0.25}, output=tmp_path / "edited")
    files = load_adapter_files(result.output_dir)
    assert set(files.factors) == {"q_proj", "q_proj-x0-25"}
    assert files.manifest.share == "groups"
    assert (result.num_modules, result.num_groups) == (2, 2)
    one, two = files.factors["q_proj"], files.factors["q_proj-x0-25"]
    assert torch.equal(two[0], 0.25 * one[0])
    assert torch.equal(two[1], one[1])


def test_modules_trained_whole_can_be_dropped(build_llama_dir, make_adapter, tmp_path):
    base_dir = build_llama_dir(tie_word_embeddings=False)
    folder, _ = make_adapter(base_dir, target_modules=["q_proj"], modules_to_save=["lm_head"])
    files = load_adapter_files(edit(folder, drop=["saved:lm_head"]).output_dir)
    assert files.manifest.modules_to_save == ()
    assert files.saved_modules == {}
    with pytest.raises(UserError, match="only be dropped"):
        edit(folder, scale={"saved:lm_head": 0.5}, output=tmp_path / "no")


def test_rows_of_a_fused_projection_stay_apart(build_gpt2_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(build_gpt2_dir(), target_modules=["c_attn:q", "c_attn:v"])
    files = load_adapter_files(folder)
    dropped = next(iter(files.factors))
    edited = load_adapter_files(edit(folder, drop=[f"group:{dropped}"]).output_dir)
    assert dropped not in edited.factors
    assert len(edited.manifest.modules) == 2
    assert all(len(entries) == 1 for entries in edited.manifest.modules.values())
    loaded = AutoModelForCausalLM.from_pretrained(build_gpt2_dir())
    load_adapter(loaded, folder.with_name("mine-edited"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_peft_loads_an_edited_adapter(llama_dir, make_adapter, tmp_path, ids):
    peft = pytest.importorskip("peft")
    import wegeft_cli.interop.peft  # noqa: F401

    folder, _ = make_adapter(llama_dir, target_modules=TARGETS)
    edited = edit(folder, scale={"layer:0": 0.5}, drop=["group:v_proj"]).output_dir
    base = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    ours = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    load_adapter(ours, edited)
    theirs = peft.PeftModel.from_pretrained(base, str(edited)).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "nothing is named"),
        ({"drop": ["group:k_proj"]}, "no group 'k_proj'"),
        ({"drop": ["layer:7"]}, "layers 0 to 1"),
        ({"drop": ["direction:q_proj:4"]}, "directions are 0 to 3"),
        ({"drop": ["q_proj"]}, "no name of a part"),
        ({"drop": ["module:model.layers.0.self_attn.k_proj"]}, "no module"),
        ({"drop": ["layer:0-1"]}, "no module of the adapter would be left"),
        ({"scale": {"group:q_proj": float("nan")}}, "finite"),
        ({"restore": True}, "no edited one"),
        ({"restore": True, "drop": ["layer:0"]}, "whole original"),
    ],
)
def test_bad_edits_are_refused(llama_dir, make_adapter, tmp_path, arguments, told):
    folder, _ = make_adapter(llama_dir, target_modules=TARGETS)
    with pytest.raises(UserError, match=told):
        edit(folder, output=tmp_path / "edited", **arguments)
    assert not (tmp_path / "edited").exists()


def test_several_faults_are_told_together(llama_dir, make_adapter):
    folder, _ = make_adapter(llama_dir, target_modules=TARGETS)
    with pytest.raises(ExceptionGroup) as told:
        edit(folder, drop=["layer:9", "group:qproj"])
    assert len(told.value.exceptions) == 2
    assert "did you mean q_proj" in str(told.value.exceptions[1])
