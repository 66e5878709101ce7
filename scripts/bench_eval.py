"""Rows per second of an evaluation beside one prompt at a time, on a real small model.

Three ways write the same greedy answers to the quickstart's held-out problems, asked in the model's
chat template, so that answers have unequal lengths: transformers' `generate` with one prompt at a
time, the same with static batches in the order of the file, and `generate_texts`, by which
`wegeft eval` asks. They take turns; the best of the repeats counts. The tokens must be the same, or
the script fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.evaluation.text.loading import TEST_SETS, load_questions
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import Prompts, generate_texts
from wegeft_cli.models.loading import load_model, load_tokenizer

DEFAULT_MODEL = Path(".cache/quickstart/model")
DEFAULT_DATA = Path(".cache/quickstart/data")
Way = Callable[[], list[list[int]]]


def generate_plainly(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], num_tokens: int
) -> list[list[int]]:
    """Write a batch by transformers alone, every row until the last one has ended."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    new = output[:, width:].tolist()
    eos = tokenizer.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in new]


def measure(ways: dict[str, Way], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Let the ways take turns.

    Args:
        ways: Name -> what to run.
        repeats: Turns of each.

    Returns:
        Best seconds of each way, and what it wrote.
    """
    seconds = dict.fromkeys(ways, float("inf"))
    written: dict[str, Any] = {}
    for turn in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            written[name] = way()
            spent = time.perf_counter() - start
            seconds[name] = min(seconds[name], spent)
            print(f"turn {turn + 1}: {name}: {spent:.1f} s", file=sys.stderr, flush=True)
    return seconds, written


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Rows per second of evaluation.")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(str(options.model)).eval()
    tokenizer = load_tokenizer(str(options.model))
    task = TEST_SETS["quickstart"]
    data = load_questions(task, data_dir=options.data_dir, limit=options.rows)
    # The task's own protocol asks without the chat template and for eight tokens.
    instructions = [row.instruction for row in data.rows]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in instructions
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    size, length = options.batch_size, options.max_new_tokens

    def one_by_one() -> list[list[int]]:
        return [generate_plainly(model, tokenizer, [row], length)[0] for row in ids]

    def static() -> list[list[int]]:
        batches = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [
            row for batch in batches for row in generate_plainly(model, tokenizer, batch, length)
        ]

    def wegeft() -> list[list[int]]:
        return generate_texts(
            model,
            tokenizer,
            Prompts(prompts, add_special_tokens=False),
            Decoding(length),
            batch_size=size,
        ).new_ids

    ways = {"one by one": one_by_one, "static batches": static, "wegeft eval": wegeft}
    seconds, written = measure(ways, options.repeats)
    lengths = [len(row) for row in written["one by one"]]
    same = {name: rows == written["one by one"] for name, rows in written.items()}
    result = {
        "rows": len(ids),
        "batch_size": size,
        "max_new_tokens": length,
        "threads": options.threads,
        "answer_tokens": {
            "least": min(lengths),
            "mean": sum(lengths) / len(ids),
            "most": max(lengths),
        },
        "rows_per_second": {name: len(ids) / spent for name, spent in seconds.items()},
        "times_one_by_one": {name: seconds["one by one"] / s for name, s in seconds.items()},
        "same_tokens": same,
    }
    if options.json:
        print(json.dumps(result))
    else:
        tokens = result["answer_tokens"]
        print(
            f"{len(ids)} rows, answers of {min(lengths)} to {max(lengths)} tokens "
            f"(mean {tokens['mean']:.0f}), batches of {size}, {options.threads} threads"
        )
        for name, spent in seconds.items():
            ratio = seconds["one by one"] / spent
            words = "same tokens" if same[name] else "OTHER TOKENS"
            print(f"{name:16} {len(ids) / spent:6.2f} rows/s  {ratio:5.2f} times  {words}")
    if not same["wegeft eval"]:
        sys.exit("bench_eval: the tokens are not those of one prompt at a time")


if __name__ == "__main__":
    main()
