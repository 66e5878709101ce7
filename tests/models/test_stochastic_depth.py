"""Stochastic depth finds the branches of ViT in the layouts of every supported transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTModel

from wegeft_cli.errors import UserError
from wegeft_cli.models.stochastic_depth import add_drop_path

WIDTH = 4


class Output(nn.Module):
    """The second half of an MLP, which adds the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.dropout(self.dense(x)) + residual


class OldBlock(nn.Module):
    """A block of ViT in transformers 5.2 to 5.8."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.intermediate = nn.Linear(WIDTH, WIDTH)
        self.output = Output()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return self.output(self.intermediate(x), x)


class NewBlock(nn.Module):
    """A block of ViT in transformers 5.17 and newer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


def build(block: type[nn.Module]) -> nn.Module:
    """A model of two blocks; only the last one's branches are dropped."""
    torch.manual_seed(0)
    return nn.Sequential(nn.ModuleList([block(), block()]))


@pytest.mark.parametrize("block", [OldBlock, NewBlock])
def test_a_dropped_branch_leaves_the_residual(block):
    model = build(block)
    add_drop_path(model, 1 - 1e-7)
    first, last = model[0]
    x = torch.randn(8, 3, WIDTH)
    model.train()
    assert not torch.equal(first(x), x)
    torch.testing.assert_close(last(x), x)
    model.eval()
    assert not torch.allclose(last(x), x)


def test_kept_branches_are_scaled_alike_in_both_layouts():
    old, new = build(OldBlock), build(NewBlock)
    parameters = dict(zip(old.parameters(), new.parameters(), strict=True))
    with torch.no_grad():
        for theirs, ours in parameters.items():
            ours.copy_(theirs)
    x = torch.randn(8, 3, WIDTH)
    outputs = []
    for model in (old, new):
        add_drop_path(model, 0.5)
        torch.manual_seed(1)
        outputs.append(model[0][1](x))
    torch.testing.assert_close(*outputs)


def test_the_installed_vit_has_these_branches():
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**sizes, intermediate_size=8, image_size=8, patch_size=4))
    add_drop_path(model, 0.5)
    pixels = torch.randn(16, 3, 8, 8)
    model.train()
    assert not torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)
    model.eval()
    assert torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_models_without_one_stack_of_such_blocks_are_refused():
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    )
    with pytest.raises(UserError, match="ResNetForImageClassification has none") as caught:
        add_drop_path(resnet, 0.1)
    assert caught.value.key == "model.drop_path_rate"
    with pytest.raises(UserError, match="Sequential has 2"):
        add_drop_path(nn.Sequential(build(NewBlock), build(NewBlock)), 0.1)
