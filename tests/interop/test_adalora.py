"""AdaLoRA: ranks are taken away as PEFT does it, once a step; its loss is PEFT's; both resume."""

import types

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.methods.peft.loading import load_peft
from wegeft_cli.methods.peft.models import build_config, inject_peft, save_peft
from wegeft_cli.methods.peft.rank_budget import OrthogonalLoss, RankBudget, regularise

# The same float32 sums by another road.
FLOAT32 = 1e-5
TARGETS = ["q_proj", "v_proj", "down_proj"]
NUM_LAYERS = 6  # two decoder layers of three targets
STEPS = 12


@pytest.fixture
def make_model(llama_dir):
    """A function: AdaLoRA of rank 4, from 6, on a fresh Llama, with factors far from zero."""

    def make(**options):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(llama_dir)
        config = build_config("adalora", 4, None, TARGETS, options, "CAUSAL_LM")
        model = inject_peft(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        return model.train()

    return make


def walk(model, budget, steps, skipped=()):
    """Train on the same tokens; after each step, the ranks that are left."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.01)
    ids = torch.randint(4, 300, (2, 11), generator=torch.Generator().manual_seed(2))
    counts = []
    for step in steps:
        model(input_ids=ids, labels=ids).loss.backward()
        if step not in skipped:
            optimizer.step()
            budget.after_step(step)
        optimizer.zero_grad()
        counts.append(budget.count_ranks())
    return counts


def test_the_budget_falls_from_the_first_rank_to_the_last(make_model):
    model = make_model(tinit=3, tfinal=4)
    counts = walk(model, RankBudget(model, STEPS), range(1, STEPS + 1))
    full, left = 6 * NUM_LAYERS, 4 * NUM_LAYERS
    assert counts[:3] == [full] * 3
    # PEFT's cubic schedule between the two phases of one rank.
    between = [int((full - left) * (1 - k / 5) ** 3 + left) for k in range(1, 5)]
    assert counts[3:7] == between
    assert counts[7:] == [left] * 5


def test_it_is_what_peft_does_by_itself(make_model):
    ours, theirs = (make_model(tinit=1, tfinal=3, deltaT=2) for _ in range(2))
    theirs.peft_config["default"].total_step = STEPS
    stock = types.SimpleNamespace(
        after_step=theirs.base_model.update_and_allocate, count_ranks=lambda: 0
    )
    walk(ours, RankBudget(ours, STEPS), range(1, STEPS + 1))
    walk(theirs, stock, range(1, STEPS + 1))
    pairs = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
    for (name, mine), other in pairs:
        assert torch.equal(mine, other), name
    patterns = [m.peft_config["default"].rank_pattern for m in (ours, theirs)]
    assert patterns[0] == patterns[1] is not None


@pytest.mark.parametrize("skipped", [[8], [8, 9], range(1, 9)])
def test_a_skipped_step_does_not_leave_ranks_behind(make_model, skipped):
    """Step 8 is where PEFT chooses for good; where it is skipped, the next step does it."""
    model = make_model(tfinal=4)
    budget = RankBudget(model, STEPS)
    counts = walk(model, budget, range(1, STEPS + 1), skipped)
    assert counts[-1] == 4 * NUM_LAYERS
    assert budget.is_final


@pytest.mark.parametrize("stop", [1, 5, 8, 10])
def test_a_restored_budget_goes_on_to_the_same_bits(make_model, stop):
    whole, first, second = (make_model(tinit=2, tfinal=4, deltaT=2) for _ in range(3))
    walk(whole, RankBudget(whole, STEPS), range(1, STEPS + 1))
    budget = RankBudget(first, STEPS)
    walk(first, budget, range(1, stop + 1))
    second.load_state_dict(first.state_dict())
    again = RankBudget(second, STEPS)
    again.load({k: t.clone() for k, t in budget.tensors().items()}, budget.values())
    walk(second, again, range(stop + 1, STEPS + 1))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert again.values() == RankBudget(whole, STEPS).values()


def test_the_regularisation_is_what_peft_adds(make_model):
    model = make_model(orth_reg_weight=0.3)
    ids = torch.randint(4, 300, (2, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = model.base_model.model(input_ids=ids, labels=ids).loss
        added = model(input_ids=ids, labels=ids).loss - plain
    assert added > 0.1  # else this test says nothing
    torch.testing.assert_close(regularise(model), added, rtol=FLOAT32, atol=FLOAT32)


def test_a_step_has_the_regularisation_once_however_it_is_cut(make_model):
    model = make_model()
    ids = torch.randint(4, 300, (5, 11), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :9] = labels[3, :4] = -100

    def sum_losses(model, batch):
        logits = model(input_ids=batch.ids).logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum")

    def gradients(cuts):
        loss = OrthogonalLoss(sum_losses)
        model.zero_grad()
        for part in cuts:
            chosen = labels[part]
            number = int((chosen[:, 1:] != -100).sum())
            batch = types.SimpleNamespace(ids=ids[part], labels=chosen, num_label_tokens=number)
            (loss(model, batch) / int((labels[:, 1:] != -100).sum())).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole = gradients([slice(0, 5)])
    parts = gradients([slice(0, 1), slice(1, 4), slice(4, 5)])
    assert len(whole) == 3 * NUM_LAYERS
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=FLOAT32, atol=FLOAT32)
    model.eval()
    batch = types.SimpleNamespace(ids=ids, labels=labels, num_label_tokens=7)
    assert torch.equal(OrthogonalLoss(sum_losses)(model, batch), sum_losses(model, batch))


def test_stock_peft_reads_what_is_saved(make_model, llama_dir, tmp_path):
    model = make_model(tfinal=2)
    walk(model, RankBudget(model, STEPS), range(1, STEPS + 1))
    save_peft(model, tmp_path, base_model_name_or_path=str(llama_dir))
    base = AutoModelForCausalLM.from_pretrained(llama_dir)
    loaded = load_peft(base, Adapter.open(tmp_path))
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=FLOAT32, atol=FLOAT32)
    shapes = [p.shape for n, p in loaded.named_parameters() if "lora_E" in n]
    assert sum(shape[0] for shape in shapes) == 4 * NUM_LAYERS
