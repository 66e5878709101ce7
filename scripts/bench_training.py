"""Train one epoch of GSM8K rows by this package and by TRL's SFTTrainer: tokens a second, memory.

The limit of both is measured beside them: the frozen model's forward and backward pass over the
same tokens without padding, its head at the learned positions, without adapter and optimizer.

Each variant runs in a process of its own, which gives its peak memory, and the variants take turns.
All of them train on the same token ids and labels, made once by this package's pipeline, with the
same thread count. Where two variants see the same first batch, its loss is that of the untouched
base model and must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LORA_RANK = 16
LEARNING_RATE = 3e-3
"""The quickstart recipe's; LoRA takes it too: a rate changes no time."""
WARMUP_RATIO = 0.1
MAX_GRAD_NORM = 1.0
MODEL = ".cache/quickstart/model"
OUTPUT = ".cache/bench_training.json"
FIRST_LOSS_TOLERANCE = 1e-4
"""Relative: float32 sums in another order, over some hundred tokens."""

PLAIN = "WeGeFT r 64"
GROUPED = "WeGeFT r 64, grouped by length"
PACKED = "WeGeFT r 64, packed"
ALL_POSITIONS = "WeGeFT r 64, head at all positions"
LORA = "LoRA r 16, this package's loop"
TRL = "LoRA r 16, TRL SFTTrainer"
LIMIT = "limit: frozen model, no padding"
OVERRIDES: dict[str, dict[str, dict[str, Any]]] = {
    PLAIN: {},
    GROUPED: {"data": {"shuffle": True}, "train": {"group_by_length": True}},
    PACKED: {"data": {"packing": "bfd"}},
    ALL_POSITIONS: {},
    LORA: {"adapter": {"type": "lora", "r": LORA_RANK}},
}
VARIANTS = (*OVERRIDES, TRL, LIMIT)
SAME_FIRST_BATCH = (PLAIN, ALL_POSITIONS, LORA, TRL, LIMIT)
PROFILED_STEP = 1
"""The second step: the first one pays for what is made once."""


@dataclass(frozen=True)
class Measurement:
    """One variant's epoch.

    Args:
        label: The variant.
        seconds: From the first step's batch to the last step's end.
        num_steps: Optimizer steps.
        num_rows: Rows trained on.
        num_tokens: Tokens in them, padding excluded.
        num_label_tokens: Those that carry loss.
        first_loss: Mean loss per labelled token of the first step.
        last_loss: The same of the last step.
        peak_gib: Highest memory of the process: resident, or allocated on a GPU.
        num_threads: torch's threads.
        trainable_parameters: What learned.
    """

    label: str
    seconds: float
    num_steps: int
    num_rows: int
    num_tokens: int
    num_label_tokens: int
    first_loss: float
    last_loss: float
    peak_gib: float
    num_threads: int
    trainable_parameters: int


def make_recipe(arguments: argparse.Namespace, label: str, folder: Path) -> dict[str, Any]:
    """Give the recipe of a variant: rows in the file's order, one epoch, nothing saved between.

    Args:
        arguments: The command line.
        label: The variant.
        folder: Where the run goes.

    Returns:
        The recipe's values.
    """
    recipe: dict[str, Any] = {
        "seed": 42,
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(Path(arguments.model).resolve()), "dtype": "float32"},
        "adapter": {"r": 64, "alpha": 32, "target_modules": TARGETS},
        "data": {
            "train": [
                {
                    "path": str(Path(arguments.data).resolve()),
                    "format": "instruction",
                    "columns": {"instruction": "question", "output": "answer"},
                    "limit": arguments.rows,
                }
            ],
            "template": "question_answer",
            "max_length": arguments.max_length,
            "shuffle": False,
        },
        "train": {
            "per_device_train_batch_size": arguments.batch_size,
            "num_train_epochs": 1,
            "learning_rate": LEARNING_RATE,
            "warmup_ratio": WARMUP_RATIO,
            "max_grad_norm": MAX_GRAD_NORM,
        },
    }
    for section, values in OVERRIDES.get(label, {}).items():
        recipe[section] = {**recipe[section], **values}
    return recipe


