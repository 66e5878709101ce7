"""Train, merge, evaluate and generate with an installed `wegeft`, on a tiny generated model.

The check of an installation: it needs no network, no GPU and no file of this repository. The Python
that runs it must be the one of the environment, and its working folder is a temporary one, so that
the package beside this file is never imported.

    /path/to/environment/bin/python scripts/main_road.py

It exits with 1 and the failing command's output if a step fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PACKAGES = ("wegeft-cli", "torch", "transformers", "datasets", "accelerate", "typer", "peft")
PROMPT = "question 3"
NUM_TOKENS = "8"
RECIPE = """\
seed: 1
output_dir: run
model:
  name_or_path: base
adapter:
  r: 4
  target_modules: [q_proj, v_proj, down_proj]
data:
  train:
    - path: rows.jsonl
  max_length: 32
train:
  per_device_train_batch_size: 4
  num_train_epochs: 4
  learning_rate: 0.02
  save_steps: 0
"""


def write_base(folder: Path) -> None:
    """Write a Llama of two layers with random weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Write a recipe, its 16 rows, and a test set in the layout of LLM-Adapters."""
    rows = [{"prompt": f"question {n}", "completion": f" {n % 2}"} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    test = folder / "data" / "boolq" / "test.json"
    test.parent.mkdir(parents=True)
    answers = [str(n % 2 == 0).lower() for n in range(3)]
    test.write_text(
        json.dumps(
            [
                {
                    "instruction": f"Is {n} even? Answer format: true/false",
                    "input": "",
                    "output": f"the correct answer is {answer}",
                    "answer": answer,
                }
                for n, answer in enumerate(answers)
            ]
        )
    )


class InstalledCommands:
    """Run commands of the installed `wegeft` in one folder.

    Args:
        folder: The working folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "NO_COLOR": "1",
        }
        self.environment.setdefault("OMP_NUM_THREADS", "1")

    def run(self, *arguments: str) -> Any:
        """Run a command with `--json` and return its object; exit if it fails."""
        script = Path(sys.executable).parent / "wegeft"
        # An environment that `uv run --with` lays over another one has no scripts.
        start_words = [str(script)] if script.exists() else [sys.executable, "-m", "wegeft_cli"]
        command = [*start_words, *arguments, "--json"]
        start = time.monotonic()
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        shown = f"wegeft {' '.join(arguments)}"
        if done.returncode:
            sys.exit(f"{shown}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        print(f"{shown}: {time.monotonic() - start:.1f} s", flush=True)
        return json.loads(done.stdout)


def check(condition: bool, message: str) -> None:
    """Exit with a message unless a condition holds."""
    if not condition:
        sys.exit(f"main road: {message}")


def walk(commands: InstalledCommands) -> None:
    """Run every command and compare what they return."""
    trained = commands.run("train", "recipe.yaml")
    losses = [
        json.loads(line)["loss"]
        for line in (commands.folder / "run" / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    check(losses[-1] < losses[0], f"the loss rose from {losses[0]} to {losses[-1]}: {trained}")
    commands.run("merge", "run")
    ask = ("--prompt", PROMPT, "--max-new-tokens", NUM_TOKENS)
    answers = [commands.run("generate", target, *ask) for target in ("run", "run/merged")]
    adapter, merged = (answer["results"][0]["output"] for answer in answers)
    check(adapter == merged, f"the adapter answers {adapter!r}, the merged model {merged!r}")
    scores = commands.run("eval", "run", "--task", "boolq", "--data-dir", "data", "--compare-base")
    check(bool(scores), "the evaluation returned nothing")
    if importlib.util.find_spec("peft") is not None:
        exported = commands.run("export", "run", "--format", "lora", "--output", "lora")
        check((commands.folder / "lora" / "adapter_model.safetensors").is_file(), f"{exported}")


def main() -> None:
    """Write the model and the data, run the commands, print the versions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep the files here. Default: a temporary one")
    folder = parser.parse_args().folder
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="main-road-") as scratch:
        place = Path(scratch) if folder is None else folder.resolve()
        place.mkdir(parents=True, exist_ok=True)
        write_base(place / "base")
        write_data(place)
        walk(InstalledCommands(place))
    print("main road: every command succeeded")


if __name__ == "__main__":
    main()
