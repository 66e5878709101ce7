"""Modules trained whole: a copy learns beside the generators, the base's own keeps its bits."""

import copy
import re

import pytest
import torch
from transformers import PoolFormerConfig, PoolFormerForImageClassification

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.owner import (
    disable_generators,
    get_generators,
    remove_generators,
    use_generators,
)
from wegeft_cli.methods.layers.targets import find_linears
from wegeft_cli.methods.layers.trained_modules import find_saved_modules
from wegeft_cli.methods.wegeft.folding import fold_generators, unfold_generators
from wegeft_cli.methods.wegeft.inject import inject_generators, select_targets
from wegeft_cli.models.heads import find_head_modules
from wegeft_cli.models.kernels import enable_checkpointing

TARGETS = ["q_proj", "v_proj"]
# Outside the layers, inside them, an embedding, a norm, a linear: all that a language model has.
SAVED = ["embed_tokens", "model.norm", "lm_head", "input_layernorm"]
NUM_SAVED = 5  # two layers have an input_layernorm each


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(2))


def inject(model, saved=SAVED, **settings):
    settings = {"rank": 4, "target_modules": TARGETS, "modules_to_save": saved, **settings}
    return inject_generators(model, **settings)


@pytest.fixture
def perturb():
    """Change every parameter of some generators a little, so that norms stay near one."""

    def perturb_(generators, std=0.1):
        random = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in generators.trainable():
                parameter.add_(torch.randn(parameter.shape, generator=random) * std)
        return generators

    return perturb_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fresh_copies_change_no_bit(make_llama, ids, dtype):
    model = make_llama().to(dtype)
    before = model(ids).logits
    names = set(model.state_dict())
    generators = inject(model)
    assert torch.equal(model(ids).logits, before)
    saved = generators.saved_of("default")
    assert len(saved.by_name()) == NUM_SAVED
    # An optimizer's step on 16 bits would be mostly rounded away.
    master = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in saved.parameters()} == {master}
    assert {name for name in model.state_dict() if not name.startswith("wegeft.")} == names
    assert {p.dtype for n, p in model.named_parameters() if not n.startswith("wegeft.")} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_they_and_the_factors_learn(make_llama, ids, dtype, checkpointing):
    model = make_llama().to(dtype).train()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    generators = inject(model)
    if checkpointing:
        enable_checkpointing(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in model.named_parameters() if n.startswith("wegeft.")}
    assert len(learning) == 4 + NUM_SAVED
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(generators.trainable(), lr=0.1)
    for _ in range(2):  # phi's zeros keep psi still in the first step
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert all(not torch.equal(after[name], start[name]) for name in learning)


def test_checkpointing_gives_the_same_gradients(make_llama, ids, perturb):
    grads = []
    for checkpointing in (False, True):
        model = make_llama().train()
        generators = perturb(inject(model))
        if checkpointing:
            enable_checkpointing(model)
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in generators.trainable()])
    assert len(grads[0]) == 4 + NUM_SAVED
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)  # float32, another order of sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", ["inject", "checkpointing"])
def test_a_layer_trained_whole_may_be_one_that_recomputes(make_llama, ids, dtype, first):
    grads = []
    for checkpointing in (False, True):
        model = make_llama().to(dtype).train()
        if checkpointing and first == "checkpointing":
            enable_checkpointing(model)
        targets = ["layers.0.self_attn.q_proj"]
        generators = inject(model, ["layers.1"], target_modules=targets)
        if checkpointing and first == "inject":
            enable_checkpointing(model)
        for use_cache in (False, True):
            model(ids, labels=ids, use_cache=use_cache).loss.backward()
        grads.append([p.grad for p in generators.trainable()])
    assert len(grads[0]) > 2
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)  # the same operations in the same order


def test_a_copy_learns_as_the_module_itself_would(make_llama, ids):
    """The gradient of the copy is what full training of that module in place gives."""
    plain = make_llama()
    plain.requires_grad_(False)
    plain.lm_head.requires_grad_(True)
    plain.model.embed_tokens.requires_grad_(True)
    plain(ids, labels=ids).loss.backward()
    model = make_llama()
    saved = inject(model, ["lm_head", "embed_tokens"]).saved_of("default").named_tensors()
    model(ids, labels=ids).loss.backward()
    assert torch.equal(saved["lm_head.weight"].grad, plain.lm_head.weight.grad)
    expected = plain.model.embed_tokens.weight.grad
    assert torch.equal(saved["model.embed_tokens.weight"].grad, expected)