def write_recipe(recipe: Mapping[str, Any], folder: Path) -> Path:
    """Write a recipe into a folder; JSON is YAML."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def encode_rows(recipe_path: Path) -> Any:
    """Tokenise the recipe's rows as this package does; all variants train on these."""
    from wegeft_cli.data.text.dataset import build_datasets
    from wegeft_cli.models.loading import load_tokenizer
    from wegeft_cli.recipe.load import load_recipe

    recipe = load_recipe(recipe_path).recipe
    tokenizer = load_tokenizer(recipe.model.name_or_path)
    return build_datasets(recipe.data, tokenizer=tokenizer, recipe_dir=recipe_path.parent).train


def scale_pack_batch(lengths: Any, batch_size: int, max_length: int) -> int:
    """Count the packs that hold about as many tokens as a batch of rows.

    Args:
        lengths: Tokens of each row, an integer array.
        batch_size: Rows of a batch.
        max_length: Tokens that a pack holds at most.

    Returns:
        Packs of a batch, at least 1.
    """
    from wegeft_cli.data.batches.packing import pack_rows

    packs = pack_rows(lengths, max_length)
    return max(1, round(batch_size * len(packs) / len(lengths)))


def full_head_loss(model: Any, batch: Any) -> Any:
    """Sum the loss from the logits of all positions, as transformers does.

    Args:
        model: The model.
        batch: A batch of this package.

    Returns:
        The float32 sum over labelled tokens.
    """
    from torch.nn.functional import cross_entropy

    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits.float()
    shifted = logits[:, :-1].flatten(0, 1)
    targets = batch.labels[:, 1:].flatten()
    return cross_entropy(shifted, targets, ignore_index=-100, reduction="sum")


