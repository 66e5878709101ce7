"""RED, SSF, 1LoRA, tied LoRA and LoReFT: each an affine edit that merges exactly."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from wegeft_cli.errors import UserError
from wegeft_cli.methods.registry import find_method
from wegeft_cli.methods.siblings.folding import affine_changes
from wegeft_cli.methods.siblings.inject import EDITS, attach_tensors, edits_of, select_layers
from wegeft_cli.recipe.schema import SIBLING_TYPES, AdapterSection

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
EXACT = 1e-13
# Per layer of width d_in x d_out at rank r, and once for each kind and shape.
FORMULAS = {
    "red": (lambda i, o, r: 2 * o, 0),
    "ssf": (lambda i, o, r: 2 * o, 0),
    "1lora": (lambda i, o, r: o, 0),
    "tied_lora": (lambda i, o, r: r + o, lambda i, o, r: r * (i + o)),
    "loreft": (lambda i, o, r: r * (2 * o + 1), 0),
}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **changes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))


def mistral():
    return MistralForCausalLM(MistralConfig(**SIZES, **HEADS))


def build(make):
    torch.manual_seed(0)
    return make().double().eval()


def inject(model, name, *, seed=0, **settings):
    section = AdapterSection(type=name, r=4, **settings)
    return find_method(name).inject(model, section, task_type=None, seed=seed)


def shake(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "conv1d"])
@pytest.mark.parametrize("name", SIBLING_TYPES)
def test_an_edit_starts_at_the_base_and_merges_exactly(name, make):
    method = find_method(name)
    base = logits_of(build(make))
    model = inject(build(make), name)
    torch.testing.assert_close(logits_of(model), base, rtol=0, atol=1e-6)
    shake(model)
    edited = logits_of(model)
    assert (edited - base).abs().max() > 1e-3
    model(input_ids=IDS).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    again = inject(build(make), name, seed=5)
    attach_tensors(again, edits_of(model)[1].tensors(), {}, file="adapter")
    assert torch.equal(logits_of(again), edited)
    with method.disabled(again):
        assert torch.equal(logits_of(again), base)
    merged, num_folded = method.fold(again, None)
    assert num_folded >= 8
    assert not any("wegeft" in key for key in merged.state_dict())
    torch.testing.assert_close(logits_of(merged), edited, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", SIBLING_TYPES)
def test_a_change_in_blocks_of_rows_is_the_change_of_the_whole(name):
    model = inject(build(lambda: llama(attention_bias=True)), name, target_modules=["q_proj"])
    shake(model)
    section = AdapterSection(type=name, r=4, target_modules=["q_proj"])
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    targets = select_layers(model, section)
    changes = affine_changes(model, edits_of(model)[1], targets, {}, shapes, 0.5)
    biased = name in ("red", "ssf", "loreft")
    assert len(changes) == 2 * (1 + biased)
    for key, change in changes.items():
        own = model.get_parameter(key).detach()
        layer, _, kind = key.rpartition(".")
        edit = edits_of(model)[1].by_name()[layer]
        exact = edit.merged_weight(own) if kind == "weight" else edit.merged_bias(own)
        assert change.rows_at_once((5000, 32)) == (5000 if name == "loreft" else 1024)
        step = len(own) if name == "loreft" or kind == "bias" else 5
        blocks = [change(own[i : i + step].clone(), i) for i in range(0, len(own), step)]
        torch.testing.assert_close(torch.cat(blocks), own + 0.5 * (exact - own), rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", SIBLING_TYPES)
def test_parameters_follow_the_formula(name):
    with torch.device("meta"):
        skeleton = llama()
    section = AdapterSection(type=name, r=4, target_modules=["q_proj", "down_proj"])
    groups = find_method(name).count(skeleton, section, None)
    layer, once = FORMULAS[name]
    shapes = {"q_proj": (32, 32), "down_proj": (48, 32)}
    assert {g.name: g.num_parameters for g in groups} == {
        kind: 2 * layer(*shape, 4) + (once(*shape, 4) if once else 0)
        for kind, shape in shapes.items()
    }
    model = inject(build(llama), name, target_modules=["q_proj", "down_proj"])
    learning = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(learning) == sum(g.num_parameters for g in groups)
    assert set(EDITS) == set(FORMULAS)


def test_a_merged_bias_is_switched_on_where_the_architecture_has_a_place(tmp_path):
    model = inject(build(llama), "ssf", target_modules=["q_proj"])
    shake(model)
    edited = logits_of(model)
    merged, _ = find_method("ssf").fold(model, None)
    assert (merged.config.attention_bias, merged.config.mlp_bias) == (True, False)
    merged.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded), edited, rtol=0, atol=EXACT)


def test_a_bias_without_a_place_is_refused_and_leaves_the_model():
    model = inject(build(mistral), "red")
    shake(model)
    edited = logits_of(model)
    with pytest.raises(UserError, match=r"q_proj' and 13 more layers needs a bias") as caught:
        find_method("red").fold(model, None)
    assert "wegeft eval" in caught.value.hint
    assert torch.equal(logits_of(model), edited)


def test_loreft_keeps_its_directions_orthonormal():
    model = inject(build(llama), "loreft", target_modules=["q_proj"])
    shake(model)
    (edit, *_) = edits_of(model)[1].by_name().values()
    point = torch.zeros(32, dtype=torch.float64)
    with torch.no_grad():
        edit.source.zero_()
        edit.source_bias.zero_()
        # P = 0 projects the directions out: twice is once.
        once = edit(point, torch.ones(32, dtype=torch.float64))
        assert (edit(point, once) - once).abs().max() < EXACT


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("loreft", {"target_modules": ["k_proj"], "r": 17}, "do not fit a layer of 16 outputs"),
        ("red", {"target_modules": ["q_proj:0-8"]}, "edits whole linear layers"),
        ("1lora", {"target_modules": ["q_prj"]}, "matches no linear layer"),
    ],
)
def test_what_an_edit_cannot_do_is_refused(name, settings, message):
    section = AdapterSection(type=name, **{"r": 4, **settings})
    with pytest.raises(UserError, match=message):
        find_method(name).inject(build(llama), section, task_type=None, seed=0)


def test_tensors_of_another_base_are_refused():
    model = inject(build(llama), "1lora")
    tensors = edits_of(model)[1].tensors()
    name = next(iter(tensors))
    with pytest.raises(UserError, match=r"is \[32\] in this model, nothing in the adapter"):
        attach_tensors(model, {k: v for k, v in tensors.items() if k != name}, {}, file="a")
    with pytest.raises(UserError, match=r"is \[32\] in this model, \[3\] in the adapter"):
        attach_tensors(model, {**tensors, name: torch.zeros(3)}, {}, file="a")
