"""What `bench_gpu.py` measures in processes of its own: steps, the quickstart, settings.

    python scripts/gpu_parts.py PART --output FILE [--small] [--work DIR]

Each result is written as soon as it is known, so that a part that is stopped keeps what it had.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_step_time as steps
import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

DROPOUT = 0.1
PUBLISHED = {"d": 4096, "intermediate": 11008, "layers": 2, "dtype": "bfloat16", "device": "cuda"}
"""Llama-2 7B's shape, with two layers."""
TINY = {"d": 64, "intermediate": 96, "layers": 1, "dtype": "float32", "device": "cpu"}
QUICKSTART = Path(".cache/quickstart")
TOLERANCE = {
    "bf16 mixed precision": 0.05,
    "fp16 with the scaler": 0.05,
    "4-bit nf4": 0.2,
    "torch.compile": 0.02,
    "activation offload": 0.005,
    "gradient checkpointing": 0.005,
    "Liger kernels": 0.02,
}
"""Setting -> largest relative difference of its final loss from the plain run's."""
SETTINGS: dict[str, list[str]] = {
    "plain": [],
    "bf16 mixed precision": ["train.mixed_precision=bf16"],
    "fp16 with the scaler": ["train.mixed_precision=fp16"],
    "4-bit nf4": ["model.load_in_4bit=true"],
    "activation offload": ["train.activation_offload=true"],
    "gradient checkpointing": ["train.gradient_checkpointing=true"],
    "Liger kernels": ["train.use_liger_kernel=true"],
    "weight dropout 0.1": ["adapter.dropout=0.1"],
    "torch.compile": ["train.compile=true"],
}
ONLY_ON_GPU = {"Liger kernels": "needs a CUDA device", "torch.compile": "minutes on a CPU"}
Report = dict[str, Any]


class Results:
    """A list of results in a file, whole after each one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Report] = []

    def add(self, label: str, make: Callable[[], Report]) -> Report:
        """Add what `make` returns, or its error."""
        start = time.perf_counter()
        try:
            row = {"label": label, **make()}
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            row = {"label": label, "error": f"{type(error).__name__}: {error}"[:500]}
        self.rows.append({**row, "part_seconds": time.perf_counter() - start})
        self.write()
        return self.rows[-1]

    def write(self) -> None:
        """Write the results so far."""
        self.path.write_text(json.dumps(self.rows), encoding="utf-8")


def _inject_dropped(model: nn.Module, rank: int) -> nn.Module:
    """Return the plain weight view with dropout on the entries of the weight."""
    steps.inject_plain_weight_view(model, rank)
    for module in model.modules():
        if isinstance(module, steps.WeightViewLinear):
            module.forward = _forward_dropped.__get__(module)  # type: ignore[method-assign]
    return model


def _forward_dropped(self: steps.WeightViewLinear, x: Tensor) -> Tensor:
    weight = F.dropout(self.base.weight.to(torch.float32, copy=True), DROPOUT)
    edit = F.linear(F.linear(x.float(), self.psi), weight @ self.phi)
    return self.base(x) + (steps.SCALE * edit).to(x.dtype)


def make_variants(rank: int) -> dict[str, steps.MakeModel]:
    """Return what is compared: label -> how the frozen model becomes the variant."""
    targets = steps.TARGETS
    alpha = steps.SCALE * steps.LORA_RANK
    dora = LoraConfig(r=steps.LORA_RANK, lora_alpha=alpha, target_modules=targets, use_dora=True)
    vera = VeraConfig(r=256, target_modules=targets)
    return {
        **steps.make_variants(rank),
        f"WeGeFT r {rank}, weight view written plainly, dropout {DROPOUT}": lambda model: (
            _inject_dropped(model, rank)
        ),
        f"DoRA r {steps.LORA_RANK} (PEFT)": lambda model: get_peft_model(model, dora),
        "VeRA r 256 (PEFT)": lambda model: get_peft_model(model, vera),
    }


def measure_steps(results: Results, small: bool, _work: Path) -> None:
    """Time forward and backward passes of each variant, with its peak memory, by lengths."""
    shape = TINY if small else PUBLISHED
    rank = 4 if small else 64
    arguments = steps.parse_arguments([])
    vars(arguments).update(shape)
    torch.manual_seed(0)
    base = steps.build_base(arguments)
    shared = {id(weight): weight for weight in (*base.parameters(), *base.buffers())}
    models: dict[str, nn.Module] = {}
    for label, make in make_variants(rank).items():
        try:
            models[label] = make(copy.deepcopy(base, dict(shared))).to(base.device)
        except Exception as error:
            traceback.print_exc()
            results.rows.append({"label": label, "error": str(error)[:300]})
    for num_tokens in (16,) if small else (512, 2048, 8192):
        times: dict[str, list[float]] = {label: [] for label in models}
        peaks: dict[str, float | None] = {}
        errors: dict[str, str] = {}
        for turn in range(2 if small else 9):
            for label, model in models.items():
                if label in errors:
                    continue
                try:
                    seconds, peaks[label] = time_step(base, model, num_tokens)
                except Exception as error:
                    errors[label] = str(error)[:300]
                    continue
                if turn > (0 if small else 1):
                    times[label].append(seconds)
        frozen = statistics.median(times["frozen"])
        for label, values in times.items():
            row: Report = {"label": label, "tokens": num_tokens}
            if label in errors:
                row["error"] = errors[label]
            else:
                row |= {
                    "median_seconds": statistics.median(values),
                    "least_seconds": min(values),
                    "ratio": statistics.median(values) / frozen,
                    "peak_gib": peaks[label],
                }
            results.rows.append(row)
        results.write()


def time_step(base: Any, model: nn.Module, num_tokens: int) -> tuple[float, float | None]:
    """Return the seconds of one pass, by the device's own clock, and its peak memory in GiB."""
    on_gpu = base.device.type == "cuda"
    ids = torch.randint(steps.VOCAB_SIZE, (1, num_tokens), device=base.device)
    inputs = base.get_input_embeddings()(ids).detach().requires_grad_()
    model.zero_grad(set_to_none=True)
    if not on_gpu:
        start = time.perf_counter()
        model(inputs_embeds=inputs, labels=ids).loss.backward()
        return time.perf_counter() - start, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    model(inputs_embeds=inputs, labels=ids).loss.backward()
    after.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    model.zero_grad(set_to_none=True)
    return before.elapsed_time(after) / 1000, peak


