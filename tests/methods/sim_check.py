"""Run in a process of its own: generators on the simulated device; prints one JSON line a case."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import torch
from simulated_device import SimTensor, install, move, simulated
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli import inject_generators

CASES = {
    "activation": {"view": "activation"},
    "weight": {"view": "weight"},
    "dropout": {"view": "weight", "dropout": 0.1},
    "output activation": {"view": "activation", "side": "output"},
    "output weight": {"view": "weight", "side": "output"},
    "plain": {},
}


def run(settings: dict) -> dict:
    """Compare loss, gradients and tokens of a small Llama on the CPU and on the device."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=64, initializer_range=0.2,
        )
    )  # fmt: skip
    inject_generators(
        model, rank=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **settings
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.2)
    ids = torch.arange(16).view(2, 8)
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    norm = sum(p.grad.square().sum() for p in trained).sqrt().item()
    with simulated():
        try:
            torch.ones(2, device="sim") + torch.ones(2)
        except RuntimeError:
            refused = True
        move(model)
        ids = ids.to("sim")
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(type(p.grad) is SimTensor for p in trained)
        found = sum(p.grad.square().sum() for p in trained).sqrt().item()
        torch.optim.AdamW(trained, lr=1e-3).step()
        model.eval()
        asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        tokens = model.generate(input_ids=ids, **asked)
    return {
        "refused": refused, "loss": [expected.item(), loss.item()], "norm": [norm, found],
        "num_tokens": len(tokens[0]),
        "devices": sorted({str(x.device) for x in (loss, tokens, *trained)}),
    }  # fmt: skip


if __name__ == "__main__":
    install()
    for name, settings in CASES.items():
        try:
            print(json.dumps({"name": name, **run(settings)}), flush=True)
        except Exception as error:
            import traceback

            traceback.print_exc()
            print(json.dumps({"name": name, "error": repr(error)[:400]}), flush=True)
