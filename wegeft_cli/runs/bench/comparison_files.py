"""Write results in the form of PEFT's own comparison of methods.

The form is that of `method_comparison/MetaMathQA/results/*.json` in PEFT's repository, written by
`log_results` in `method_comparison/MetaMathQA/utils.py` and read by
`method_comparison/processing.py` (as of November 2026). Names and units are PEFT's: bytes and
seconds. Peak memory is the one measure of memory here, and it fills the three keys of memory.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.adapter_files import CONFIG_NAME
from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.artifacts.run_results import RunOutcome
from wegeft_cli.methods.registry import find_method
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.redaction import mask_secrets
from wegeft_cli.runs.bench.measures import SCORE
from wegeft_cli.storage.atomic import write_text_atomic
from wegeft_cli.storage.json_files import is_number, read_object, to_finite

FOLDER = "method_comparison"
_STATUS = {"finished": "success", "failed": "failed"}
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
_GIB = 2**30


def write_comparison(
    folder: Path, outcome: RunOutcome, recipe: Recipe, figures: Mapping[str, float]
) -> Path:
    """Write the file of one run and return its path, `<method>--<run>.json`."""
    path = folder / FOLDER / f"{outcome.name.replace('/', '--')}.json"
    path.parent.mkdir(exist_ok=True)
    values = to_comparison(outcome, recipe, figures)
    text = json.dumps(to_finite(values), indent=2, allow_nan=False) + "\n"
    write_text_atomic(path, mask_secrets(text))
    return path


def to_comparison(
    outcome: RunOutcome, recipe: Recipe, figures: Mapping[str, float]
) -> dict[str, Any]:
    """Return a run's results with PEFT's keys: run_info, train_info, meta_info."""
    directory = RunDirectory(outcome.run_dir)
    record = directory.record()
    memory = round(figures.get("peak_memory_gib", 0.0) * _GIB)
    train_seconds = outcome.figures.get("seconds", 0.0)
    config = read_object(directory.adapter_dir / CONFIG_NAME)
    return {
        "run_info": {
            "created_at": record.get("started_at"),
            "total_time": train_seconds,
            "experiment_name": outcome.name,
            "peft_branch": "wegeft-cli",
            "train_config": _train_config(recipe),
            "peft_config": None
            if find_method(recipe.adapter.type).trains_everything(recipe.adapter)
            else config,
            "error_msg": outcome.error or "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": train_seconds,
            "file_size": round(figures.get("adapter_bytes", 0)),
            "num_trainable_params": round(figures.get("trainable_parameters", 0)),
            "num_total_params": record.get("base_parameters"),
            "status": _STATUS.get(outcome.status, "canceled"),
            "metrics": _list_metrics(directory, outcome, recipe, figures),
        },
        "meta_info": {
            "model_info": {"sha": record.get("base_fingerprint"), "created_at": None},
            "dataset_info": {},
            "package_info": _package_info(record),
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "version": platform.version(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": record.get("device"),
            },
            "pytorch_info": None,
        },
    }


def _train_config(recipe: Recipe) -> dict[str, Any]:
    """Return the settings under PEFT's names; the whole recipe is under `recipe`."""
    train = recipe.train
    return {
        "model_id": recipe.model.name_or_path,
        "dtype": recipe.model.dtype,
        "max_seq_length": recipe.data.max_length,
        "batch_size": _rows_per_step(recipe),
        "batch_size_eval": recipe.eval.batch_size,
        "max_steps": train.max_steps,
        "eval_steps": train.eval_steps,
        "compile": train.compile,
        "use_gc": train.gradient_checkpointing,
        "query_template": recipe.data.template,
        "seed": recipe.seed,
        "grad_norm_clip": train.max_grad_norm,
        "optimizer_type": train.optim,
        "optimizer_kwargs": {"lr": train.learning_rate, "weight_decay": train.weight_decay},
        "lr_scheduler": train.lr_scheduler_type,
        "use_amp": train.mixed_precision != "none",
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": recipe.eval.max_new_tokens},
        "attn_implementation": recipe.model.attn_implementation,
        "recipe": asdict(recipe),
    }


def _rows_per_step(recipe: Recipe) -> int:
    train = recipe.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps


def _list_metrics(
    directory: RunDirectory,
    outcome: RunOutcome,
    recipe: Recipe,
    figures: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return each validation, and last the test's result, which PEFT's table shows."""
    lines = directory.metrics()
    steps = [line for line in lines if "loss" in line]
    validations = [
        {"step": line.get("step"), "valid loss": line["eval_loss"]}
        for line in lines
        if is_number(line.get("eval_loss"))
    ]
    tokens = [line["num_tokens"] for line in steps if is_number(line.get("num_tokens"))]
    last = {
        "step": outcome.num_steps,
        "test accuracy": figures.get(SCORE),
        "valid loss": figures.get("validation_loss"),
        "train loss": outcome.figures.get("final_loss"),
        "train samples": outcome.num_steps * _rows_per_step(recipe),
        "train total tokens": tokens[-1] if tokens else 0,
    }
    return [*validations, last]


def _package_info(record: Mapping[str, Any]) -> dict[str, str | None]:
    versions = record.get("versions")
    known = versions if isinstance(versions, dict) else {}
    info: dict[str, str | None] = {}
    for name in _PACKAGES:
        info[f"{name}-version"] = known.get(name)
        info[f"{name}-commit-hash"] = None
    info["wegeft-cli-version"] = known.get("wegeft-cli")
    return info