def make_model(folder: Path, small: bool) -> None:
    """Write a Llama of SmolLM2-135M's shape with random weights, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    wide = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    narrow = {"hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(
        **(narrow if small else wide),
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152 if not small else len(names),
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.04,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)


def prepare(work: Path, small: bool) -> tuple[Path, Path, bool]:
    """Return the folder of the model, the file of the rows, and whether the model is the real one.

    Where SmolLM2 is not in the cache, a random model of its shape is made, whose rows are longer.
    """
    import quickstart_data

    rows, _ = quickstart_data.write_data(work / "data")
    real = QUICKSTART / "model"
    if real.is_dir() and not small:
        return real, rows, True
    model = work / ("tiny-model" if small else "model")
    if not model.is_dir():
        make_model(model, small)
    return model, rows, False


def measure_quickstart(results: Results, small: bool, work: Path) -> None:
    """Train the quickstart's recipe and report rows per second."""
    model, rows, is_real = prepare(work, small)
    for precision in ("float32", "bfloat16"):
        results.add(precision, lambda dtype=precision: _train_quickstart(
            work / f"quickstart-{dtype}", model, rows, is_real, small, [f"model.dtype={dtype}"]
        ))  # fmt: skip


def _train_quickstart(
    folder: Path, model: Path, rows: Path, is_real: bool, small: bool, overrides: list[str]
) -> Report:
    from wegeft_cli import train

    values = yaml.safe_load(Path("recipes/quickstart.yaml").read_text(encoding="utf-8"))
    values |= {"output_dir": str(folder), "model": {"name_or_path": str(model.resolve())}}
    values["data"]["train"] = [{"path": str(rows.resolve()), "format": "instruction"}]
    del values["eval"]
    values["train"] |= {"logging_steps": 1}
    if small:
        values["train"] |= {"max_steps": 3, "per_device_train_batch_size": 2}
        values["adapter"]["r"] = 4
    if not is_real:
        values["data"]["max_length"] = 512  # a token is a byte
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with _fresh_memory():
        result = train(path, overrides, overwrite=True)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").open()]
    metrics = [line for line in lines if "step_seconds" in line]
    middle = statistics.median(line["step_seconds"] for line in metrics[1:] or metrics)
    return {
        "model": "SmolLM2-135M" if is_real else "random weights, a token a byte",
        "steps": result.num_steps,
        "step_seconds": middle,
        "rows_per_second": values["train"]["per_device_train_batch_size"] / middle,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in metrics),
        "first_loss": metrics[0]["loss"],
        "loss": result.final_loss,
        "peak_gib": result.peak_memory_gib,
    }


def measure_settings(results: Results, small: bool, work: Path) -> None:
    """Train some steps with each setting and compare the loss with the plain run's."""
    model, rows, is_real = prepare(work, small)
    plain: float | None = None
    common = [] if small else ["train.max_steps=30"]
    for label, overrides in SETTINGS.items():
        if label in ONLY_ON_GPU and not torch.cuda.is_available():
            results.add(label, lambda at=label: {"skipped": ONLY_ON_GPU[at]})
            continue
        folder = work / "settings" / label.replace(" ", "-")
        folder.parent.mkdir(exist_ok=True)
        row = results.add(label, lambda at=folder, asked=overrides: _train_quickstart(
            at, model, rows, is_real, small, [*common, *asked]
        ))  # fmt: skip
        if "loss" not in row:
            continue
        plain = row["loss"] if label == "plain" else plain
        if plain and label in TOLERANCE:
            difference = abs(row["loss"] - plain) / plain
            row |= {"difference": difference, "allowed": TOLERANCE[label]}
            row["is_close"] = math.isfinite(difference) and difference <= TOLERANCE[label]
    results.write()


@contextmanager
def _fresh_memory() -> Iterator[None]:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield


PARTS = {"steps": measure_steps, "quickstart": measure_quickstart, "settings": measure_settings}


def main(argv: list[str] | None = None) -> None:
    """Measure one part; exit with 1 where a result is an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args(argv)
    asked.work.mkdir(parents=True, exist_ok=True)
    results = Results(asked.output)
    PARTS[asked.part](results, asked.small, asked.work)
    raise SystemExit(int(any("error" in row for row in results.rows)))


if __name__ == "__main__":
    main()