def train_here(arguments: argparse.Namespace, label: str, folder: Path) -> Measurement:
    """Train a variant by this package, as `wegeft train` does, in this process."""
    import torch

    from wegeft_cli.models.device_memory import measure_peak_memory_gib
    from wegeft_cli.runs import train as workflow

    recipe = make_recipe(arguments, label, folder)
    path = write_recipe(recipe, folder)
    rows = encode_rows(path)
    if label == PACKED:
        size = scale_pack_batch(rows.lengths, arguments.batch_size, arguments.max_length)
        recipe["train"]["per_device_train_batch_size"] = size
        write_recipe(recipe, folder)
    if label == ALL_POSITIONS:
        workflow.CausalLoss = lambda model: full_head_loss  # type: ignore[assignment,misc]
    result = workflow.train(path)
    text = (result.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    return Measurement(
        label=label,
        seconds=sum(line["step_seconds"] for line in lines),
        num_steps=result.num_steps,
        num_rows=len(rows),
        num_tokens=lines[-1]["num_tokens"],
        num_label_tokens=int(rows.label_counts.sum()),
        first_loss=lines[0]["loss"],
        last_loss=lines[-1]["loss"],
        peak_gib=measure_peak_memory_gib(_find_device()),
        num_threads=torch.get_num_threads(),
        trainable_parameters=result.trainable_parameters,
    )


def train_by_trl(arguments: argparse.Namespace, label: str, folder: Path) -> Measurement:
    """Train PEFT's LoRA by TRL's SFTTrainer on the same rows, in the same order."""
    import time

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from wegeft_cli.models.device_memory import measure_peak_memory_gib

    rows = encode_rows(write_recipe(make_recipe(arguments, label, folder), folder))
    pairs = [rows.row(i) for i in range(len(rows))]
    dataset = Dataset.from_list(
        [{"input_ids": ids.tolist(), "completion_mask": mask.tolist()} for ids, mask in pairs]
    )
    times: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times["begin"] = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times["end"] = time.perf_counter()

    device = _find_device()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, use_safetensors=True
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        train_dataset=dataset,
        peft_config=LoraConfig(
            r=LORA_RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=arguments.batch_size,
            num_train_epochs=1,
            max_length=arguments.max_length,
            train_sampling_strategy="sequential",
            completion_only_loss=True,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP_RATIO,
            max_grad_norm=MAX_GRAD_NORM,
            optim="adamw_torch",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=42,
        ),
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return Measurement(
        label=label,
        seconds=times["end"] - times["begin"],
        num_steps=trainer.state.global_step,
        num_rows=len(dataset),
        num_tokens=int(lines[-1]["num_tokens"]),
        num_label_tokens=int(sum(mask.sum() for _, mask in pairs)),
        first_loss=lines[0]["loss"],
        last_loss=lines[-1]["loss"],
        peak_gib=measure_peak_memory_gib(device),
        num_threads=torch.get_num_threads(),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def build_limit(arguments: argparse.Namespace) -> Any:
    """Load the frozen model so that its backward pass runs through all of its layers."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("rows_apart", attend_rows_apart)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, use_safetensors=True
    )
    model.requires_grad_(False)
    model.to(_find_device()).train()
    # transformers makes no mask for an attention function that it does not know.
    model.set_attn_implementation("rows_apart")
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


_row_lengths: list[int] = []
"""Tokens of each row of the limit's forward pass."""


def attend_rows_apart(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> tuple[Any, None]:
    """Compute causal attention of each row by itself, of rows laid end to end."""
    import torch

    parts = zip(*(tensor.split(_row_lengths, 2) for tensor in (query, key, value)), strict=True)
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            *part,
            is_causal=True,
            scale=options.get("scaling"),
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)
        for part in parts
    ]
    return torch.cat(outputs, 1), None


def step_limit(model: Any, loss_function: Any, rows: list[Any]) -> tuple[float, int]:
    """Run the frozen model forward and backward on rows; return the summed loss and the labels."""
    from wegeft_cli.data.batches.collate import collate_packs

    batch = collate_packs([rows], pad_token_id=0, flat=True).to(_find_device())
    _row_lengths[:] = [len(ids) for ids, _ in rows]
    summed = loss_function(model, batch)
    (summed / batch.num_label_tokens).backward()
    return float(summed.detach()), batch.num_label_tokens


def run_limit(arguments: argparse.Namespace, label: str, folder: Path) -> Measurement:
    """Measure the limit on the rows of each step of the plain variant."""
    import time

    import torch

    from wegeft_cli.models.device_memory import measure_peak_memory_gib
    from wegeft_cli.training.loss import CausalLoss

    rows = encode_rows(write_recipe(make_recipe(arguments, label, folder), folder))
    model = build_limit(arguments)
    loss_function = CausalLoss(model)
    # The trial of one token, which a run makes before its first step.
    _row_lengths[:] = [1]
    loss_function._has_plain_logits = loss_function._check_plain_logits(model, one_token())
    size, losses = arguments.batch_size, []
    begin = time.perf_counter()
    for start in range(0, len(rows), size):
        chosen = [rows.row(i) for i in range(start, min(start + size, len(rows)))]
        summed, num_labels = step_limit(model, loss_function, chosen)
        losses.append(summed / num_labels)
    seconds = time.perf_counter() - begin
    return Measurement(
        label=label,
        seconds=seconds,
        num_steps=len(losses),
        num_rows=len(rows),
        num_tokens=int(rows.lengths.sum()),
        num_label_tokens=int(rows.label_counts.sum()),
        first_loss=losses[0],
        last_loss=losses[-1],
        peak_gib=measure_peak_memory_gib(_find_device()),
        num_threads=torch.get_num_threads(),
        trainable_parameters=0,
    )


def one_token() -> Any:
    """Return a batch of one row of two tokens."""
    import numpy as np

    from wegeft_cli.data.batches.collate import collate_rows

    row = (np.array([1, 1]), np.array([False, True]))
    return collate_rows([row], pad_token_id=0).to(_find_device())


def profile(arguments: argparse.Namespace) -> dict[str, dict[str, tuple[int, float]]]:
    """Profile one step of the plain variant, and the same rows' step of the limit.

    Returns:
        Variant -> operation -> calls, and milliseconds without those of the operations it calls.
    """
    import torch

    from wegeft_cli.training.loss import CausalLoss
    from wegeft_cli.training.trainer import Trainer

    torch.set_num_threads(arguments.threads)
    profiler = torch.profiler.profile()
    forward_backward, update = Trainer.forward_backward, Trainer.update

    def profiled_pass(trainer: Any) -> Any:
        if trainer.step == PROFILED_STEP:
            profiler.start()
        return forward_backward(trainer)

    def profiled_update(trainer: Any, *summed: Any) -> None:
        update(trainer, *summed)
        if trainer.step == PROFILED_STEP + 1:
            profiler.stop()

    arguments.rows = (PROFILED_STEP + 1) * arguments.batch_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = encode_rows(write_recipe(make_recipe(arguments, PLAIN, folder), folder))
        Trainer.forward_backward = profiled_pass  # type: ignore[method-assign]
        Trainer.update = profiled_update  # type: ignore[method-assign]
        try:
            train_here(arguments, PLAIN, folder)
        finally:
            Trainer.forward_backward = forward_backward  # type: ignore[method-assign]
            Trainer.update = update  # type: ignore[method-assign]
    found = {PLAIN: _sum_times(profiler)}
    model = build_limit(arguments)
    loss_function = CausalLoss(model)
    _row_lengths[:] = [1]
    loss_function._has_plain_logits = loss_function._check_plain_logits(model, one_token())
    for number in range(PROFILED_STEP + 1):
        start = number * arguments.batch_size
        chosen = [rows.row(i) for i in range(start, start + arguments.batch_size)]
        if number == PROFILED_STEP:
            with torch.profiler.profile() as profiler:
                step_limit(model, loss_function, chosen)
        else:
            step_limit(model, loss_function, chosen)
    return {**found, LIMIT: _sum_times(profiler)}


def _sum_times(profiler: Any) -> dict[str, tuple[int, float]]:
    sums = {}
    for entry in profiler.key_averages():
        microseconds = max(entry.self_cpu_time_total, entry.self_device_time_total)
        sums[entry.key] = (entry.count, microseconds / 1e3)
    return sums


def profile_table(found: Mapping[str, Mapping[str, tuple[int, float]]], least: float) -> str:
    """Return a table of the operations, those that differ most first.

    Args:
        found: What `profile` returns.
        least: Share of the step below which a difference is not listed.
    """
    step, limit = found[PLAIN], found[LIMIT]
    totals = [sum(ms for _, ms in each.values()) for each in (step, limit)]
    lines = [
        "| operation | calls | limit's | ms | limit's ms | difference, % of the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| all | | | {totals[0]:.1f} | {totals[1]:.1f}"
        f" | {100 * (totals[0] / totals[1] - 1):+.1f} |",
    ]
    nothing = (0, 0.0)
    pairs = {key: (step.get(key, nothing), limit.get(key, nothing)) for key in {*step, *limit}}
    for key, (own, other) in sorted(pairs.items(), key=lambda item: item[1][1][1] - item[1][0][1]):
        share = (own[1] - other[1]) / totals[1]
        if abs(share) >= least:
            lines.append(
                f"| {key} | {own[0]} | {other[0]} | {own[1]:.1f} | {other[1]:.1f}"
                f" | {100 * share:+.1f} |"
            )
    return "\n".join(lines)


def _find_device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_variant(arguments: argparse.Namespace, label: str) -> Measurement:
    """Train a variant in this process."""
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        train = {TRL: train_by_trl, LIMIT: run_limit}.get(label, train_here)
        return train(arguments, label, Path(folder))


def start_variant(arguments: argparse.Namespace, label: str) -> Measurement:
    """Train a variant in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        # -P: `scripts` is no place to import from.
        command = [sys.executable, "-P", __file__, "--variant", label, "--result", str(result)]
        command += ["--model", arguments.layers_of or arguments.model]
        for name in ("rows", "batch_size", "max_length", "threads"):
            command += ["--" + name.replace("_", "-"), str(getattr(arguments, name))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        done = subprocess.run(
            [*command, str(arguments.data)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{label} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return Measurement(**json.loads(result.read_text(encoding="utf-8")))


def measure(arguments: argparse.Namespace) -> dict[str, list[Measurement]]:
    """Let the variants take turns, another one first in each round.

    Each measurement is appended to a file beside the output. A run that was interrupted continues
    from it if the settings are the same.
    """
    import time

    labels = [VARIANTS[number] for number in arguments.variants]
    order = [
        (turn, label)
        for turn in range(arguments.rounds)
        for label in (*labels[turn % len(labels) :], *labels[: turn % len(labels)])
    ]
    partial = Path(f"{arguments.output}.partial")
    done = read_partial(arguments, partial)[: len(order)]
    begin = time.perf_counter()
    for number, (turn, label) in enumerate(order[len(done) :], len(done) + 1):
        latest = start_variant(arguments, label)
        done.append(latest)
        write_partial(arguments, partial, done)
        minutes = (time.perf_counter() - begin) / 60
        print(
            f"{number} of {len(order)}, round {turn + 1}: {label}: {latest.seconds:.1f} s, "
            f"{latest.peak_gib:.2f} GiB ({minutes:.1f} minutes so far)",
            file=sys.stderr,
            flush=True,
        )
    found: dict[str, list[Measurement]] = {label: [] for label in labels}
    for each in done:
        found[each.label].append(each)
    return found


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    hidden = ("variant", "result", "profile", "layers_of")
    return {name: value for name, value in vars(arguments).items() if name not in hidden}


def read_partial(arguments: argparse.Namespace, path: Path) -> list[Measurement]:
    """Return the measurements of an interrupted run with the same settings."""
    if not path.is_file():
        return []
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["settings"] != _settings(arguments):
        return []
    return [Measurement(**values) for values in saved["measurements"]]


def write_partial(arguments: argparse.Namespace, path: Path, done: list[Measurement]) -> None:
    """Keep the measurements of a run so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"settings": _settings(arguments), "measurements": [asdict(each) for each in done]}
    path.write_text(json.dumps(saved), encoding="utf-8")


