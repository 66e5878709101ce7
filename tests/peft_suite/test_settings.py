"""What the config can ask for, what it may not, and what of PEFT is refused with its reason."""

import copy
import pickle
import sys

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import nn
from transformers import AutoModelForCausalLM

from tests.peft_suite.conftest import PEFT_MARKS, Mlp, draw_factors, factors_of
from wegeft_cli.interop.peft import WegeftConfig
from wegeft_cli.interop.peft_tuner.model import WegeftModel
from wegeft_cli.interop.peft_tuner.register import register
from wegeft_cli.methods.wegeft.inject import inject_generators

pytestmark = PEFT_MARKS
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


class Two(nn.Module):
    """Two linears of two widths; 4 bits come in blocks of 64."""

    def __init__(self, linear):
        super().__init__()
        self.a = linear(64, 128)
        self.b = linear(128, 64)

    def forward(self, x):
        return self.b(self.a(x).relu())


def groups_of(model, adapter="default"):
    return {
        name.removeprefix("base_model.wegeft_phi_").removesuffix(f".{adapter}")
        for name in factors_of(model, adapter)
        if "_phi_" in name
    }


def test_the_method_is_a_member_like_any_other():
    member = PeftType("WEGEFT")
    assert member is PeftType["WEGEFT"] is PeftType.WEGEFT
    assert member in list(PeftType)
    assert member == "WEGEFT" == member.value == member.name
    assert PEFT_TYPE_TO_TUNER_MAPPING["WEGEFT"] is PEFT_TYPE_TO_TUNER_MAPPING[member]
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert repr(member) == "<PeftType.WEGEFT: 'WEGEFT'>"
    assert sys.version_info >= (3, 11)


def test_registering_twice_does_nothing():
    members = list(PeftType)
    register()
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.WEGEFT] is WegeftModel


def test_a_method_that_peft_ships_itself_stays(monkeypatch):
    class Theirs:
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.WEGEFT, Theirs)
    register()
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.WEGEFT] is Theirs


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"r": 0}, "`r`"),
        ({"r": 2.0}, "`r`"),
        ({"r": True}, "`r`"),
        ({"alpha": float("nan")}, "`alpha`"),
        ({"r": 4, "scale": 3.0}, "leave it out"),
        ({"dropout": 1.0}, "`dropout`"),
        ({"dropout": -0.1}, "`dropout`"),
        ({"side": "left"}, "`side` must be one of input, output"),
        ({"share": "layer"}, "`share`"),
        ({"share": "groups"}, "no `groups`"),
        ({"init": "zero"}, "`init`"),
        ({"format_version": 2}, "newer one"),
        ({"task_type": "NONSENSE"}, "task type"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"target_modules": "q.*", "layers_to_transform": [1]}, "regular expression"),
        ({"target_modules": ["qkv_proj:q"]}, "rows of a fused projection"),
        ({"modules": {"a..b": "g"}}, "dotted module name"),
        ({"modules": {"a": "g.h"}}, "group name"),
    ],
)
def test_a_wrong_value_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        WegeftConfig(**options)


