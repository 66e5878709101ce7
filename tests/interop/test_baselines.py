"""PEFT's methods as baselines, and stock PEFT reading what a WeGeFT adapter amounts to."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import UserError
from wegeft_cli.methods.peft.loading import load_peft, start_from_peft
from wegeft_cli.methods.peft.models import build_config, inject_peft, merge_peft, save_peft
from wegeft_cli.methods.wegeft.equations import lora_pair
from wegeft_cli.methods.wegeft.inject import inject_generators

FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# Two float32 layers by another road: 2.8e-7 was measured on a base of small weights.
FLOAT32 = 1e-5


def inject(model, name, *, rank, alpha, target_modules, options, modules_to_save=()):
    config = build_config(name, rank, alpha, target_modules, options, "CAUSAL_LM")
    return inject_peft(model, config, modules_to_save)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def ids():
    return torch.randint(4, 300, (2, 11), generator=torch.Generator().manual_seed(2))


def write_twin(model, folder, base_dir):
    """The LoRA twin as stock PEFT wants it: a clone of A per layer, scaling 1, nothing else."""
    adapter = model.wegeft["default"]
    tensors = {}
    for group, targets in adapter.groups.items():
        for target in targets:
            weight = model.get_submodule(target.name).weight.detach()
            generator = adapter[group]
            a, b = lora_pair(
                weight,
                generator.phi.detach(),
                generator.psi.detach(),
                generator.scale,
                adapter.settings.side,
            )
            stem = f"base_model.model.{target.name}"
            tensors[f"{stem}.lora_A.weight"] = a.contiguous()
            tensors[f"{stem}.lora_B.weight"] = b.contiguous()
    rank = adapter.settings.rank
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_dir),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": FIVE,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("share", ["module_type", "input_dim", "none"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_the_lora_twin_in_stock_peft_gives_the_same_logits(llama_dir, ids, tmp_path, side, share):
    model = load(llama_dir)
    generators = inject_generators(
        model, rank=4, alpha=6.0, target_modules=FIVE, side=side, share=share
    )
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generators.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    write_twin(model, tmp_path / "twin", llama_dir)
    with warnings.catch_warnings():
        # PEFT asks transformers by names that are on their way out.
        warnings.simplefilter("ignore", FutureWarning)
        twin = PeftModel.from_pretrained(load(llama_dir), str(tmp_path / "twin")).eval()
    logits = model(ids).logits
    assert (twin(ids).logits - logits).abs().max() < FLOAT32 * logits.abs().max()
    assert (logits - load(llama_dir)(ids).logits).abs().max() > 1e-2 * logits.abs().max()


METHODS = {
    "lora": {},
    "dora": {},
    "rslora": {},
    "pissa": {},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "vera": {},
    "lokr": {},
}


@pytest.mark.parametrize("method", [*METHODS, "oft"])
def test_a_method_is_counted_without_weights(llama_dir, method):
    """PiSSA takes its start from the weights, and OFT its blocks from the rank or from a key."""

    def count(model):
        options = METHODS.get(method, {"oft_block_size": 4})
        targets = ["q_proj", "down_proj"] if options.get("feedforward_modules") else ["q_proj"]
        model = inject(model, method, rank=2, alpha=None, target_modules=targets, options=options)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    model = load(llama_dir)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    assert count(skeleton) == count(model) > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_saved_loaded_and_merged(llama_dir, ids, tmp_path, method):
    targets = ["v_proj", "down_proj"] if method != "vera" else ["q_proj"]
    torch.manual_seed(0)
    model = inject(
        load(llama_dir),
        method,
        rank=2,
        alpha=None,
        target_modules=targets,
        options=METHODS[method],
    )
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.eval()
    save_peft(model, tmp_path, base_model_name_or_path=str(llama_dir))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama_dir)
    again = load_peft(load(llama_dir), Adapter.open(tmp_path))
    logits = model(ids).logits
    assert torch.equal(again(ids).logits, logits)
    merged, num_folded = merge_peft(again)
    assert num_folded == len(targets) * 2
    assert (merged(ids).logits - logits).abs().max() < FLOAT32 * logits.abs().max()
    assert (logits - load(llama_dir)(ids).logits).abs().max() > 1e-3 * logits.abs().max()


@pytest.mark.parametrize(
    ("method", "key"), [("lora", "target_modules"), ("ia3", "feedforward_modules")]
)
def test_sets_are_written_in_one_order(llama_dir, tmp_path, method, key):
    targets = ["v_proj", "q_proj", "k_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    options = {"feedforward_modules": targets} if method == "ia3" else {}
    settings = {"rank": 2, "alpha": None, "target_modules": targets, "options": options}
    model = inject(load(llama_dir), method, **settings)
    assert isinstance(getattr(model.peft_config["default"], key), set)
    save_peft(model, tmp_path, base_model_name_or_path=str(llama_dir))
    assert json.loads((tmp_path / "adapter_config.json").read_text())[key] == sorted(targets)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_modules_trained_whole_are_saved_loaded_and_merged(llama_dir, ids, tmp_path, method):
    model = inject(
        load(llama_dir),
        method,
        rank=2,
        alpha=None,
        target_modules=["v_proj", "down_proj"],
        options={**METHODS[method]},
        modules_to_save=["lm_head", "norm"],
    )
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # Full names: PEFT alone would take `input_layernorm` for `norm`, which ends alike.
    assert sorted(n for n in learning if "modules_to_save" in n) == [
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.model.norm.modules_to_save.default.weight",
    ]
    with torch.no_grad():
        for parameter in learning.values():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.eval()
    save_peft(model, tmp_path, base_model_name_or_path=str(llama_dir))
    again = load_peft(load(llama_dir), Adapter.open(tmp_path))
    logits = model(ids).logits
    assert torch.equal(again(ids).logits, logits)
    trained = learning["base_model.model.lm_head.modules_to_save.default.weight"]
    merged, num_folded = merge_peft(again)
    assert num_folded == 4 + 2
    assert torch.equal(merged.lm_head.weight, trained)
    assert (merged(ids).logits - logits).abs().max() < FLOAT32 * logits.abs().max()


def test_a_start_takes_every_tensor(llama_dir, ids, tmp_path):
    settings = {
        "rank": 2, "alpha": None, "target_modules": ["q_proj"], "options": {},
        "modules_to_save": ["lm_head"],
    }  # fmt: skip
    model = inject(load(llama_dir), "lora", **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    save_peft(model, tmp_path, base_model_name_or_path=str(llama_dir))
    fresh = inject(load(llama_dir), "lora", **settings).eval()
    assert not torch.equal(fresh(ids).logits, model(ids).logits)
    start_from_peft(fresh, Adapter.open(tmp_path))
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert all(p.requires_grad for n, p in fresh.named_parameters() if "lora_" in n)
    other = inject(load(llama_dir), "lora", **{**settings, "rank": 3})
    with pytest.raises(UserError, match="4 of 5 tensors differ"):
        start_from_peft(other, Adapter.open(tmp_path))


def test_a_module_that_is_not_there_is_told(llama_dir):
    with pytest.raises(UserError, match="matches no module") as caught:
        inject(
            load(llama_dir), "lora", rank=2, alpha=None, target_modules=["q_proj"], options={},
            modules_to_save=["lm_hed"],
        )  # fmt: skip
    assert caught.value.key == "adapter.modules_to_save"


def test_rank_alpha_and_options_reach_the_method(llama_dir):
    def config_of(name, **settings):
        given = {"rank": 3, "alpha": None, "target_modules": ["q_proj"], "options": {}, **settings}
        return inject(load(llama_dir), name, **given).peft_config["default"]

    assert (config_of("lora").r, config_of("lora").lora_alpha) == (3, 6)
    assert config_of("lora", alpha=5).lora_alpha == 5
    assert config_of("lora", options={"lora_dropout": 0.5}).lora_dropout == 0.5
    assert config_of("dora").use_dora is True
    assert config_of("rslora").use_rslora is True
    everything = config_of("lora", target_modules="all-linear").target_modules
    assert {name.rpartition(".")[2] for name in everything} >= {"q_proj", "up_proj"}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"name": "lorra"}, "adapter.type"),
        ({"options": {"lora_drop": 0.5}}, "adapter.peft.lora_drop"),
        ({"target_modules": ["q_prj"]}, "adapter.target_modules"),
    ],
)
def test_what_peft_does_not_know_is_the_users_to_mend(llama_dir, change, key):
    given = {"name": "lora", "rank": 2, "alpha": None, "target_modules": ["q_proj"], "options": {}}
    with pytest.raises(UserError) as caught:
        inject(load(llama_dir), **{**given, **change})
    assert caught.value.key == key


def test_a_folder_that_peft_cannot_read_is_told(llama_dir, tmp_path):
    config = {"peft_type": "NOPE", "base_model_name_or_path": "base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: this file is missing"):
        load_peft(load(llama_dir), Adapter.open(tmp_path))
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="PEFT cannot load"):
        load_peft(load(llama_dir), Adapter.open(tmp_path))
