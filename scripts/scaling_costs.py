"""What data-parallel training of shared factors sends and computes, from 1 to 1,024 GPUs.

Arithmetic alone; no weights, no GPU. For a Llama of the given shape it prints, per optimizer step:
the bytes of the one all-reduce (WeGeFT's factors, and LoRA's beside them), what FSDP2 gathers, the
time of both by the ring's cost 2 (n - 1) / n bytes / bandwidth + 2 (n - 1) latency, and the share
of a step that is communication:

    python scripts/scaling_costs.py
    python scripts/scaling_costs.py --layers 80 --hidden 8192 --intermediate 28672 --kv-heads 8
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

GPUS = (1, 8, 16, 64, 256, 1024)
LENGTHS = (512, 2048, 8192, 32768)
RANKS = (8, 64, 256)
DEPTHS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Shape:
    """A Llama, and what trains it.

    Args:
        layers: Decoder layers.
        hidden: Width.
        intermediate: Width of the MLP.
        heads: Attention heads.
        kv_heads: Key and value heads.
        vocab: Tokens.
        rank: r of the factors.
        lora_rank: r of LoRA.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    rank: int
    lora_rank: int

    def linears(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of a layer's q, k, v, o, gate, up and down."""
        wide, narrow = self.hidden, self.hidden * self.kv_heads // self.heads
        attention = [(wide, wide), (wide, narrow), (wide, narrow), (wide, wide)]
        return [*attention, (wide, self.intermediate), (wide, self.intermediate),
                (self.intermediate, wide)]  # fmt: skip

    def base_parameters(self) -> int:
        """Weights of the linears and both embeddings."""
        layer = sum(d_in * d_out for d_in, d_out in self.linears())
        return self.layers * layer + 2 * self.vocab * self.hidden

    def factors(self) -> int:
        """WeGeFT's parameters, all seven linears, one pair for each kind: 2 r d_in each."""
        return sum(2 * self.rank * d_in for d_in, _ in self.linears())

    def lora(self) -> int:
        """LoRA's: r (d_in + d_out) for each linear of each layer."""
        return self.layers * sum(self.lora_rank * sum(pair) for pair in self.linears())

    def flops(self, tokens: int, length: int) -> float:
        """Multiply-adds times 2 of a forward pass and of the backward pass to the activations.

        Linears 2 + 2 per weight and token; attention's two products see half of the length on
        average and cost 3 times their forward pass; the factors 2 r d_in, three times.
        """
        dense = 4 * (self.base_parameters() - self.vocab * self.hidden) * tokens
        attention = 3 * 2 * 2 * self.layers * self.hidden * (length / 2) * tokens
        edits = 3 * 2 * self.layers * self.factors() * tokens
        return dense + attention + edits


def ring_seconds(num_bytes: float, num_gpus: int, bandwidth: float, latency: float) -> float:
    """Time of a ring all-reduce of `num_bytes` over `num_gpus`."""
    hops = 2 * (num_gpus - 1)
    return hops / num_gpus * num_bytes / bandwidth + hops * latency


def gather_seconds(num_bytes: float, num_gpus: int, bandwidth: float, latency: float) -> float:
    """Time of gathering `num_bytes` that `num_gpus` hold in equal parts."""
    return (num_gpus - 1) / num_gpus * num_bytes / bandwidth + (num_gpus - 1) * latency


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="rows of a pass on one GPU")
    parser.add_argument("--tflops", type=float, default=400, help="what a GPU reaches")
    parser.add_argument("--gbytes", type=float, default=25, help="GB/s between machines, per GPU")
    parser.add_argument("--microseconds", type=float, default=10, help="latency of a hop")
    args = parser.parse_args()
    shape = Shape(
        args.layers, args.hidden, args.intermediate, args.heads, args.kv_heads, args.vocab,
        args.rank, args.lora_rank,
    )  # fmt: skip
    bandwidth, latency, speed = args.gbytes * 1e9, args.microseconds * 1e-6, args.tflops * 1e12
    tokens = args.rows * args.length
    compute = shape.flops(tokens, args.length) / speed
    base_bytes = 2 * shape.base_parameters()
    print(
        f"base {shape.base_parameters() / 1e9:.2f} G weights, {base_bytes / 1e9:.1f} GB in bf16; "
        f"WeGeFT r {shape.rank}: {shape.factors():,} = {4 * shape.factors() / 1e6:.1f} MB a step; "
        f"LoRA r {shape.lora_rank}: {shape.lora():,} = {4 * shape.lora() / 1e6:.1f} MB"
    )
    print(
        f"a step of {args.rows} x {args.length} tokens per GPU computes {compute * 1e3:,.0f} ms "
        f"at {args.tflops:g} TFLOP/s; {args.gbytes:g} GB/s, {args.microseconds:g} us a hop"
    )
    print("\n| GPUs | replicated: factors ms | share | LoRA ms | fsdp2: gathers ms | share |")
    print("|---:|---:|---:|---:|---:|---:|")
    for num_gpus in GPUS:
        own = ring_seconds(4 * shape.factors(), num_gpus, bandwidth, latency)
        lora = ring_seconds(4 * shape.lora(), num_gpus, bandwidth, latency)
        # Once in the forward and once in the backward pass, layer by layer.
        layer = base_bytes / shape.layers
        gathers = 2 * shape.layers * gather_seconds(layer, num_gpus, bandwidth, latency)
        gathers = gathers if num_gpus > 1 else 0.0
        print(
            f"| {num_gpus:,} | {own * 1e3:.2f} | {own / (own + compute):.1%} | {lora * 1e3:.2f} "
            f"| {gathers * 1e3:,.0f} | {gathers / (gathers + compute):.0%} |"
        )
    print_growth(shape, args.length)


def print_growth(shape: Shape, length: int) -> None:
    """Print how factors and work grow with length, rank and depth."""
    print("\n| row length | TFLOP per 1,000 tokens | of it factors |")
    print("|---:|---:|---:|")
    for tokens in LENGTHS:
        total = shape.flops(1000, tokens)
        edits = 6 * shape.layers * shape.factors() * 1000
        print(f"| {tokens:,} | {total / 1e12:.1f} | {edits / total:.2%} |")
    print("\n| r | factors | MB a step | work added | LoRA of that rank, MB |")
    print("|---:|---:|---:|---:|---:|")
    for rank in RANKS:
        other = Shape(**{**vars(shape), "rank": rank, "lora_rank": rank})
        added = 6 * other.layers * other.factors() * 1000 / shape.flops(1000, length)
        print(
            f"| {rank} | {other.factors():,} | {4 * other.factors() / 1e6:.1f} | {added:.2%} "
            f"| {4 * other.lora() / 1e6:.1f} |"
        )
    print("\n| layers | factors, MB a step | LoRA, MB a step |")
    print("|---:|---:|---:|")
    for layers in DEPTHS:
        other = Shape(**{**vars(shape), "layers": layers})
        print(f"| {layers} | {4 * other.factors() / 1e6:.1f} | {4 * other.lora() / 1e6:.1f} |")


if __name__ == "__main__":
    main()
