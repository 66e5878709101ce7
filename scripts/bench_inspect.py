"""Time `wegeft inspect` on one layer of a large shape with random weights, module by module."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli import inject_generators, inspect, save_adapter
from wegeft_cli.models.device_memory import measure_peak_memory_gib

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time wegeft inspect on one layer.")
    parser.add_argument("--hidden", type=int, default=4096, help="Llama-3 8B: 4096")
    parser.add_argument("--intermediate", type=int, default=14336, help="Llama-3 8B: 14336")
    parser.add_argument("--rank", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=arguments.intermediate,
            num_hidden_layers=1,
            num_attention_heads=arguments.hidden // 128,
            num_key_value_heads=max(1, arguments.hidden // 512),
            vocab_size=1000,
            dtype=torch.bfloat16,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder)
        owner = inject_generators(model, rank=arguments.rank, target_modules=TARGETS)
        with torch.no_grad():
            for parameter in owner.parameters():
                parameter.normal_(std=0.01)
        save_adapter(model, Path(folder, "adapter"), base_model_name_or_path=folder)
        built = measure_peak_memory_gib(torch.device("cpu"))
        del model, owner
        start = time.perf_counter()
        found = inspect(Path(folder, "adapter"), num_directions=0)
        seconds = time.perf_counter() - start
    print(f"{len(found['modules'])} modules in {seconds:.1f} s ({torch.get_num_threads()} threads)")
    for row in found["modules"]:
        print(f"  {row['kind']} {row['shape']}: size {row['relative_change']:.4f}")
    peak = measure_peak_memory_gib(torch.device("cpu"))
    print(f"peak memory {peak:.2f} GiB; building the model took {built:.2f}")


if __name__ == "__main__":
    main()
