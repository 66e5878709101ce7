"""Noise on the embeddings: as large as told, while training, and from the global random state."""

import math

import pytest
import torch

from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.training.neftune import add_neftune

NUM_ROWS, NUM_TOKENS, WIDTH = 16, 50, 32


@pytest.fixture
def embed(make_model):
    model = make_model()
    ids = torch.arange(NUM_ROWS * NUM_TOKENS).remainder(64).view(NUM_ROWS, NUM_TOKENS)
    return model, lambda: model.get_input_embeddings()(ids).detach()


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_the_noise_is_uniform_up_to_its_bound(embed, alpha):
    model, get = embed
    plain = get()
    add_neftune(model.train(), alpha)
    noise = get() - plain
    bound = alpha / math.sqrt(NUM_TOKENS * WIDTH)
    assert noise.shape == (NUM_ROWS, NUM_TOKENS, WIDTH)
    assert noise.abs().max() <= bound * (1 + 1e-5)  # float32 around embeddings of size 1
    # 25,600 draws: the mean of |u| is bound / 2 to 0.2 %, its spread over the root of the number.
    assert noise.abs().mean().item() == pytest.approx(bound / 2, rel=0.01)
    assert noise.mean().abs() < 0.02 * bound


def test_no_noise_outside_of_training_or_once_it_is_taken_off(embed):
    model, get = embed
    plain = get()
    handle = add_neftune(model, 5.0)
    model.eval()
    assert torch.equal(get(), plain)
    model.train()
    assert not torch.equal(get(), plain)
    handle.remove()
    assert torch.equal(get(), plain)


def test_the_global_random_state_says_which_noise(embed):
    model, get = embed
    add_neftune(model.train(), 5.0)
    draws = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        draws.append(get())
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_training_takes_the_noise_and_validation_does_not(
    make_model, make_source, run, factors_of, rows
):
    ends, told = [], []
    for alpha in (None, 5.0):
        model = make_model()
        if alpha:
            add_neftune(model, alpha)
        source = make_source(num_steps=2, validation=rows[4:])
        torch.manual_seed(1)
        result = run(model, source, learning_rate=0.0)
        told.append(result.validation[2]["eval_loss"])
        run(model, make_source(num_steps=2))
        ends.append(factors_of(model))
    assert told[0] == told[1]
    assert not torch.equal(ends[0], ends[1])


def test_noise_stands_checkpointing(make_model, make_source, run, factors_of):
    ends = []
    for checkpointing in (False, True):
        model = make_model()
        add_neftune(model, 5.0)
        if checkpointing:
            enable_checkpointing(model)
        torch.manual_seed(1)
        run(model, make_source(num_steps=2))
        ends.append(factors_of(model))
    # The same noise; sums in another order.
    assert (ends[1] - ends[0]).abs().max() < 1e-5 * ends[0].abs().max()