def test_the_published_scale_is_the_default():
    config = WegeftConfig()
    assert (config.r, config.alpha, config.scale) == (64, 128.0, 2.0)
    assert WegeftConfig(r=8, alpha=4).scale == 0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"q_proj", "v_proj", "down_proj"}),
        ({"share": "input_dim"}, {"d32", "d48"}),
        (
            {"target_modules": ["v_proj"], "share": "none"},
            {"model-layers-0-self_attn-v_proj", "model-layers-1-self_attn-v_proj"},
        ),
        (
            {"target_modules": ["q_proj", "v_proj"], "groups": {"all": [".*_proj"]}},
            {"all"},
        ),
    ],
)
def test_who_shares_a_pair(subjects, options, expected):
    subject = subjects("llama")
    model = subject.adapted(**options)
    assert groups_of(model) == expected
    # And the numbers are those of the generators in the same groups.
    other = subject.base()
    inject_generators(
        other, **{"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    )
    assert set(other.wegeft["default"].groups) == expected
    with torch.no_grad():
        for group in expected:
            for kind in ("phi", "psi"):
                factor = getattr(other.wegeft["default"][group], kind)
                factor.copy_(factors_of(model)[f"base_model.wegeft_{kind}_{group}.default"])
    assert subject.run(other).equal(subject.run(model))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"groups": {"g": [".*q_proj"]}}, "in no group"),
        ({"groups": {"g": [".*_proj"], "h": ["nothing"]}}, "matches no target"),
        ({"groups": {"g": [".*_proj"]}}, "two sizes"),
        ({"target_modules": ["embed_tokens"]}, "not supported"),
        ({"target_modules": ["input_layernorm"]}, "not supported"),
    ],
)
def test_what_cannot_be_shared_or_adapted_is_told(subjects, options, told):
    subject = subjects("llama")
    base = subject.base()
    before = repr(base)
    with pytest.raises(ValueError, match=told):
        get_peft_model(base, subject.kind.config(**options))
    assert repr(base) == before


def test_a_tied_head_is_refused(subjects):
    with pytest.raises(ValueError, match="is tied to"):
        # OPT's head is its embedding.
        subjects("opt").adapted(target_modules=["lm_head"], side="input")


def test_layers_that_torch_never_calls_are_refused():
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2)})
    with pytest.raises(ValueError, match="without calling it"):
        get_peft_model(attention, WegeftConfig(r=2, target_modules=["out_proj"]))
    encoder = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(16, 2, 32)})
    with pytest.raises(ValueError, match="without calling it"):
        get_peft_model(encoder, WegeftConfig(r=2, target_modules=["linear1"]))


def test_rows_of_a_fused_projection_go_by_modules(subjects):
    subject = subjects("gpt2")
    modules = {
        "transformer.h.0.attn.c_attn": [
            {"group": "q", "rows": [[0, 32]]},
            {"group": "v", "rows": [[64, 96]]},
        ]
    }
    model = get_peft_model(subject.base(), WegeftConfig(r=4, modules=modules)).eval()
    draw_factors(model, "default", 1)
    (layer,) = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    change = layer.get_delta_weight("default")
    assert change[:, 32:64].count_nonzero() == 0
    assert (change[:, :32] != 0).all()
    assert (change[:, 64:] != 0).all()
    before = subject.run(model)
    torch.testing.assert_close(subject.run(model.merge_and_unload()), before, **FLOAT32)
    modules["transformer.h.0.attn.c_attn"][1]["rows"] = [[64, 97]]
    with pytest.raises(ValueError, match="exceed its 96 outputs"):
        get_peft_model(subject.base(), WegeftConfig(r=4, modules=modules))


def test_one_config_serves_two_models(subjects):
    config = WegeftConfig(r=2, target_modules=["lin0", "q_proj"])
    first = get_peft_model(Mlp(), config)
    assert list(first.peft_config["default"].modules) == ["lin0"]
    second = get_peft_model(subjects("llama").base(), config)
    assert list(second.peft_config["default"].modules) == [
        f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)
    ]


def test_peft_s_default_targets(subjects):
    model = subjects("llama").adapted(target_modules=None)
    assert groups_of(model) == {"q_proj", "v_proj"}


def test_a_failed_addition_leaves_no_trace(subjects):
    subject = subjects("llama")
    model = subject.adapted()
    before, names = subject.run(model), {n for n, _ in model.named_parameters()}
    for options in ({"target_modules": ["nope"]}, {"target_modules": ["embed_tokens"]}):
        with pytest.raises(ValueError, match=r"nope|not supported"):
            model.add_adapter("other", subject.kind.config(**options))
    assert list(model.peft_config) == ["default"]
    assert {n for n, _ in model.named_parameters()} == names
    assert subject.run(model).equal(before)
    model.add_adapter("other", subject.kind.config())


