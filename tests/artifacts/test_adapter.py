"""An adapter's folder reads back equal, and every damage to it is one clear error."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from wegeft_cli.artifacts.adapter import Adapter, resolve_adapter_dir
from wegeft_cli.artifacts.adapter_files import load_adapter_files, save_adapter_files
from wegeft_cli.artifacts.run_directory import find_newest_run
from wegeft_cli.errors import UserError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def rewrite(adapter_dir, **changes):
    """Save the weights again with some tensors changed, or without them where None is given."""
    tensors = load_file(adapter_dir / WEIGHTS) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, adapter_dir / WEIGHTS, metadata={"format": "pt"})


def test_it_reads_back_equal(adapter_dir, saving_manifest, factors, names_in):
    loaded = load_adapter_files(adapter_dir)
    assert loaded.manifest == saving_manifest
    assert loaded.factors.keys() == factors.keys()
    for group, (phi, psi) in factors.items():
        assert torch.equal(loaded.factors[group][0], phi)
        assert torch.equal(loaded.factors[group][1], psi)
    assert torch.equal(loaded.saved_modules["score.weight"], torch.ones(3, 16))
    assert names_in(adapter_dir) == ["README.md", CONFIG, WEIGHTS]
    assert (adapter_dir / "README.md").read_text() == "# A card\n"


def test_the_contract_on_disk(adapter_dir):
    tensors = load_file(adapter_dir / WEIGHTS)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "base_model.wegeft_phi_q_proj": [16, 2],
        "base_model.wegeft_psi_q_proj": [2, 16],
        "base_model.wegeft_phi_v_proj": [16, 2],
        "base_model.wegeft_psi_v_proj": [2, 16],
        "base_model.model.score.weight": [3, 16],
    }


def test_factors_of_any_type_and_layout_are_stored_as_float32(tmp_path, manifest, factors):
    turned = {g: (phi.bfloat16(), psi.t().contiguous().t()) for g, (phi, psi) in factors.items()}
    save_adapter_files(tmp_path / "a", manifest, turned, card="")
    loaded = load_adapter_files(tmp_path / "a").factors
    for group, (phi, psi) in turned.items():
        assert torch.equal(loaded[group][0], phi.float())
        assert torch.equal(loaded[group][1], psi)
        assert loaded[group][0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_module_keeps_its_type_and_its_bits(tmp_path, saving_manifest, factors, dtype):
    saved = {"score.weight": torch.randn(3, 16).to(dtype), "score.bias": torch.randn(3).to(dtype)}
    save_adapter_files(tmp_path / "a", saving_manifest, factors, saved_modules=saved, card="")
    loaded = load_adapter_files(tmp_path / "a").saved_modules
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("names", [(), ("score", "lm_head"), ("scor",)])
def test_modules_and_tensors_that_do_not_match_are_refused(
    tmp_path, saving_manifest, factors, adapter_dir, names
):
    wrong = replace(saving_manifest, modules_to_save=names)
    saved = {"score.weight": torch.ones(3, 16)}
    with pytest.raises(ValueError, match="modules_to_save"):
        save_adapter_files(tmp_path / "a", wrong, factors, saved_modules=saved, card="")
    (adapter_dir / CONFIG).write_text(wrong.to_json())
    with pytest.raises(UserError, match="modules_to_save") as caught:
        load_adapter_files(adapter_dir)
    assert caught.value.file == str(adapter_dir / WEIGHTS)


def test_the_same_adapter_gives_the_same_bytes(tmp_path, manifest, factors, hash_folder):
    save_adapter_files(tmp_path / "a", manifest, factors, card="c")
    save_adapter_files(tmp_path / "b", manifest, dict(reversed(factors.items())), card="c")
    assert hash_folder(tmp_path / "a") == hash_folder(tmp_path / "b")


def test_an_adapter_is_replaced_and_other_files_are_not(tmp_path, adapter_dir, manifest, factors):
    doubled = {group: (2 * phi, psi) for group, (phi, psi) in factors.items()}
    save_adapter_files(adapter_dir, manifest, doubled, card="")
    assert torch.equal(load_adapter_files(adapter_dir).factors["q_proj"][0], doubled["q_proj"][0])
    (adapter_dir / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        save_adapter_files(adapter_dir, manifest, factors, card="")
    assert torch.equal(load_adapter_files(adapter_dir).factors["q_proj"][0], doubled["q_proj"][0])


def test_what_does_not_fit_is_not_written(tmp_path, manifest, factors, names_in):
    swapped = {group: (psi, phi) for group, (phi, psi) in factors.items()}
    with pytest.raises(ValueError, match="r 2"):
        save_adapter_files(tmp_path / "a", manifest, swapped, card="")
    with pytest.raises(ValueError, match="groups"):
        save_adapter_files(tmp_path / "a", manifest, {"q_proj": factors["q_proj"]}, card="")
    with pytest.raises(UserError, match="phi_zero"):
        save_adapter_files(tmp_path / "a", replace(manifest, init="zero"), factors, card="")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(adapter_dir, name):
    (adapter_dir / name).unlink()
    with pytest.raises(UserError, match="missing") as caught:
        load_adapter_files(adapter_dir)
    assert caught.value.file == str(adapter_dir / name)


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 50, 500, -1])
def test_truncated_weights_are_told(adapter_dir, num_bytes):
    data = (adapter_dir / WEIGHTS).read_bytes()
    (adapter_dir / WEIGHTS).write_bytes(data[:num_bytes])
    with pytest.raises(UserError, match="damaged"):
        load_adapter_files(adapter_dir)


def test_bytes_too_many_are_told(adapter_dir):
    with (adapter_dir / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(UserError, match="damaged"):
        load_adapter_files(adapter_dir)


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("base_model.wegeft_phi_q_proj", None, "is missing"),
        ("base_model.wegeft_phi_k_proj", torch.ones(16, 2), "no group"),
        ("lm_head.lora_A.weight", torch.ones(16, 2), "no group"),
        ("base_model.wegeft_phi_q_proj", torch.ones(2, 16), "must be phi"),
        ("base_model.wegeft_psi_q_proj", torch.ones(2, 8), "must be phi"),
        ("base_model.wegeft_psi_q_proj", torch.ones(32), "must be phi"),
        ("base_model.wegeft_psi_q_proj", torch.ones(2, 16).bfloat16(), "float32"),
        ("base_model.wegeft_psi_q_proj", torch.full((2, 16), torch.nan), "NaN"),
        ("base_model.model.score.weight", torch.full((3, 16), torch.inf), "NaN"),
        ("base_model.model.score.weight", torch.ones(3).to(torch.float8_e5m2), "F8_E5M2"),
    ],
)
def test_wrong_tensors_are_told(adapter_dir, name, tensor, told):
    rewrite(adapter_dir, **{name: tensor})
    with pytest.raises(UserError, match=told):
        load_adapter_files(adapter_dir)


def test_all_wrong_tensors_come_at_once(adapter_dir):
    rewrite(
        adapter_dir,
        **{"base_model.wegeft_phi_q_proj": None, "base_model.wegeft_phi_v_proj": torch.ones(3, 2)},
    )
    with pytest.raises(ExceptionGroup) as caught:
        load_adapter_files(adapter_dir)
    assert len(caught.value.exceptions) == 2


def test_a_lora_adapter_is_told_as_such(adapter_dir):
    (adapter_dir / WEIGHTS).rename(adapter_dir / "adapter_model.bin")
    (adapter_dir / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(UserError, match="type 'LORA'"):
        load_adapter_files(adapter_dir)


def test_the_kind_and_the_base_of_any_adapter(adapter_dir):
    assert _type(adapter_dir) == ("WEGEFT", "some/base", None)
    config = {"peft_type": "LORA", "base_model_name_or_path": "b", "revision": "main", "x": 1}
    (adapter_dir / CONFIG).write_text(json.dumps(config))
    assert _type(adapter_dir) == ("LORA", "b", "main")
    for key, value in (("peft_type", 3), ("base_model_name_or_path", None), ("revision", [])):
        (adapter_dir / CONFIG).write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError) as caught:
            Adapter.open(adapter_dir)
        assert caught.value.key == key
    for text in ("[]", "{"):
        (adapter_dir / CONFIG).write_text(text)
        with pytest.raises(UserError, match="JSON"):
            Adapter.open(adapter_dir)


def test_an_adapter_is_found_from_its_run(adapter_dir, tmp_path):
    assert resolve_adapter_dir(adapter_dir) == adapter_dir
    assert resolve_adapter_dir(tmp_path) == adapter_dir


def test_what_is_no_adapter_is_told_what_it_is(tmp_path, adapter_dir):
    def told(path):
        with pytest.raises(UserError) as caught:
            resolve_adapter_dir(path)
        return str(caught.value)

    assert "no such path" in told(tmp_path / "none")
    assert "is a file" in told(adapter_dir / CONFIG)
    (tmp_path / "empty").mkdir()
    assert "neither" in told(tmp_path / "empty")
    run_dir = tmp_path / "run"
    checkpoint = run_dir / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (run_dir / "run.json").write_text('{"status": "interrupted"}')
    assert "'interrupted'" in told(run_dir)
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "manifest.json").write_text("{}")
    assert str(run_dir) in told(checkpoint)
    (adapter_dir / CONFIG).unlink()
    assert f"lacks its {CONFIG}" in told(adapter_dir)


def test_the_run_that_finished_last_is_found(tmp_path):
    runs = tmp_path / "runs"
    assert find_newest_run(runs) is None

    def make_run(name, text, mtime=None):
        (runs / name).mkdir(parents=True)
        path = runs / name / "run.json"
        path.write_text(text)
        if mtime is not None:
            os.utime(path, (mtime, mtime))

    make_run("a_running", '{"status": "running", "finished_at": "2030-01-01T00:00:00Z"}')
    make_run("b_damaged", '{"status": "finished"')
    make_run("c_list", "[]")
    assert find_newest_run(runs) is None
    make_run("d_by_mtime", '{"status": "finished"}', mtime=0)
    assert find_newest_run(runs) == runs / "d_by_mtime"
    make_run("e_newest", '{"status": "finished", "finished_at": "2020-01-01T12:00:00+00:00"}')
    make_run("f_zone", '{"status": "finished", "finished_at": "2020-01-01T13:00:00+02:00"}')
    assert find_newest_run(runs) == runs / "e_newest"
    make_run("g_odd", '{"status": "finished", "finished_at": [1]}', mtime=1)
    assert find_newest_run(runs) == runs / "e_newest"


def _type(adapter_dir):
    adapter = Adapter.open(adapter_dir)
    return adapter.peft_type, adapter.base, adapter.revision
