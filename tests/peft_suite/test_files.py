"""One format on disk: what the command line writes PEFT loads, and the other way, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from classifiers import write_vit
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from tests.peft_suite.conftest import FACTOR_STD, PEFT_MARKS, draw_factors, factors_of
from wegeft_cli.artifacts.adapter_files import load_adapter_files
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.interop.peft import WegeftConfig
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import load_adapter, save_adapter

pytestmark = PEFT_MARKS
PEFT_KEYS = {"inference_mode", "peft_version"}
# The merged weight is the same; what runs is one product where the adapter takes three.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
LANGUAGE = ["llama", "gpt2", "qwen2", "opt"]


def inject(subject, dtype=torch.float32, **options):
    """The command line's road: generators with drawn factors in a base."""
    model = subject.base(dtype)
    values = {k: v for k, v in subject.kind.options.items() if k != "task_type"}
    inject_generators(model, **{"rank": 4, **values, **options})
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.wegeft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * FACTOR_STD)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_is_not_applied_twice(subjects, name, tmp_path):
    """A model that has the command line's adapters takes no more from PEFT."""
    subject = subjects(name)
    folder = write(inject(subject), subject, tmp_path / "mine")
    model = subject.base()
    load_adapter(model, folder)
    before = subject.run(model)
    with pytest.raises(ValueError, match="would apply a second time"):
        PeftModel.from_pretrained(model, folder)
    with pytest.raises(ValueError, match="would apply a second time"):
        get_peft_model(model, subject.kind.config())
    assert subject.run(model).equal(before)