def test_dropout_acts_in_training_alone(subjects):
    subject = subjects("llama")
    model, plain = subject.adapted(dropout=0.5), subject.adapted()
    assert subject.run(model).equal(subject.run(plain))
    model.train()
    torch.manual_seed(1)
    first = subject.run(model)
    assert not subject.run(model).equal(first)
    torch.manual_seed(1)
    assert subject.run(model).equal(first)
    model.train().unload()
    assert subject.run(model.get_base_model().eval()).equal(subject.run(subject.base()))


def test_adapters_that_cannot_be_active_together(subjects):
    subject = subjects("llama")
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config(side="output"))
    with pytest.raises(ValueError, match="merge them one by one"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
    # Merging them is no problem: each change is one of the weight.
    draw_factors(model, "other", 3)
    model.merge_adapter(adapter_names=["default", "other"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((["default", "other"], [1.0, 1.0], "sum", "linear"), "'cat'"),
        ((["default", "other"], [1.0], "sum"), "2 adapters, but 1 weights"),
        ((["default", "nobody"], [1.0, 1.0], "sum"), "nobody"),
        (([], [], "sum"), "not found"),
        ((["default", "other"], [1.0, 1.0], "other"), "already exists"),
        ((["default", "output"], [1.0, 1.0], "sum"), "differ in"),
        ((["default", "alone"], [1.0, 1.0], "sum"), "differ in"),
        ((["default", "head"], [1.0, 1.0], "sum"), "modules_to_save"),
    ],
)
def test_sums_that_are_none(subjects, arguments, told):
    subject = subjects("llama")
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config())
    model.add_adapter("output", subject.kind.config(side="output"))
    model.add_adapter("alone", subject.kind.config(share="none"))
    model.add_adapter("head", subject.kind.config(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=told):
        model.add_weighted_adapter(*arguments)
    assert "sum" not in model.peft_config


def test_direct_injection_is_refused(subjects, tmp_path):
    """It would throw the tuner away, and the factors with it."""
    subject = subjects("llama")
    with pytest.raises(ValueError, match="shared state"):
        inject_adapter_in_model(subject.kind.config(), subject.base())
    subject.adapted().save_pretrained(tmp_path)
    # With PEFT before 0.19, transformers itself has no road to an adapter.
    with pytest.raises((ValueError, ImportError), match=r"shared state|weight_conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_mixing_with_another_method_is_refused(subjects):
    subject = subjects("llama")
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(subject.base(), subject.kind.config(), mixed=True)
    model = subject.adapted()
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))


def quantised(kind):
    bnb = pytest.importorskip("bitsandbytes", reason="the extra `bitsandbytes` is not installed")

    def four(d_in, d_out):
        return bnb.nn.Linear4bit(d_in, d_out, compute_dtype=torch.float32, quant_type="nf4")

    def eight(d_in, d_out):
        return bnb.nn.Linear8bitLt(d_in, d_out, has_fp16_weights=False)

    torch.manual_seed(0)
    # In evaluation, 4 bits on a processor are packed for inference alone.
    return Two({4: four, 8: eight}[kind]).to("cpu").train()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_quantised_base(bits, side, tmp_path):
    base = quantised(bits)
    x = torch.randn(5, 64)
    with torch.no_grad():
        before = base(x)
        model = get_peft_model(base, WegeftConfig(r=2, side=side, target_modules=["a", "b"]))
        torch.testing.assert_close(model(x), before)
        draw_factors(model, "default", 1)
        after = model(x)
    assert (after - before).abs().max() > 1e-2
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in factors_of(model).values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(bits), tmp_path).train()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), after)
    (layer, _) = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert not layer.supports_lora_conversion()
    for action in (
        model.merge_adapter,
        model.merge_and_unload,
        layer.merge,
        lambda: layer.get_delta_weight("default"),
    ):
        with pytest.raises(ValueError, match="quantized"):
            action()
    with torch.no_grad():
        torch.testing.assert_close(model(x), after)
        torch.testing.assert_close(model.unload()(x), before)


def test_dropout_needs_entries_to_drop():
    base = quantised(8)
    with pytest.raises(ValueError, match="load the base in 16 bits"):
        get_peft_model(base, WegeftConfig(r=2, target_modules=["a"], dropout=0.1))
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
