"""Named rows of fused projections are what each family's own code takes for q, k and v."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.checkpoints import build_config
from transformers import AutoModel

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.targets import find_targets

# Test -> family, fused linear, the module beside it that reads the attended values, configuration.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "c_attn", "c_proj", {}),
    "openai-gpt": ("openai-gpt", "c_attn", "c_proj", {}),
    "mpt": ("mpt", "Wqkv", "out_proj", {}),
    "modernbert": ("modernbert", "Wqkv", "Wo", {}),
    "phi3": ("phi3", "qkv_proj", "o_proj", {}),
    "gpt_neox": ("gpt_neox", "query_key_value", "dense", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", "query_key_value", "dense", {}),
    "bloom": ("bloom", "query_key_value", "dense", {}),
    "persimmon": ("persimmon", "query_key_value", "dense", {}),
    "minimax": ("minimax", "qkv_proj", "norm", {}),
    "deberta": ("deberta", "in_proj", "", {}),
    "codegen": ("codegen", "qkv_proj", "out_proj", {}),
    "gpt_bigcode": ("gpt_bigcode", "c_attn", "c_proj", {"multi_query": True}),
    "gpt_bigcode by head": ("gpt_bigcode", "c_attn", "c_proj", {"multi_query": False}),
    "falcon": ("falcon", "query_key_value", "dense", {"multi_query": True}),
    "falcon by head": (
        "falcon",
        "query_key_value",
        "dense",
        {"multi_query": False, "num_kv_heads": 4},
    ),
    "falcon grouped": (
        "falcon",
        "query_key_value",
        "dense",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2},
    ),
}
LENGTH, AT = 6, 3


def build(family: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = build_config(family)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModel.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("test", FAMILIES)
def test_rows_are_those_of_the_model(test: str) -> None:
    """A query counts at its own position alone, an entry of v in its own features alone."""
    family, fused, reader, changes = FAMILIES[test]
    model = build(family, changes)
    name = next(n for n, _ in model.named_modules() if n.rpartition(".")[2] == fused)
    parent = name.rpartition(".")[0]
    out = f"{parent}.{reader}" if reader else f"{parent.rpartition('.')[0]}.output.dense"
    found = [find_targets(model, [f"{name}:{part}"])[0].rows for part in "qkv"]
    parts = [[row for span in rows for row in range(*span)] for rows in found]
    changed: list[int] = []
    attended: list[torch.Tensor] = []

    def change(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output.view(LENGTH, -1)[AT, changed] += torch.linspace(-1, 2, len(changed) + 1)[1:] ** 2
        return output

    model.get_submodule(name).register_forward_hook(change)
    model.get_submodule(out).register_forward_pre_hook(
        lambda module, args: attended.append(args[0].detach().reshape(LENGTH, -1))
    )

    def measure(*rows: int) -> torch.Tensor:
        """Return where the attended values move with some rows at one position, `[6, d]`."""
        changed[:] = rows
        attended.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 9, 11, 6, 8, 7]]))
        return attended[0].double()

    still = measure()
    q, k, v = parts
    assert sorted(q + k + v) == list(range(len(q + k + v)))
    others = [n for n in range(LENGTH) if n != AT]
    at_q, at_k = ((measure(*rows) - still).abs() for rows in (q, k))
    assert at_q[AT].max() > 1e-4
    assert at_q[others].max() < 1e-6
    assert at_k[others].max() > 1e-5
    width = still.shape[1]
    groups = width // len(v)
    for place in (0, len(v) // 2, len(v) - 1):
        moved = (measure(v[place]) - still).abs().amax(0) > 1e-6
        assert moved.sum() == groups
        assert groups > 1 or moved[place]
        assert ((measure(k[place % len(k)]) - still).abs().amax(0) > 1e-6).sum() > groups


@pytest.mark.parametrize("family", ["phi3", "glm", "glm4"])
def test_gate_and_up_are_those_of_the_model(family: str) -> None:
    model = build(family, {})
    name = next(n for n, _ in model.named_modules() if n.endswith(".gate_up_proj"))
    (up,) = find_targets(model, [f"{name}:up"])
    ((start, stop),) = up.rows
    inputs: list[torch.Tensor] = []
    down = model.get_submodule(name.replace("gate_up", "down"))
    down.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        for factor in (1.0, 2.0):
            model.get_submodule(name).weight[start:stop] *= factor
            model(input_ids=torch.tensor([[5, 9, 11]]))
    layers = len(inputs) // 2
    torch.testing.assert_close(inputs[layers], 2 * inputs[0])


@pytest.mark.parametrize(
    ("family", "entry"),
    [
        ("mamba", "in_proj:q"),
        ("lfm2", "in_proj:q"),
        ("bamba", "in_proj:v"),
        ("falcon_mamba", "in_proj:k"),
    ],
)
def test_layers_without_such_parts_are_refused(family: str, entry: str) -> None:
    with torch.device("meta"):
        config = build_config(family)
        if family == "lfm2":
            config.layer_types[0] = "conv"
        model = AutoModel.from_config(config)
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        find_targets(model, [entry])
    fault = getattr(caught.value, "exceptions", [caught.value])[0]
    assert "has no part" in fault.message
    assert "by number: in_proj:0-" in fault.hint