def cut_model(source: str, num_layers: int, folder: Path) -> str:
    """Write the model's first layers and its tokenizer into a folder, and return its path."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = num_layers
    model = AutoModelForCausalLM.from_pretrained(source, config=config, use_safetensors=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def find_disagreements(found: Mapping[str, list[Measurement]]) -> list[str]:
    """Say where variants did not train the same thing, in words; empty if they did."""
    faults = []
    for name in ("num_rows", "num_tokens", "num_label_tokens", "num_threads"):
        values = {label: getattr(runs[0], name) for label, runs in found.items()}
        if len(set(values.values())) > 1:
            faults.append(f"{name} differ: {values}")
    losses = {label: found[label][0].first_loss for label in SAME_FIRST_BATCH if label in found}
    wanted = next(iter(losses.values()), 0.0)
    if not all(abs(loss - wanted) <= FIRST_LOSS_TOLERANCE * wanted for loss in losses.values()):
        faults.append(f"the first step's losses differ: {losses}")
    return faults


def describe(arguments: argparse.Namespace, found: Mapping[str, list[Measurement]]) -> dict:
    """Return settings, versions, checks and results as one JSON object."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "accelerate", "peft", *(("trl",) if TRL in found else ()))
    return {
        "settings": _settings(arguments),
        "platform": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in packages},
        "disagreements": find_disagreements(found),
        "variants": [
            {
                "label": label,
                "median_seconds": statistics.median(run.seconds for run in runs),
                "tokens_per_second": _rate(runs, "num_tokens"),
                "rows_per_second": _rate(runs, "num_rows"),
                "of_limit": _ratio(found.get(LIMIT), runs, "seconds"),
                "of_trl": _ratio(runs, found.get(TRL), "seconds"),
                "peak_gib": max(run.peak_gib for run in runs),
                "peak_of_trl": _ratio(found.get(TRL), runs, "peak_gib"),
                "rounds": [asdict(run) for run in runs],
            }
            for label, runs in found.items()
        ],
    }


