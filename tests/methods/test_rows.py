"""Each row of a batch with an adapter of its own: the bits that the adapter alone gives.

Rows of 8 tokens: with other lengths the base itself rounds a row of a batch on the CPU otherwise
than the row alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.owner import Generators, get_generators, use_generators
from wegeft_cli.methods.wegeft.inject import inject_generators

NAMES = ("first", None, "second", "first", "third")
SETTINGS: dict[str, dict[str, Any]] = {
    "first": {"rank": 4, "target_modules": ["q_proj", "down_proj"]},
    "second": {"rank": 2, "target_modules": ["q_proj", "v_proj"], "side": "output"},
    "third": {"rank": 3, "target_modules": ["q_proj", "up_proj"], "view": "weight"},
}


def add_adapters(model: torch.nn.Module, settings: dict[str, dict[str, Any]]) -> Generators:
    """Give a model adapters far from their start."""
    random = torch.Generator().manual_seed(0)
    for name, one in settings.items():
        owner = inject_generators(model, adapter_name=name, **one)
        with torch.no_grad():
            for parameter in owner[name].parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return owner


def answer_alone(model: Any, name: str | None, ids: torch.Tensor) -> torch.Tensor:
    owner = get_generators(model)
    assert owner is not None
    if name is None:
        with owner.turned_off():
            return model(ids).logits
    use_generators(model, name)
    return model(ids).logits


@pytest.fixture
def llama(make_llama: Callable[..., Any], one_thread: None) -> Any:
    model = make_llama(initializer_range=0.3).double().eval()
    add_adapters(model, SETTINGS)
    return model


@torch.no_grad()
def test_a_row_gets_the_bits_of_its_adapter_alone(llama: Any) -> None:
    ids = torch.randint(3, 60, (len(NAMES), 8), generator=torch.Generator().manual_seed(1))
    owner = get_generators(llama)
    assert owner is not None
    with owner.use_rows(NAMES):
        together = llama(ids).logits
    alone = [answer_alone(llama, name, ids[[row]])[0] for row, name in enumerate(NAMES)]
    for row, expected in enumerate(alone):
        assert torch.equal(together[row], expected), NAMES[row]
    assert not torch.allclose(alone[0], answer_alone(llama, None, ids[[0]])[0])
    assert owner.row_names is None


@torch.no_grad()
def test_rows_of_a_fused_projection(make_gpt2: Callable[..., Any], one_thread: None) -> None:
    model = make_gpt2().double().eval()
    owner = add_adapters(
        model,
        {
            "first": {"rank": 4, "target_modules": ["c_attn:q", "c_attn:v"]},
            "second": {"rank": 2, "target_modules": ["c_attn"]},
        },
    )
    ids = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(1))
    names = ("second", "first", None)
    with owner.use_rows(names):
        together = model(ids).logits
    for row, name in enumerate(names):
        assert torch.equal(together[row], answer_alone(model, name, ids[[row]])[0])


def test_generation_with_beams_keeps_the_rows(llama: Any) -> None:
    ids = torch.randint(3, 60, (3, 5), generator=torch.Generator().manual_seed(2))
    names = ("second", None, "first")
    owner = get_generators(llama)
    assert owner is not None
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generate(rows: torch.Tensor, beams: int) -> torch.Tensor:
        mask = torch.ones_like(rows)
        tokens: torch.Tensor = llama.generate(
            rows, attention_mask=mask, num_beams=beams, **settings
        )
        return tokens

    for beams in (1, 3):
        with owner.use_rows(names):
            together = generate(ids, beams)
        for row, name in enumerate(names):
            if name is None:
                with owner.turned_off():
                    alone = generate(ids[[row]], beams)
            else:
                use_generators(llama, name)
                alone = generate(ids[[row]], beams)
            assert torch.equal(together[row], alone[0])


def test_gradients_reach_each_adapter_from_its_rows(llama: Any) -> None:
    owner = get_generators(llama)
    assert owner is not None
    owner.requires_grad_(True)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    with owner.use_rows(["first", "second"]):
        llama(ids).logits.square().sum().backward()
    assert owner["first"]["q_proj"].phi.grad is not None
    assert owner["second"]["v_proj"].psi.grad is not None
    assert owner["third"]["q_proj"].phi.grad is None


def test_what_rows_cannot_have_is_refused(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    owner = add_adapters(model, {"first": {"rank": 2, "target_modules": ["q_proj"]}})
    with pytest.raises(KeyError, match="no adapter 'other'"), owner.use_rows(["other"]):
        pass
    with owner.use_rows(["first"] * 3), pytest.raises(UserError, match="got 2 rows where"):
        model(torch.ones(2, 4, dtype=torch.long))
    add_adapters(
        model,
        {"whole": {"rank": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
    )
    with pytest.raises(UserError, match="trains whole modules"), owner.use_rows(["whole"]):
        pass
    assert owner.row_names is None
