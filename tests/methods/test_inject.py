"""Generators in a model: they change nothing at first, they alone learn, all views agree."""

import copy
from itertools import product

import pytest
import torch

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.owner import (
    disable_generators,
    get_generators,
    remove_generators,
    use_generators,
)
from wegeft_cli.methods.wegeft.folding import fold_generators, unfold_generators
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.models.kernels import enable_checkpointing

FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
EXACT = 1e-10  # float64 through a few layers
SHARES = ["module_type", "input_dim", "none", "groups"]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(2))


def sharing(share: str, side: str) -> dict:
    if share != "groups":
        return {"share": share}
    # In the stack, first and third have 12 inputs and 20 outputs, second the other way round.
    return {"groups": {"outer": ["first", "third"], "inner": ["second"]}}


@pytest.mark.parametrize("init", ["phi_zero", "psi_zero"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("view", ["auto", "activation", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_generators_change_no_bit(make_llama, ids, init, side, view, dtype):
    model = make_llama().to(dtype)
    before = model(ids).logits
    inject_generators(model, rank=4, target_modules=FIVE, init=init, side=side, view=view)
    for mode in (model.train, model.eval):
        mode()
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(("side", "share"), list(product(["input", "output"], SHARES)))
def test_views_agree_in_outputs_and_gradients(make_stack, shake, side, share):
    x = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    results = {}
    for view in ("activation", "weight", "auto"):
        model = make_stack()
        settings = {"rank": 3, "alpha": 2.0, "side": side, "view": view, **sharing(share, side)}
        generators = shake(inject_generators(model, **settings).double())
        entered = x.clone().requires_grad_()
        out = model(entered)
        out.square().sum().backward()
        grads = [entered.grad, *(p.grad for p in generators.parameters())]
        results[view] = [out.detach(), *grads]
        assert (out - make_stack()(x)).abs().max() > 1e-3  # the change is a real one
        model.eval()
        unfolded = model(x)
        fold_generators(model)
        assert (model(x) - unfolded).abs().max() < EXACT
    for view in ("weight", "auto"):
        for a, b in zip(results[view], results["activation"], strict=True):
            assert (a - b).abs().max() < EXACT


def test_only_the_factors_learn_and_each_is_there_once(make_llama, ids):
    model = make_llama()
    generators = inject_generators(model, rank=4, target_modules=FIVE)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {
        f"wegeft.adapters.default.{kind}.{factor}" for kind in FIVE for factor in ("phi", "psi")
    }
    assert len(generators.trainable()) == 10
    assert {p.dtype for p in generators.parameters()} == {torch.float32}
    model(ids).logits.square().mean().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learning)
    saved = [key for key in model.state_dict() if "phi" in key or "psi" in key]
    assert len(saved) == 10


def test_state_dict_names_of_the_base_stay(make_llama):
    model = make_llama()
    names = set(model.state_dict())
    inject_generators(model, rank=2, target_modules="all-linear")
    assert {name for name in model.state_dict() if not name.startswith("wegeft.")} == names
    remove_generators(model)
    assert set(model.state_dict()) == names


def test_training_learns(make_llama, ids):
    model = make_llama()
    generators = inject_generators(model, rank=4, target_modules=FIVE)
    optimizer = torch.optim.AdamW(generators.trainable(), lr=5e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_factors_are_a_pure_function_of_seed_and_group(make_llama):
    def psi(seed: int, targets: list[str]) -> torch.Tensor:
        generators = inject_generators(make_llama(), rank=4, target_modules=targets, seed=seed)
        return generators["default"]["v_proj"].psi

    assert torch.equal(psi(1, ["q_proj", "v_proj"]), psi(1, ["v_proj"]))
    assert not torch.equal(psi(1, ["v_proj"]), psi(2, ["v_proj"]))
    assert psi(1, ["v_proj"]).abs().max() <= 32**-0.5


def test_several_adapters_switch_and_turn_off(make_llama, shake, ids):
    model = make_llama().eval()
    base = model(ids).logits
    shake(inject_generators(model, rank=4, target_modules=FIVE))
    one = model(ids).logits
    generators = inject_generators(
        model, rank=2, target_modules=["q_proj", "o_proj"], adapter_name="second", side="output"
    )
    assert torch.equal(model(ids).logits, base)  # fresh, and the first is off
    shake(generators)
    two = model(ids).logits
    assert not torch.equal(one, two)
    use_generators(model, "default")
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    with disable_generators(model):
        assert torch.equal(model(ids).logits, base)
    again = model(ids).logits
    assert not torch.equal(again, base)
    with pytest.raises(KeyError, match="no adapter 'third'"):
        use_generators(model, "third")
    with pytest.raises(UserError, match="already has an adapter"):
        inject_generators(model, rank=2, target_modules=["q_proj"], adapter_name="second")


def test_a_deep_copy_is_a_model_of_its_own(make_llama, shake, ids):
    model = make_llama().eval()
    generators = inject_generators(model, rank=4, target_modules=FIVE)
    twin = copy.deepcopy(model)
    base = twin(ids).logits
    shake(generators)
    assert torch.equal(twin(ids).logits, base)
    shake(get_generators(twin))
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_gpt2_conv1d_and_fused_rows(make_gpt2, shake, ids):
    parts = ["c_attn:q", "c_attn:v", "mlp.c_proj"]
    for side, view in product(["input", "output"], ["activation", "weight", "auto"]):
        model = make_gpt2().double().eval()
        base = model(ids).logits
        generators = inject_generators(
            model, rank=4, target_modules=parts, side=side, view=view, share="none"
        ).double()
        assert torch.equal(model(ids).logits, base)
        shake(generators)
        out = model(ids).logits
        assert (out - base).abs().max() > 1e-3
        folded = fold_generators(model)
        assert folded == (4 if side == "input" else 8)  # two layers; the output side maps biases
        # GPT-2's LayerNorm and attention stay in float64 here.
        assert (model(ids).logits - out).abs().max() < EXACT
        unfold_generators(model)
        with disable_generators(model):
            assert torch.equal(model(ids).logits, base)


def test_untouched_rows_of_a_fused_projection_keep_their_bits(make_gpt2, shake):
    model = make_gpt2().eval()
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    shake(inject_generators(model, rank=4, target_modules=["c_attn:q"]))
    fold_generators(model)
    after = model.transformer.h[0].attn.c_attn.weight
    assert torch.equal(after[:, 32:], before[:, 32:])
    assert not torch.equal(after[:, :32], before[:, :32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unfold_restores_every_bit(make_llama, shake, dtype):
    model = make_llama().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    shake(inject_generators(model, rank=4, target_modules=FIVE))
    assert fold_generators(model) == 10
    changed = [
        n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])
    ]
    assert len(changed) == 10
    unfold_generators(model)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_folding_faults(make_llama):
    model = make_llama()
    with pytest.raises(UserError, match="no active adapter"):
        fold_generators(model)
    inject_generators(model, rank=2, target_modules=["q_proj"])
    with pytest.raises(UserError, match="no folded adapter"):
        unfold_generators(model)
    fold_generators(model, keep_base=False)
    with pytest.raises(UserError, match="folded already"):
        fold_generators(model)
    with pytest.raises(UserError, match="were not kept"):
        unfold_generators(model)
    with pytest.raises(UserError, match="is folded"):
        inject_generators(model, rank=2, target_modules=["v_proj"], adapter_name="b")


class TestWeightDropout:
    def make(self, make_stack, shake, dropout: float = 0.5):
        model = make_stack()
        shake(inject_generators(model, rank=3, alpha=3.0, dropout=dropout).double())
        return model

    def test_acts_in_training_only_and_follows_the_seed(self, make_stack, shake):
        x = torch.randn(6, 12, dtype=torch.float64)
        model, plain = self.make(make_stack, shake), self.make(make_stack, shake, 0.0)
        model.eval()
        assert (model(x) - plain(x)).abs().max() < EXACT
        model.train()
        torch.manual_seed(7)
        first = model(x)
        assert (first - plain(x)).abs().max() > 1e-3
        torch.manual_seed(7)
        assert torch.equal(model(x), first)
        assert not torch.equal(model(x), first)

    def test_keeps_the_expected_change(self, make_stack, shake):
        x = torch.randn(4, 12, dtype=torch.float64)
        model, plain = self.make(make_stack, shake, 0.3), self.make(make_stack, shake, 0.0)
        torch.manual_seed(0)
        mean = torch.stack([model.first(x) for _ in range(3000)]).mean(0)
        change = plain.first(x) - make_stack().first(x)
        # The mean of 3,000 draws misses by about 1 / sqrt(3,000) of the change's own size.
        assert (mean - plain.first(x)).abs().max() < 0.15 * change.abs().max()

    def test_checkpointing_recomputes_with_the_same_mask(self, make_llama, shake, ids):
        grads = []
        for checkpointing in (False, True):
            model = make_llama().train()
            generators = shake(
                inject_generators(model, rank=4, target_modules=FIVE, dropout=0.3), std=0.05
            )
            if checkpointing:
                enable_checkpointing(model)
            torch.manual_seed(11)
            model(ids, labels=ids, use_cache=False).loss.backward()
            grads.append([p.grad for p in generators.parameters()])
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)  # float32, another order of sums


def test_autocast_computes_in_its_type(make_llama, shake, ids):
    model = make_llama()
    generators = shake(inject_generators(model, rank=4, target_modules=FIVE), std=0.05)
    full = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(ids).logits
        half.float().square().mean().backward()
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()  # bfloat16 keeps 8 bits
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in generators.parameters()
    )


def test_contradictions_are_told(make_llama):
    model = make_llama()
    for settings, message in [
        ({"dropout": 0.1, "view": "activation"}, "activation view never touches"),
        ({"dropout": 1.0}, "below 1"),
        ({"rank": 0, "alpha": 1.0}, "at least 1"),
        ({"alpha": float("inf")}, "finite"),
        ({"adapter_name": "a.b"}, "letters, digits"),
        ({"groups": {"update": ["q_proj"]}}, "is an attribute of the module"),
        ({"groups": {"settings": ["q_proj"]}}, "is an attribute of the module"),
        ({"groups": {"groups": ["q_proj"]}}, "is an attribute of the module"),
    ]:
        with pytest.raises(UserError, match=message):
            inject_generators(model, **{"target_modules": ["q_proj"], "rank": 4, **settings})


class OddLinear(torch.nn.Linear):
    """Stands for a quantised layer: a linear whose weight is no floating-point tensor."""

    def __init__(self, source: torch.nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, bias=source.bias is not None)
        self.real = source
        self.weight = torch.nn.Parameter(
            torch.zeros(self.weight.shape, dtype=torch.int8), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.real(x)


def test_activation_view_needs_no_weight(make_stack, shake):
    x = torch.randn(4, 12, dtype=torch.float64)
    expected_model = make_stack()
    shake(inject_generators(expected_model, rank=3, view="activation").double())
    model = make_stack()
    for name in ("first", "second", "third"):
        setattr(model, name, OddLinear(getattr(model, name)))
    shake(inject_generators(model, rank=3, target_modules=r"first|second|third").double())
    assert (model(x) - expected_model(x)).abs().max() < EXACT
    with pytest.raises(UserError, match="quantized"):
        fold_generators(model)


def test_a_tied_target_is_refused(make_llama):
    tied = make_llama(tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"tied to 'model\.embed_tokens'"):
        inject_generators(tied, rank=2, target_modules=["lm_head"])
    assert get_generators(tied) is None
    assert inject_generators(make_llama(), rank=2, target_modules=["lm_head"])


def test_alpha_stays_as_it_was_typed(make_llama):
    model = make_llama()
    generators = inject_generators(model, rank=49, alpha=1.0, target_modules=["q_proj"])
    assert generators["default"].settings.alpha == 1.0
    assert generators["default"].settings.scale == 1 / 49


@pytest.mark.parametrize(("side", "rank", "d"), [("input", 4, 32), ("output", 8, 24)])
def test_the_rule_divides_by_rank_and_mean_width(make_llama, side, rank, d):
    model = make_llama()
    names = ["q_proj", "v_proj"]
    generators = inject_generators(
        model, rank=rank, scale_rule="rank_width", target_modules=names, side=side
    )
    settings = generators["default"].settings
    assert settings.alpha == 32768 / d
    assert settings.scale == 32768 / (rank * d)


def test_the_rule_refuses_a_set_alpha(make_llama):
    with pytest.raises(UserError, match="computes the scale that"):
        inject_generators(make_llama(), alpha=8, scale_rule="rank_width")
    with pytest.raises(UserError, match="no scale rule 'width'"):
        inject_generators(make_llama(), scale_rule="width")


@pytest.mark.parametrize("name", ["eval", "train", "keys", "a.b"])
def test_names_that_a_module_cannot_have_are_refused(make_llama, name):
    with pytest.raises(UserError, match="adapter name"):
        inject_generators(make_llama(), rank=2, adapter_name=name)