def write(model, subject, folder):
    save_adapter(model, folder, base_model_name_or_path=str(subject.folder))
    return folder


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"side": "output"}),
        ("llama", {"init": "psi_zero", "alpha": 3.0}),
        ("llama", {"dropout": 0.1}),
        ("llama", {"share": "input_dim"}),
        ("llama", {"share": "none"}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "o_proj"],
                "groups": {"first": [".*layers.0.*"], "second": [".*layers.1.*"]},
            },
        ),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("gpt2", {}),
        ("gpt2", {"side": "output"}),
        # Rows of a fused projection.
        ("gpt2", {"target_modules": ["c_attn:q", "c_attn:v", "c_fc"]}),
        ("gpt2", {"target_modules": ["c_attn:k", "c_attn:0-7"], "side": "output"}),
        ("qwen2", {}),
        ("opt", {}),
    ],
)
def test_peft_loads_what_the_command_line_wrote(subjects, name, options, tmp_path):
    subject = subjects(name)
    model = inject(subject, **options)
    folder = write(model, subject, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(subject.base(), folder)
    assert subject.run(loaded).equal(subject.run(model))
    assert not subject.run(loaded).equal(subject.run(subject.base()))
    # And back again: PEFT writes what it has read.
    loaded.save_pretrained(tmp_path / "again")
    again = load_adapter_files(tmp_path / "again")
    first = load_adapter_files(folder)
    assert again.manifest.modules == first.manifest.modules
    assert again.manifest.base_fingerprint == first.manifest.base_fingerprint is not None
    assert again.manifest.modules_to_save == first.manifest.modules_to_save
    assert again.factors.keys() == first.factors.keys()
    for group, (phi, psi) in first.factors.items():
        assert again.factors[group][0].equal(phi)
        assert again.factors[group][1].equal(psi)


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_command_line_loads_what_peft_wrote(subjects, name, tmp_path):
    subject = subjects(name)
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    loaded = subject.base()
    load_adapter(loaded, tmp_path, base_dir=subject.folder)
    assert subject.run(loaded).equal(subject.run(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_roads_over_a_16_bit_base(subjects, dtype, tmp_path):
    subject = subjects("llama")
    model = inject(subject, dtype)
    folder = write(model, subject, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(subject.base(dtype), folder)
    assert subject.run(loaded).equal(subject.run(model))


def test_trained_modules_go_both_ways(subjects, tmp_path):
    subject = subjects("llama")
    model = subject.adapted(modules_to_save=["lm_head", "model.norm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.25)
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path)["modules_to_save"] == ["model.norm", "lm_head"]
    loaded = subject.base()
    load_adapter(loaded, tmp_path, base_dir=subject.folder)
    assert subject.run(loaded).equal(subject.run(model))


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_streaming_merge_takes_what_peft_wrote(subjects, name, tmp_path):
    """With the same bits that PEFT's own merge gives."""
    subject = subjects(name)
    model = subject.adapted()
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    merge(tmp_path / "adapter", output=tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written
    for tensor_name, tensor in written.items():
        assert merged[tensor_name].equal(tensor), tensor_name


def test_a_base_whose_files_leave_out_the_prefix(subjects, tmp_path):
    """As GPT-2's do: the adapter's file then speaks of the base's own names."""
    subject = subjects("gpt2")
    base = tmp_path / "base"
    shutil.copytree(subject.folder, base)
    tensors = load_file(base / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), subject.kind.config())
    draw_factors(model.eval(), "default", 1)
    model.save_pretrained(tmp_path / "adapter")
    assert "h.0.attn.c_attn" in read_config(tmp_path / "adapter")["modules"]
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert subject.run(loaded).equal(subject.run(model))
    merge(tmp_path / "adapter", output=tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    merged = model.merge_and_unload().state_dict()
    assert written["h.0.attn.c_attn.weight"].equal(merged["transformer.h.0.attn.c_attn.weight"])


def test_the_auto_class_loads_what_the_command_line_wrote(subjects, tmp_path):
    subject = subjects("llama")
    model = inject(subject)
    folder = write(model, subject, tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert subject.run(loaded).equal(subject.run(model))


def test_scores_of_an_adapter_that_peft_wrote(llama_dir, data_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(llama_dir)
    model = get_peft_model(base, WegeftConfig(r=4, target_modules=["q_proj"]))
    draw_factors(model, "default", 1)
    model.save_pretrained(tmp_path / "peft")
    own = AutoModelForCausalLM.from_pretrained(llama_dir)
    load_adapter(own, tmp_path / "peft")
    save_adapter(own, tmp_path / "own", base_model_name_or_path=str(llama_dir))
    options = {"tasks": ["boolq"], "data_dir": data_dir, "limit": 3, "max_new_tokens": 4}
    outputs = {}
    for name, target in (
        ("peft", tmp_path / "peft"),
        ("own", tmp_path / "own"),
        ("base", llama_dir),
    ):
        result = evaluate(target, **options, output=tmp_path / f"{name}.json")
        assert result["results"][0]["n"] == 3
        lines = Path(result["samples_path"]).read_text(encoding="utf-8").splitlines()
        outputs[name] = [json.loads(line)["output"] for line in lines]
    assert outputs["peft"] == outputs["own"] != outputs["base"]


def test_both_write_the_same_config(subjects, tmp_path):
    subject = subjects("llama")
    write(
        inject(subject, target_modules=["down_proj", "q_proj", "v_proj"]), subject, tmp_path / "a"
    )
    subject.adapted().save_pretrained(tmp_path / "b")
    ours, theirs = read_config(tmp_path / "a"), read_config(tmp_path / "b")
    kinds = ours["target_modules"]
    assert sorted(kinds) == theirs["target_modules"]
    assert theirs.keys() - ours.keys() <= PEFT_KEYS
    assert {k: v for k, v in theirs.items() if k not in PEFT_KEYS} == ours | {
        "target_modules": theirs["target_modules"]
    }


def test_the_base_is_known_again(subjects, tmp_path):
    subject = subjects("llama")
    subject.adapted().save_pretrained(tmp_path / "adapter")
    config = read_config(tmp_path / "adapter")
    assert config["base_fingerprint"] == fingerprint_base(subject.folder)
    other = subjects("qwen2")
    with pytest.raises(UserError, match="is not the one"):
        load_adapter(subject.base(), tmp_path / "adapter", base_dir=other.folder)


def test_an_unreadable_base_does_not_cost_the_adapter(subjects, tmp_path):
    subject = subjects("llama")
    base = tmp_path / "base"
    shutil.copytree(subject.folder, base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), subject.kind.config())
    draw_factors(model, "default", 1)
    # Another file: the model may still read its weights from the one that it has open.
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").write_bytes(b"no longer")
    with pytest.warns(UserWarning, match="records no fingerprint"):
        model.save_pretrained(tmp_path / "adapter")
    assert read_config(tmp_path / "adapter")["base_fingerprint"] is None
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path / "adapter")
    assert subject.run(loaded).equal(subject.run(model.eval()))


def test_a_task_or_base_that_peft_was_not_told(subjects, tmp_path):
    subject = subjects("llama")
    model = subject.base()
    model.__dict__["name_or_path"] = ""
    adapted = get_peft_model(model, subject.kind.config(task_type=None)).eval()
    draw_factors(adapted, "default", 1)
    adapted.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config["task_type"] is None
    assert not config["base_model_name_or_path"]
    assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    loaded = subject.base()
    load_adapter(loaded, tmp_path)
    assert subject.run(loaded).equal(subject.run(adapted))


def test_keys_of_a_later_version_are_told_and_left_out(subjects, tmp_path):
    subject = subjects("llama")
    subject.adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(read_config(tmp_path) | {"of_tomorrow": 1}), encoding="utf-8")
    with pytest.warns(UserWarning, match="of_tomorrow"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config.r == 4
    path.write_text(json.dumps(read_config(tmp_path) | {"format_version": 2}), encoding="utf-8")
    with (
        pytest.warns(UserWarning, match="of_tomorrow"),
        pytest.raises(ValueError, match="format 2"),
    ):
        PeftConfig.from_pretrained(tmp_path)


def test_an_adapter_of_another_model_is_refused(subjects, tmp_path):
    subjects("llama").adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no layer 'model"):
        PeftModel.from_pretrained(subjects("opt").base(), tmp_path)
    config = read_config(tmp_path)
    config["modules"] = dict.fromkeys(
        ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"], "mixed"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="48 wide"):
        PeftModel.from_pretrained(subjects("llama").base(), tmp_path)


def test_missing_factors_are_told(subjects, tmp_path):
    subject = subjects("llama")
    subject.adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.wegeft_phi_q_proj"]
    save_file(tensors, path)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(subject.base(), tmp_path)


def test_a_file_is_the_same_each_time(subjects, tmp_path):
    subject = subjects("llama")
    subject.adapted().save_pretrained(tmp_path / "a")
    subject.adapted().save_pretrained(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(factors_of(subject.adapted())) == 6


def test_a_renamed_module_is_found_by_its_name_in_the_bases_files(tmp_path):
    """A ViT's modules have other names in its files, under which an earlier version had them."""
    base = write_vit(tmp_path / "vit")
    load = AutoModelForImageClassification.from_pretrained
    config = WegeftConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["o_proj"], init="psi_zero"
    )
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "wegeft_psi" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    recorded = json.loads(path.read_text())["checkpoint_names"]
    start = "vit.encoder.layer.0.attention"
    assert recorded["vit.layers.0.attention.q_proj.weight"] == f"{start}.attention.query.weight"
    assert recorded["vit.layers.0.attention.o_proj.bias"] == f"{start}.output.dense.bias"
    pixels = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels).logits
    config = json.loads(path.read_text())
    config["modules"] = {
        name.replace("vit.layers", "vit.blocks"): group for name, group in config["modules"].items()
    }
    config["checkpoint_names"] = {
        name.replace("vit.layers", "vit.blocks"): file
        for name, file in config["checkpoint_names"].items()
    }
    path.write_text(json.dumps(config))
    again = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=pixels).logits, expected)