def test_disabled_removed_and_folded(make_llama, ids, perturb):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_llama().to(dtype).eval()
        base = model(ids).logits
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        perturb(inject(model))
        trained = model(ids).logits
        assert (trained - base).abs().max() > 0.01
        with disable_generators(model):
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, trained)
        assert fold_generators(model) == 4 + NUM_SAVED
        head = model.wegeft.saved_of("default").named_tensors()["lm_head.weight"]
        assert torch.equal(model.lm_head.weight, head.to(dtype))
        with disable_generators(model):  # what is folded stays
            folded = model(ids).logits
        # The generators' edit rounds elsewhere when it is folded; bfloat16 keeps 8 bits.
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        assert (folded - trained).abs().max() < tolerance * trained.abs().max()
        unfold_generators(model)
        assert all(torch.equal(model.get_parameter(name), v) for name, v in weights.items())
        assert torch.equal(model(ids).logits, trained)
        remove_generators(model)
        assert torch.equal(model(ids).logits, base)
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_fold_of_copies_alone_is_exact(make_llama, ids, perturb):
    """With factors at their zero start nothing but the copies differs: then no bit may."""
    model = make_llama().to(torch.bfloat16).eval()
    generators = inject(model)
    with torch.no_grad():
        for parameter in generators.saved.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    trained = model(ids).logits
    fold_generators(model)
    assert torch.equal(model(ids).logits, trained)


def test_every_adapter_has_its_own(make_llama, ids, perturb):
    model = make_llama().eval()
    base = model(ids).logits
    perturb(inject(model, ["lm_head"], adapter_name="one"))
    one = model(ids).logits
    generators = inject(model, ["lm_head", "model.norm"], adapter_name="two")
    assert torch.equal(model(ids).logits, base)  # a copy of the base's own, not of the first's
    perturb(generators, std=0.2)
    two = model(ids).logits
    inject_generators(model, rank=2, target_modules=["lm_head"], adapter_name="three")
    assert torch.equal(model(ids).logits, base)
    with pytest.raises(UserError, match="is the adapted layer 'lm_head'"):
        inject(model, ["lm_head"], target_modules=["lm_head"], adapter_name="four")
    for name, expected in (("one", one), ("two", two), ("three", base), ("one", one)):
        use_generators(model, name)
        assert torch.equal(model(ids).logits, expected)
        learning = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert learning == {name}
    # A copy is no layer of the base, so that nothing adapts it.
    assert all(not name.startswith("wegeft.") for name in find_linears(model))
    assert "four" not in model.wegeft.adapters


