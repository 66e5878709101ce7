"""Train one epoch of GSM8K rows by this package and by TRL's SFTTrainer: tokens a second, memory.

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
OVERRIDES: dict[str, dict[str, dict[str, Any]]] = {
    PLAIN: {},
    GROUPED: {"data": {"shuffle": True}, "train": {"group_by_length": True}},
    PACKED: {"data": {"packing": "bfd"}},
    ALL_POSITIONS: {},
    LORA: {"adapter": {"type": "lora", "r": LORA_RANK}},
}
VARIANTS = (*OVERRIDES, TRL)
SAME_FIRST_BATCH = (PLAIN, ALL_POSITIONS, LORA, TRL)


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


def _find_device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_variant(arguments: argparse.Namespace, label: str) -> Measurement:
    """Train a variant in this process."""
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        train = train_by_trl if label == TRL else train_here
        return train(arguments, label, Path(folder))


def start_variant(arguments: argparse.Namespace, label: str) -> Measurement:
    """Train a variant in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        # -P: `scripts` is no place to import from.
        command = [sys.executable, "-P", __file__, "--variant", label, "--result", str(result)]
        for name in ("rows", "batch_size", "max_length", "threads", "model"):
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
    """Let the variants take turns, another one first in each round."""
    labels = [VARIANTS[number] for number in arguments.variants]
    found: dict[str, list[Measurement]] = {label: [] for label in labels}
    for turn in range(arguments.rounds):
        start = turn % len(labels)
        for label in labels[start:] + labels[:start]:
            found[label].append(start_variant(arguments, label))
            latest = found[label][-1]
            print(
                f"round {turn + 1}: {label}: {latest.seconds:.1f} s, {latest.peak_gib:.2f} GiB",
                file=sys.stderr,
                flush=True,
            )
    return found


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
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("variant", "result")},
        "platform": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in packages},
        "disagreements": find_disagreements(found),
        "variants": [
            {
                "label": label,
                "median_seconds": statistics.median(run.seconds for run in runs),
                "tokens_per_second": _rate(runs, "num_tokens"),
                "rows_per_second": _rate(runs, "num_rows"),
                "peak_gib": max(run.peak_gib for run in runs),
                "rounds": [asdict(run) for run in runs],
            }
            for label, runs in found.items()
        ],
    }


def _rate(runs: list[Measurement], name: str) -> float:
    return getattr(runs[0], name) / statistics.median(run.seconds for run in runs)


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
        "| variant | trainable | steps | s | tokens/s | rows/s | peak GiB | first, last loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant in variants:
        run = variant["rounds"][0]
        lines.append(
            f"| {variant['label']} | {run['trainable_parameters']:,} | {run['num_steps']}"
            f" | {variant['median_seconds']:.1f} | {variant['tokens_per_second']:,.0f}"
            f" | {variant['rows_per_second']:.2f} | {variant['peak_gib']:.2f}"
            f" | {run['first_loss']:.5f}, {run['last_loss']:.4f} |"
        )
    lines += ["", *(f"NOT THE SAME: {text}" for text in result["disagreements"])]
    return "\n".join(lines).rstrip()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time an epoch of training beside TRL.")
    parser.add_argument("data", nargs="?", help="GSM8K's train.jsonl (question, answer)")
    parser.add_argument("--rows", type=int, default=512, help="rows of the file, from its start")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row, or of a pack")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each variant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--model", default=MODEL, help="model folder")
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
    result = describe(arguments, measure(arguments))
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(to_markdown(result))
    if result["disagreements"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