def _rate(runs: list[Measurement], name: str) -> float:
    return getattr(runs[0], name) / statistics.median(run.seconds for run in runs)


def _ratio(
    below: list[Measurement] | None, above: list[Measurement] | None, name: str
) -> float | None:
    """Return the ratio of two medians; None where one was not measured."""
    if not (below and above):
        return None
    upper, lower = (
        statistics.median(getattr(run, name) for run in runs) for runs in (above, below)
    )
    return upper / lower


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the table of a result."""
    settings, variants = result["settings"], result["variants"]
    first = variants[0]["rounds"][0]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"{first['num_rows']} rows, {first['num_tokens']:,} tokens"
        f" ({first['num_label_tokens']:,} learned), one epoch, batch {settings['batch_size']},"
        f" at most {settings['max_length']} tokens, float32, {first['num_threads']} threads on"
        f" {result['platform']}; {versions}; median of {settings['rounds']} interleaved rounds",
        "",
        "Time is a multiple of the limit's; rows per second and memory are multiples of TRL's.",
        "",
        "| variant | trainable | steps | s | of the limit | tokens/s | rows/s | of TRL | peak GiB"
        " | of TRL | first, last loss |",
        "| --- |" + " ---: |" * 10,
    ]
    for variant in variants:
        run = variant["rounds"][0]
        lines.append(
            f"| {variant['label']} | {run['trainable_parameters']:,} | {run['num_steps']}"
            f" | {variant['median_seconds']:.1f} | {_show(variant['of_limit'])}"
            f" | {variant['tokens_per_second']:,.0f} | {variant['rows_per_second']:.2f}"
            f" | {_show(variant['of_trl'])} | {variant['peak_gib']:.2f}"
            f" | {_show(variant['peak_of_trl'])}"
            f" | {run['first_loss']:.5f}, {run['last_loss']:.4f} |"
        )
    lines += ["", *(f"NOT THE SAME: {text}" for text in result["disagreements"])]
    return "\n".join(lines).rstrip()


def _show(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time an epoch of training beside TRL.")
    parser.add_argument("data", nargs="?", help="GSM8K's train.jsonl (question, answer)")
    parser.add_argument("--rows", type=int, default=512, help="rows of the file, from its start")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row, or of a pack")
    parser.add_argument("--rounds", type=int, default=2, help="epochs of each variant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--model", default=MODEL, help="model folder")
    parser.add_argument("--layers", type=int, help="take only the first layers of the model")
    parser.add_argument(
        "--profile", action="store_true", help="one step's operations beside the limit's"
    )
    parser.add_argument("--output", default=OUTPUT, help="file for the JSON result")
    names = ", ".join(f"{number} {label}" for number, label in enumerate(VARIANTS))
    parser.add_argument(
        "--variants",
        type=lambda text: [int(number) for number in text.split(",")],
        default=list(range(len(VARIANTS))),
        help=f"which, by number: {names}",
    )
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.set_defaults(layers_of=None)  # the folder of the first layers
    arguments = parser.parse_args(argv)
    if arguments.data is None or not Path(arguments.data).is_file():
        parser.error(
            "needs GSM8K's training rows, a JSONL file with question and answer in each line: "
            "grade_school_math/data/train.jsonl of github.com/openai/grade-school-math; "
            f"there is no file {arguments.data!r}"
        )
    if not Path(arguments.model, "config.json").is_file():
        parser.error(f"no model in {arguments.model!r}: python scripts/quickstart_model.py")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and keep the result."""
    arguments = parse_arguments(argv)
    if arguments.variant:
        measured = run_variant(arguments, arguments.variant)
        Path(arguments.result).write_text(json.dumps(asdict(measured)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.layers is not None:
            arguments.layers_of = cut_model(arguments.model, arguments.layers, Path(folder))
        if arguments.profile:
            arguments.model = arguments.layers_of or arguments.model
            print(profile_table(profile(arguments), least=0.005))
            return
        found = measure(arguments)
    result = describe(arguments, found)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    Path(f"{arguments.output}.partial").unlink(missing_ok=True)
    print(to_markdown(result))
    if result["disagreements"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
