"""Time a training step of WeGeFT and of LoRA over one frozen model, interleaved in one process.

Every variant shares the frozen weights, takes the same embeddings and carries the gradient back to
them, so a variant's time over the frozen model's is the price of its adapter alone. The frozen
model is measured twice: how far its two ratios lie apart is the noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli import inject_generators

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SCALE = 2.0
"""alpha / r of every adapter: the published setting."""
LORA_RANK = 16
"""Rank of the published LoRA baseline."""
VOCAB_SIZE = 1024
"""Small, so that the head does not drown what is compared."""

MakeModel = Callable[[nn.Module], nn.Module]
View = Literal["activation", "weight"]


class WeightViewLinear(nn.Module):
    """The weight view written plainly, from a float32 copy of `W` each step.

    Computes `W x + s (W phi)(psi x)` and leaves the backward pass to autograd.
    """

    def __init__(self, base: nn.Linear, phi: nn.Parameter, psi: nn.Parameter) -> None:
        super().__init__()
        self.base = base
        self.phi = phi
        self.psi = psi

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` `[..., d_in]`; returns `[..., d_out]`."""
        weight_phi = self.base.weight.to(torch.float32, copy=True) @ self.phi
        edit = F.linear(F.linear(x.float(), self.psi), weight_phi)
        return self.base(x) + (SCALE * edit).to(x.dtype)


def inject_plain_weight_view(model: nn.Module, rank: int) -> nn.Module:
    """Wrap the targets in `WeightViewLinear`, one pair of factors for each kind of layer.

    Args:
        model: The frozen model; changed in place.
        rank: Rank of the pairs.

    Returns:
        The model.
    """
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if name not in TARGETS or not isinstance(linear, nn.Linear):
                continue
            if name not in pairs:
                d_in, device = linear.in_features, linear.weight.device
                psi = torch.randn(rank, d_in, device=device) / d_in**0.5
                pairs[name] = (
                    nn.Parameter(torch.zeros(d_in, rank, device=device)),
                    nn.Parameter(psi),
                )
            setattr(parent, name, WeightViewLinear(linear, *pairs[name]))
    return model


def inject_wegeft(
    model: nn.Module, rank: int, view: View | Literal["auto"], dropout: float = 0.0
) -> nn.Module:
    """Inject this package's generators and return the model."""
    inject_generators(
        model,
        rank=rank,
        alpha=SCALE * rank,
        target_modules=TARGETS,
        view=view,
        dropout=dropout,
    )
    return model


def inject_lora(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with PEFT's LoRA."""
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=TARGETS)
    return get_peft_model(model, config)


def make_variants(rank: int) -> dict[str, MakeModel]:
    """Return what is compared: label -> how the frozen model becomes the variant."""
    return {
        "frozen": lambda model: model,
        "frozen, again": lambda model: model,
        f"LoRA r {LORA_RANK} (PEFT)": lambda model: inject_lora(model, LORA_RANK),
        f"LoRA r {rank} (PEFT)": lambda model: inject_lora(model, rank),
        f"WeGeFT r {rank}, activation view": lambda model: inject_wegeft(model, rank, "activation"),
        f"WeGeFT r {rank}, weight view": lambda model: inject_wegeft(model, rank, "weight"),
        f"WeGeFT r {rank}, weight dropout 0.1": lambda model: inject_wegeft(
            model, rank, "auto", dropout=0.1
        ),
        f"WeGeFT r {rank}, weight view written plainly": lambda model: inject_plain_weight_view(
            model, rank
        ),
    }


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant's steps."""

    label: str
    trainable_parameters: int
    seconds: list[float]

    @property
    def least(self) -> float:
        """Fastest step."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Median step."""
        return statistics.median(self.seconds)


