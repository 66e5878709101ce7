"""`inspect`: what it says of every module is what the dense change says, in float64."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from wegeft_cli.analysis.edit import edit
from wegeft_cli.analysis.inspect import inspect
from wegeft_cli.artifacts.adapter_files import load_adapter_files
from wegeft_cli.errors import UserError
from wegeft_cli.methods.wegeft.equations import delta_weight

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
EXACT = 1e-8  # float64 through factorisations and Gram matrices
SINGLE = 1e-5  # kept in float32 for the comparisons


def dense_changes(base_dir, folder):
    """Give (W, delta_W) of every module, dense, in float64."""
    base, files = load_file(base_dir / "model.safetensors"), load_adapter_files(folder)
    manifest, found = files.manifest, {}
    for name, entries in manifest.modules.items():
        stored = base[f"{name}.weight"].double()
        for entry in entries:
            W = stored.T if entry.transposed else stored
            W = W if entry.rows is None else torch.cat([W[a:b] for a, b in entry.rows])
            phi, psi = (factor.double() for factor in files.factors[entry.group])
            change = delta_weight(W, phi, psi, manifest.scale, manifest.side)
            found[name, entry.group] = W, change, W @ phi if manifest.side == "input" else phi
    return found


def check_rows(result, dense, k):
    assert len(result["modules"]) == len(dense)
    for row in result["modules"]:
        W, change, _ = dense[row["module"], row["group"]]
        u, _, vh = torch.linalg.svd(W, full_matrices=False)
        left, right = u[:, :k], vh[:k].T
        sigma = torch.linalg.svdvals(change)
        total = change.square().sum()
        assert row["shape"] == list(W.shape)
        assert row["relative_change"] == pytest.approx(float(change.norm() / W.norm()), rel=EXACT)
        inside = float((left.T @ change).square().sum() / total)
        assert row["familiar"] == pytest.approx(inside, rel=EXACT)
        assert row["novel"] == pytest.approx(1 - inside, rel=1e-6, abs=1e-9)
        inside = float((change @ right).square().sum() / total)
        assert row["familiar_right"] == pytest.approx(inside, rel=EXACT)
        assert row["familiar_by_chance"] == min(k, *W.shape) / W.shape[0]
        assert row["singular_values"] == pytest.approx(
            sigma[: len(row["singular_values"])].tolist()
        )
        shares = sigma[sigma > 1e-12 * sigma[0]] / sigma.sum()
        rank = math.exp(-float((shares * shares.log()).sum()))
        assert row["effective_rank"] == pytest.approx(rank, rel=1e-6)
        m = row["num_directions"]
        space = torch.linalg.svd(change)[0][:, :m]
        cosines = torch.linalg.svdvals(left.T @ space).clamp(max=1).acos().rad2deg()
        assert row["principal_angles"] == pytest.approx(cosines.tolist(), abs=1e-4)


@pytest.mark.parametrize("side", ["input", "output"])
def test_every_figure_is_that_of_the_dense_change(llama_dir, make_adapter, side):
    folder, _ = make_adapter(llama_dir, target_modules=TARGETS, side=side)
    result = inspect(folder, top_k=6)
    dense = dense_changes(llama_dir, folder)
    check_rows(result, dense, 6)
    assert sorted(row["layer"] for row in result["modules"]) == [0] * 5 + [1] * 5
    for found in result["cosines"]:
        one, two = (dense[name, found["kind"]][1] for name in found["modules"])
        cosine = float((one * two).sum() / one.norm() / two.norm())
        assert found["matrix"][0] == pytest.approx([1, cosine], abs=SINGLE)
    assert len(result["cosines"]) == 5
    group = next(row for row in result["groups"] if row["group"] == "q_proj")
    both = [dense[key] for key in dense if key[1] == "q_proj"]
    size = sum(change.square().sum() for _, change, _ in both) / sum(
        W.square().sum() for W, _, _ in both
    )
    assert group["relative_change"] == pytest.approx(float(size.sqrt()), rel=EXACT)


def test_fused_and_transposed_weights(build_gpt2_dir, make_adapter):
    base_dir = build_gpt2_dir()
    folder, _ = make_adapter(base_dir, target_modules=["c_attn:q", "c_attn:v", "mlp.c_proj"])
    result = inspect(folder)
    check_rows(result, dense_changes(base_dir, folder), 4)
    assert {row["role"] for row in result["modules"]} == {"reads", "writes"}


@pytest.mark.parametrize("directions", ["columns", "principal"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_are_those_of_the_direct_effect_on_the_logits(
    llama_dir, build_gpt2_dir, make_adapter, directions, family
):
    base_dir = llama_dir if family == "llama" else build_gpt2_dir()
    target = "down_proj" if family == "llama" else "mlp.c_proj"
    folder, model = make_adapter(base_dir, target_modules=[target])
    result = inspect(folder, directions=directions, num_directions=2, num_tokens=5)
    dense = dense_changes(base_dir, folder)
    norm = model.model.norm if family == "llama" else model.transformer.ln_f
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    assert result["tokens"] == {"directions": directions, "reason": None}
    assert len(result["modules"]) == 2
    for row in result["modules"]:
        _, change, C = dense[row["module"], row["group"]]
        u = torch.linalg.svd(change)[0]
        assert [told["direction"] for told in row["tokens"]] == (
            [0, 1]
            if directions == "principal"
            else torch.tensor(row["direction_strengths"]).argsort(descending=True)[:2].tolist()
        )
        for told in row["tokens"]:
            i = told["direction"]
            vector = C[:, i] if directions == "columns" else u[:, i]
            if family == "gpt2":
                vector = vector - vector.mean()
            logits = model.get_output_embeddings().weight.double() @ (norm.weight.double() * vector)
            highest, lowest = logits.topk(5).indices.tolist(), (-logits).topk(5).indices.tolist()
            found = [[each["id"] for each in told[end]] for end in ("promoted", "suppressed")]
            # A singular vector's sign is free.
            assert found in ([highest, lowest], [lowest, highest])
            if directions == "columns":
                assert found == [highest, lowest]
            assert told["promoted"][0]["token"] == tokenizer.decode([found[0][0]])


def test_a_reading_module_shows_the_input_embeddings_along_psi(llama_dir, make_adapter):
    folder, model = make_adapter(llama_dir, target_modules=["q_proj"])
    psi = load_adapter_files(folder).factors["q_proj"][1]
    embeddings = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=1)
    told = inspect(folder, num_directions=1)["modules"][0]["tokens"][0]
    wanted = torch.topk(embeddings @ psi[told["direction"]], 8).indices.tolist()
    assert [each["id"] for each in told["along"]] == wanted
    assert -1 <= told["against"][0]["score"] < told["along"][0]["score"] <= 1


def test_large_shards_are_streamed_and_big_tables_cut(llama_dir, make_adapter, monkeypatch):
    from wegeft_cli.analysis import vocabulary

    folder, _ = make_adapter(llama_dir, target_modules=["down_proj"])
    whole = inspect(folder)["modules"][0]["tokens"]
    monkeypatch.setattr(vocabulary, "block_rows", lambda shape: 7)
    cut = inspect(folder)["modules"][0]["tokens"]
    for one, two in zip(whole, cut, strict=True):
        for end in ("promoted", "suppressed"):
            assert [each["id"] for each in one[end]] == [each["id"] for each in two[end]]


def test_against_itself_and_against_another(llama_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(llama_dir, target_modules=TARGETS)
    same = inspect(folder, against=folder, num_directions=0)["against"]
    assert same["cosine"] == pytest.approx(1, abs=SINGLE)
    assert all(row["overlap"] == pytest.approx(1, abs=SINGLE) for row in same["modules"])
    other = edit(
        folder, drop=["group:v_proj"], scale={"layer:1": -0.5}, output=tmp_path / "other"
    ).output_dir
    found = inspect(folder, against=other, num_directions=0)["against"]
    assert {label.rpartition(".")[2] for label in found["only_here"]} == {"v_proj"}
    assert found["only_there"] == []
    for row in found["modules"]:
        sign, ratio = (1, 1.0) if row["layer"] == 0 else (-1, 0.5)
        assert row["cosine"] == pytest.approx(sign, abs=SINGLE)
        assert row["size_ratio"] == pytest.approx(ratio, rel=SINGLE)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_lora_adapter_is_looked_into_and_compared(llama_dir, make_adapter, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    config = peft.LoraConfig(
        r=3, lora_alpha=12, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM"
    )
    lora = peft.get_peft_model(model, config)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    lora.save_pretrained(tmp_path / "lora")
    layer = lora.base_model.model.model.layers[0].self_attn.q_proj
    change = layer.get_delta_weight("default").detach().double()
    result = inspect(tmp_path / "lora", base=str(llama_dir))
    assert result["peft_type"] == "LORA"
    assert result["modules"][0]["change_norm"] == pytest.approx(float(change.norm()), rel=SINGLE)
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    _, ours, _ = dense_changes(llama_dir, folder)["model.layers.0.self_attn.q_proj", "q_proj"]
    against = inspect(folder, against=tmp_path / "lora", base=str(llama_dir))["against"]
    cosine = float((ours * change).sum() / ours.norm() / change.norm())
    assert against["modules"][0]["cosine"] == pytest.approx(cosine, abs=SINGLE)


def test_a_zero_adapter_has_no_shares_and_goes_through_json(llama_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    from wegeft_cli import inject_generators, save_adapter

    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    inject_generators(model, rank=2, target_modules=["down_proj"])
    save_adapter(model, tmp_path / "zero", base_model_name_or_path=str(llama_dir))
    result = inspect(tmp_path / "zero", output=tmp_path / "out.json", plots=tmp_path / "plots")
    assert result["modules"][0]["relative_change"] == 0
    assert result["modules"][0]["tokens"] == []
    assert json.loads((tmp_path / "out.json").read_text())["modules"][0]["familiar"] is None


def test_pictures_and_file_are_written(llama_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(llama_dir, target_modules=TARGETS)
    result = inspect(folder, against=folder, plots=tmp_path / "plots", output=tmp_path / "a.json")
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["against.png", "changes.png", "cosines.png", "spectra.png"]
    assert sorted(result["plots"]) == sorted(str(tmp_path / "plots" / name) for name in names)
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    inspect(folder, output=tmp_path / "a.json")  # an earlier result may be replaced
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="nothing else is overwritten"):
        inspect(folder, output=tmp_path / "notes.txt")


def test_bad_asking_is_refused(llama_dir, make_adapter, tmp_path, build_llama_dir):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    with pytest.raises(UserError, match="at least 1"):
        inspect(folder, top_k=0)
    with pytest.raises(UserError, match="one of columns"):
        inspect(folder, directions="rows")
    with pytest.raises(UserError, match="not the one"):
        inspect(folder, base=str(build_llama_dir(seed=5)))
    base_dir = tmp_path / "base"
    shutil.copytree(llama_dir, base_dir)
    (base_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no safetensors"):
        inspect(folder, base=str(base_dir))