def test_copies_of_the_model_are_independent(make_llama, ids, perturb):
    model = make_llama().eval()
    perturb(inject(model))
    before = model(ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, before)
    perturb(get_generators(twin))
    assert not torch.equal(twin(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


def test_hooks_and_a_forward_of_its_own_stay(make_llama, ids):
    """As NEFTune hooks into the embeddings, and as kernels are patched in."""
    model = make_llama().eval()
    calls = []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append("hook"))
    own = model.model.norm.forward

    def patched(x):
        calls.append("patched")
        return own(x)

    model.model.norm.forward = patched
    inject(model)
    model(ids)
    assert calls == ["hook", "patched"]
    remove_generators(model)
    assert model.model.norm.forward is patched


def test_autocast_over_a_float32_base(make_llama, ids, perturb):
    model = make_llama()
    generators = perturb(inject(model), std=0.02)
    full = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(ids, labels=ids)
        half.loss.backward()
    assert (half.logits.float() - full).abs().max() < 0.05 * full.abs().max()  # 8 bits
    grads = [p.grad for p in generators.trainable()]
    assert len(grads) == 4 + NUM_SAVED
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_they_move_and_are_stored_with_the_model(make_llama, ids, perturb):
    model = make_llama()
    perturb(inject(model))
    other = make_llama()
    inject(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)
    with torch.device("meta"):
        skeleton = make_llama()
    inject(skeleton)
    assert {p.device.type for p in skeleton.wegeft.saved.parameters()} == {"meta"}
    model.double()
    assert {p.dtype for p in model.wegeft.saved.parameters()} == {torch.float64}
    assert model(ids).logits.dtype == torch.float64


def test_names_match_by_their_end(make_llama):
    model = make_llama()
    assert find_saved_modules(model, ["norm"]) == ["model.norm"]  # not input_layernorm
    assert find_saved_modules(model, ["model.layers.1.mlp", "lm_head"]) == [
        "model.layers.1.mlp",
        "lm_head",
    ]
    assert find_saved_modules(model, []) == []
    with pytest.raises(UserError, match="'head' matches no module") as caught:
        find_saved_modules(model, ["head"])
    assert caught.value.key == "adapter.modules_to_save"
    assert "did you mean 'lm_head'?" in caught.value.hint
    with pytest.raises(ExceptionGroup) as several:
        find_saved_modules(model, ["lm_haed", "lm_head", "emb"])
    assert len(several.value.exceptions) == 2


@pytest.mark.parametrize(
    ("saved", "settings", "words"),
    [
        (["q_proj"], {}, "is the adapted layer"),
        (["layers.0.self_attn"], {}, r"holds the adapted layer 'model\.layers\.0\.self_attn\.q_"),
        (["layers"], {"target_modules": ".*_proj", "share": "none"}, "holds the adapted layer"),
        (["self_attn", "layers.0.self_attn.k_proj"], {"target_modules": ["down_proj"]}, "whole"),
        (["act_fn"], {}, "has no parameters"),
        (["layers"], {"target_modules": ["lm_head"]}, "is never called itself"),
    ],
)
def test_what_cannot_be_trained_whole_is_told(make_llama, ids, saved, settings, words):
    model = make_llama()
    before = model(ids).logits
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        inject(model, saved, **settings)
    error = caught.value
    faults = error.exceptions if isinstance(error, ExceptionGroup) else [error]
    assert {fault.key for fault in faults} == {"adapter.modules_to_save"}
    assert all(fault.hint for fault in faults)
    assert any(re.search(words, fault.message) for fault in faults)
    assert get_generators(model) is None
    assert torch.equal(model(ids).logits, before)


def test_a_fault_of_every_layer_is_told_once(make_llama):
    with pytest.raises(UserError, match=r"layers\.0\.mlp' holds .* \(and so with 1 more 'mlp'\)"):
        inject(make_llama(), ["mlp"], target_modules=["up_proj"])


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_module_is_refused_before_and_after_loading(make_llama, name, device):
    with torch.device(device):
        model = make_llama(tie_word_embeddings=True)
    other = "embed_tokens" if name == "lm_head" else "lm_head"
    with pytest.raises(UserError, match=rf"is one tensor with '.*{other}\.weight' \(tied\)") as c:
        inject(model, [name])
    assert "untie" in c.value.hint
    assert get_generators(model) is None


class Odd(torch.nn.Module):
    """A linear to adapt beside a module that cannot be trained whole."""

    def __init__(self, odd):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.odd = odd

    def forward(self, x):
        return self.odd(self.first(x))


def test_quantised_weights_and_running_statistics_are_refused():
    quantised = torch.nn.Linear(4, 4)
    weight = torch.zeros(4, 4, dtype=torch.int8)
    quantised.weight = torch.nn.Parameter(weight, requires_grad=False)
    for odd, words in ((quantised, "quantized"), (torch.nn.BatchNorm1d(4), "running_mean")):
        with pytest.raises(UserError, match=words):
            inject(Odd(odd), ["odd"], target_modules=["first"])


def test_a_nested_module_is_copied_whole():
    model = Odd(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)))
    x = torch.randn(3, 4)
    before = model(x)
    generators = inject(model, ["odd"], target_modules=["first"])
    assert sorted(generators.saved_of("default").named_tensors()) == [
        "odd.0.bias", "odd.0.weight", "odd.2.bias", "odd.2.weight",
    ]  # fmt: skip
    assert torch.equal(model(x), before)
    # A second adapter may train a part of what the first trains whole.
    generators = inject(model, ["odd.2"], target_modules=["first"], adapter_name="part")
    with torch.no_grad():
        for parameter in generators.trainable():
            parameter.add_(1.0)
    assert not torch.equal(model(x), before)
    third = inject(model, ["odd"], target_modules=["first"], adapter_name="third")
    assert torch.equal(model(x), before)
    assert sum(1 for _ in third.saved_of("third").parameters()) == 4


def test_a_full_name_means_that_module_alone():
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_labels": 2}
    model = PoolFormerForImageClassification(PoolFormerConfig(**sizes))
    heads = find_head_modules(model)
    assert heads == ["norm", "classifier"]
    # Modules of that name in the backbone have no parameters, and were refused.
    assert find_saved_modules(model, heads) == heads
    # A layer of the backbone inside a module of the head's name is a target.
    model.poolformer.norm = torch.nn.Sequential(torch.nn.Linear(16, 16))
    targets = select_targets(model, "all-linear", modules_to_save=heads)
    assert [target.name for target in targets] == ["poolformer.norm.0"]