def build_base(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Build the frozen random Llama that all variants share."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.d,
        intermediate_size=arguments.intermediate or arguments.d * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.d // 64),
        num_key_value_heads=max(1, arguments.d // 256),
        vocab_size=VOCAB_SIZE,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(arguments.device, getattr(torch, arguments.dtype))
    return model.requires_grad_(False).train()


def time_variants(
    base: LlamaForCausalLM, variants: dict[str, MakeModel], *, num_tokens: int, repeats: int
) -> list[Timing]:
    """Time one forward and backward pass of each variant per round, after one unmeasured round.

    Args:
        base: The frozen model.
        variants: Label -> how the frozen model becomes the variant.
        num_tokens: Length of the one row, in tokens.
        repeats: Measured rounds, at least 1.

    Returns:
        One timing per variant, in the order given.
    """
    device = base.device
    shared = {id(weight): weight for weight in (*base.parameters(), *base.buffers())}
    models = {label: make(copy.deepcopy(base, dict(shared))) for label, make in variants.items()}
    ids = torch.randint(VOCAB_SIZE, (1, num_tokens), device=device)
    embeddings = base.get_input_embeddings()(ids)
    seconds: dict[str, list[float]] = {label: [] for label in models}
    labels = list(models)
    for turn in range(repeats + 1):
        # Another variant opens each round, so that none always runs in the wake of the same one.
        start_at = turn % len(labels)
        for label in labels[start_at:] + labels[:start_at]:
            model = models[label]
            model.zero_grad(set_to_none=True)
            _synchronize(device)
            start = time.perf_counter()
            inputs = embeddings.detach().requires_grad_()
            model(inputs_embeds=inputs, labels=ids).loss.backward()
            _synchronize(device)
            if turn:
                seconds[label].append(time.perf_counter() - start)
    return [
        Timing(label, _count_trainable(models[label]), values) for label, values in seconds.items()
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count_trainable(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def describe(arguments: argparse.Namespace, timings: list[Timing]) -> dict[str, object]:
    """Return settings and results as one JSON object."""
    device = torch.device(arguments.device)
    frozen = timings[0]
    on_gpu = device.type == "cuda"
    return {
        "settings": vars(arguments),
        "device_name": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "variants": [
            {
                "label": timing.label,
                "trainable_parameters": timing.trainable_parameters,
                "least_seconds": timing.least,
                "median_seconds": timing.median,
                "least_ratio": timing.least / frozen.least,
                "median_ratio": timing.median / frozen.median,
                "seconds": timing.seconds,
            }
            for timing in timings
        ],
    }


def to_markdown(arguments: argparse.Namespace, timings: list[Timing]) -> str:
    """Return the table of ratios over the frozen model."""
    frozen = timings[0]
    lines = [
        f"Llama shape, d {arguments.d}, {arguments.layers} layers, {arguments.tokens} tokens,"
        f" {arguments.dtype} on {arguments.device}, torch {torch.__version__},"
        f" {torch.get_num_threads()} threads, {arguments.repeats} interleaved rounds",
        "",
        "| variant | trainable | least s | median s | least / frozen | median / frozen |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {timing.label} | {timing.trainable_parameters:,} | {timing.least:.3f}"
        f" | {timing.median:.3f} | {timing.least / frozen.least:.2f}"
        f" | {timing.median / frozen.median:.2f} |"
        for timing in timings
    ]
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time training steps of adapters, interleaved.")
    parser.add_argument("--d", type=int, default=2048, help="model width")
    parser.add_argument("--intermediate", type=int, help="MLP width; default 2.75 d (5632 of 2048)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers")
    parser.add_argument("--tokens", type=int, default=512, help="tokens in the one row")
    parser.add_argument("--rank", type=int, default=64, help="rank of WeGeFT and the second LoRA")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's own")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    timings = time_variants(
        build_base(arguments),
        make_variants(arguments.rank),
        num_tokens=arguments.tokens,
        repeats=arguments.repeats,
    )
    if arguments.json:
        print(json.dumps(describe(arguments, timings)))
    else:
        print(to_markdown(arguments, timings))


if __name__ == "__main__":
    main()
