"""The stages of the matrix: what a user does with a base, and the numbers that must agree."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from families.checkpoints import read_edge, write_checkpoint, write_rows
from families.outcomes import FAILED, OK, REFUSED, Collected, DifferenceError, Outcome, attempt
from wegeft_cli.analysis.inspect import inspect
from wegeft_cli.exporting.export import ExportOptions, export
from wegeft_cli.inference.generate import generate
from wegeft_cli.inference.loaded_model import ModelTarget
from wegeft_cli.merging.merge import merge
from wegeft_cli.models.heads import image_inputs
from wegeft_cli.planning.plan import plan
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.runs.train import train

STAGES = (
    "plan",
    "train",
    "published",
    "batch",
    "checkpointing",
    "merge",
    "plain",
    "export",
    "inspect",
)
PUBLISHED = {
    "causal_lm": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "sequence_classification": ["query", "value"],
    "image_classification": ["o_proj"],
}
AUTO = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}
QUESTIONS = ("one", "one two three four five six seven", "the sky is blue, the grass", "yes no")
NEW_TOKENS = 10
# Relative to the largest logit, or to the loss: float32 with sums of another order.
CLOSE = 1e-3
CLOSE_LOSS = 2e-4


class Family:
    """One architecture in a folder of its own, and what its stages hand on."""

    def __init__(self, task: str, name: str, folder: Path) -> None:
        """Keep the names."""
        self.task, self.name, self.folder = task, name, folder
        self.base = folder / "base"
        self.overrides: list[str] = []
        self.planned: int | None = None
        self.run_dir: Path | None = None
        self.merged: Path | None = None
        self.logits: list[Tensor] = []
        self.base_logits: list[Tensor] = []

    def write(self) -> None:
        """Write checkpoint, rows and recipe."""
        write_checkpoint(self.task, self.name, self.base)
        data: dict[str, Any] = write_rows(
            self.task, self.folder / "rows", read_edge(AutoConfig.from_pretrained(self.base))
        )
        if self.task == "image_classification":
            data["image_transform"] = "resize"
        else:
            data["max_length"] = 48
        recipe = {
            "seed": 7,
            "output_dir": str(self.folder / "runs" / "main"),
            "task": self.task,
            "model": {"name_or_path": str(self.base), "dtype": "float32"},
            "adapter": {"type": "wegeft", "r": 4},
            "data": data,
            "train": {
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "max_steps": 3,
                "learning_rate": 0.02,
                "lr_scheduler_type": "constant",
                "save_steps": 0,
            },
        }
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def train(self, name: str, *overrides: str, reporter: Any = None) -> Any:
        """Train under another name."""
        folder = self.folder / "runs" / name
        settings = [f"output_dir={folder}", *self.overrides, *overrides]
        return train(self.folder / "recipe.yaml", settings, reporter=reporter)


def run_stages(task: str, name: str, folder: Path, only: Sequence[str] = STAGES) -> dict[str, Any]:
    """Run every stage of a family; return stage -> outcome as JSON objects."""
    warnings.simplefilter("ignore")
    family = Family(task, name, folder)
    written = attempt(lambda reporter: family.write() or {})
    outcomes: dict[str, Outcome] = {}
    if written.outcome != OK:
        return {"checkpoint": written.to_json()}
    for stage in only:
        if stage in _NEED_RUN and family.run_dir is None:
            last = outcomes["train"]
            outcome = Outcome(REFUSED if last.outcome == REFUSED else FAILED, "nothing was trained")
        elif stage == "plain" and family.merged is None:
            last = outcomes["merge"]
            outcome = Outcome(last.outcome, "nothing was merged")
        else:
            outcome = attempt(lambda reporter, run=_RUN[stage]: run(family, reporter))
        outcomes[stage] = outcome
        if stage == "train" and family.run_dir is None:
            outcomes["fallback"] = _fall_back(family)
    return {stage: outcome.to_json() for stage, outcome in outcomes.items()}


def _fall_back(family: Family) -> Outcome:
    """Train by the first sharing that works where the default does not, for the other stages."""
    outcome = Outcome(REFUSED)
    family.planned = None
    for share in ("none", "input_dim"):
        family.overrides = [f"adapter.share={share}"]
        outcome = attempt(lambda reporter: _train_default(family, reporter))
        outcome.figures["overrides"] = family.overrides
        if family.run_dir is not None:
            break
    return outcome


def _plan(family: Family, reporter: Collected) -> dict[str, Any]:
    found = plan(family.folder / "recipe.yaml", reporter=reporter)
    family.planned = found.trainable_parameters
    _require(family.planned > 0, "plan counts no trainable parameter")
    return {
        "trainable_parameters": found.trainable_parameters,
        "groups": len(found.groups),
        "memory_gib": found.memory_gib.get("total"),
        "unknown": found.unknown,
    }


def _train_default(family: Family, reporter: Collected) -> dict[str, Any]:
    name = "-".join(["main", *family.overrides]).replace("=", "-")
    result = family.train(name, reporter=reporter)
    lines = _read_metrics(result.run_dir)
    losses = [line["loss"] for line in lines if "loss" in line]
    figures = {"trainable_parameters": result.trainable_parameters, "losses": losses}
    if family.planned is not None:
        _require(
            family.planned == result.trainable_parameters,
            f"plan counts {family.planned}, the run {result.trainable_parameters}",
        )
    unmoved = _unmoved_factors(result.run_dir)
    family.run_dir = result.run_dir
    family.logits, family.base_logits = _compute_adapter(family)
    effect = _largest(family.logits, family.base_logits)
    figures |= {"effect": effect, "unmoved": unmoved}
    if family.task == "causal_lm":
        _check_causal(family)
    _require(not unmoved, f"counted as trained, but never moved: {', '.join(unmoved)}")
    _require(effect > 0, f"the adapter has no effect: {figures}")
    return figures


def _check_causal(family: Family) -> None:
    """Raise if a token's logits depend on later tokens: `QUESTIONS` begin with the same token."""
    one, more = family.base_logits[:2]
    difference = float((one[0, 1] - more[0, 1]).abs().max())
    _require(
        difference <= CLOSE * float(more.abs().max()),
        f"later tokens change earlier logits by {difference:.3g}: the label is in the input",
    )


def _unmoved_factors(run_dir: Path) -> list[str]:
    """Return the groups whose zero factor is zero still."""
    from safetensors.torch import load_file

    tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    return [
        name.split("wegeft_phi_")[-1]
        for name, tensor in tensors.items()
        if "wegeft_phi_" in name and not tensor.any()
    ]


def _train_published(family: Family, reporter: Collected) -> dict[str, Any]:
    kept, family.overrides = family.overrides, []
    try:
        result = family.train(
            "published",
            f"adapter.target_modules=[{','.join(PUBLISHED[family.task])}]",
            "train.max_steps=1",
            reporter=reporter,
        )
    finally:
        family.overrides = kept
    return {"trainable_parameters": result.trainable_parameters}


def _compare_batch(family: Family, reporter: Collected) -> dict[str, Any]:
    """Compare rows in a batch with single rows: loss, gradient, answers or logits."""
    single = family.train(
        "single",
        "train.per_device_train_batch_size=1",
        "train.per_device_eval_batch_size=1",
        "train.gradient_accumulation_steps=4",
        reporter=reporter,
    )
    figures = _compare_metrics(family, single.run_dir, validation=True)
    if family.task == "causal_lm":
        answers = [
            [
                row["output"]
                for row in generate(
                    family.run_dir,
                    prompts=list(QUESTIONS),
                    max_new_tokens=NEW_TOKENS,
                    batch_size=size,
                    reporter=reporter,
                )["results"]
            ]
            for size in (1, len(QUESTIONS))
        ]
        differing = sum(one != many for one, many in zip(*answers, strict=True))
        figures["answers_that_differ"] = differing
        _require(not differing, f"{differing} of {len(QUESTIONS)} answers differ in a batch")
    else:
        loss = _validation_loss(family)
        logged = [line for line in _read_metrics(family.run_dir) if "eval_loss" in line]
        figures |= {"eval_loss": logged[-1]["eval_loss"], "eval_loss_of_adapter": loss}
        _require(
            _is_close(loss, logged[-1]["eval_loss"], CLOSE_LOSS),
            f"validation loss {logged[-1]['eval_loss']:.6f} in the run, {loss:.6f} of the adapter",
        )
    return figures


def _compare_checkpointing(family: Family, reporter: Collected) -> dict[str, Any]:
    found = family.train(
        "checkpointing",
        "train.gradient_checkpointing=true",
        "train.max_steps=1",
        reporter=reporter,
    )
    return _compare_metrics(family, found.run_dir, validation=False)


def _compare_metrics(family: Family, other: Path, *, validation: bool) -> dict[str, Any]:
    """Compare loss and gradient norm of each step, and the validation loss, with the main run."""
    assert family.run_dir is not None
    keys = ("loss", "grad_norm", *(("eval_loss",) if validation else ()))
    figures: dict[str, Any] = {}
    for ours, theirs in zip(_read_metrics(family.run_dir), _read_metrics(other), strict=False):
        for key in keys:
            if key not in ours or (ours.get("step", 0) > 1 and key != "eval_loss"):
                continue
            figures[key] = [ours[key], theirs[key]]
            _require(
                _is_close(ours[key], theirs[key], CLOSE_LOSS * (5 if key == "grad_norm" else 1)),
                f"{key} of step {ours['step']}: {ours[key]:.6f} and {theirs[key]:.6f}",
            )
    _require("loss" in figures, "no loss was logged")
    return figures


def _merge(family: Family, reporter: Collected) -> dict[str, Any]:
    """Merge, load the folder by the package, compare with the adapter."""
    assert family.run_dir is not None
    result = merge(family.run_dir, reporter=reporter)
    family.merged = result.output_dir
    opened = ModelTarget.resolve(result.output_dir, None).load()
    return _compare_logits(family, _compute_logits(family, opened.model), "merged")


def _load_plain(family: Family, reporter: Collected) -> dict[str, Any]:
    """Load the merged folder by plain transformers, compare with the adapter."""
    assert family.merged is not None
    load = AUTO[family.task].from_pretrained
    model, info = load(family.merged, output_loading_info=True)
    faults = {key: sorted(map(str, value))[:3] for key, value in info.items() if value}
    if family.task == "causal_lm" and faults:  # a tower that the language model lacks
        _, base_info = load(family.base, output_loading_info=True)
        faults = {k: v for k, v in faults.items() if info[k] != base_info[k]}
    _require(not faults, f"transformers loads the merged folder with {faults}")
    return _compare_logits(family, _compute_logits(family, model), "transformers' model")


def _export(family: Family, reporter: Collected) -> dict[str, Any]:
    """Export the LoRA equivalent, load it by stock PEFT, compare with the adapter."""
    from peft import PeftModel

    options = ExportOptions(prompts=QUESTIONS)
    result = export(family.run_dir, format="lora", options=options, reporter=reporter)
    model = AUTO[family.task].from_pretrained(family.base, dtype="float32")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, str(result.output_dir)).eval()
    missing = [str(w.message)[:200] for w in caught if "missing" in str(w.message).lower()]
    _require(not missing, f"PEFT warns: {missing[:1]}")
    figures = _compare_logits(family, _compute_logits(family, model), "LoRA equivalent in PEFT")
    return {**figures, "is_measured": (result.parity or {}).get("is_measured")}


def _inspect(family: Family, reporter: Collected) -> dict[str, Any]:
    found = inspect(family.run_dir, reporter=reporter)
    return {"modules": len(found["modules"])}


def _compare_logits(family: Family, found: Sequence[Tensor], what: str) -> dict[str, Any]:
    difference = _largest(family.logits, found)
    scale = max(float(row.abs().max()) for row in family.logits)
    effect = _largest(family.logits, family.base_logits)
    figures = {"difference": difference, "effect": effect, "largest_logit": scale}
    _require(
        difference <= CLOSE * scale and difference <= max(0.05 * effect, 1e-5 * scale),
        f"the {what} differs by {difference:.3g} (effect {effect:.3g}, logits to {scale:.3g})",
    )
    return figures


def _compute_adapter(family: Family) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of the adapter and of its base on single rows."""
    assert family.run_dir is not None
    recipe = load_recipe(family.run_dir / "recipe.yaml").recipe
    opened = ModelTarget.resolve(family.run_dir / "adapter", recipe).load()
    adapter = _compute_logits(family, opened.model)
    with opened.base_model() as (base, _):
        return adapter, _compute_logits(family, base)


def _inputs(family: Family, model: nn.Module) -> list[dict[str, Tensor]]:
    if family.task == "image_classification":
        from PIL import Image

        processor = AutoImageProcessor.from_pretrained(family.base)
        paths = sorted((family.folder / "rows" / "images" / "validation").glob("*/*.png"))
        images = [Image.open(path).convert("RGB") for path in paths]
        pixels = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
        return [image_inputs(model, each) for each in pixels]
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    if family.task == "causal_lm":
        texts = list(QUESTIONS)
    else:
        lines = (family.folder / "rows" / "rows.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def _compute_logits(family: Family, model: nn.Module) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return [model(**row).logits.float() for row in _inputs(family, model)]


def _validation_loss(family: Family) -> float:
    """Return the mean loss of the reloaded adapter on single validation rows."""
    logits = torch.cat(family.logits)
    count = len(logits)
    if family.task == "image_classification":
        labels = torch.arange(3).repeat_interleave(count // 3)
    else:
        names = ["maybe", "no", "yes"]
        lines = (family.folder / "rows" / "rows.jsonl").read_text().splitlines()
        labels = torch.tensor([names.index(json.loads(line)["label"]) for line in lines])
    return float(nn.functional.cross_entropy(logits, labels))


def _read_metrics(run_dir: Path | None) -> list[dict[str, Any]]:
    assert run_dir is not None
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _largest(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


def _is_close(one: float, two: float, tolerance: float) -> bool:
    return abs(one - two) <= tolerance * max(1.0, abs(one), abs(two))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise DifferenceError(message)


_RUN: dict[str, Callable[[Family, Collected], dict[str, Any]]] = {
    "plan": _plan,
    "train": _train_default,
    "published": _train_published,
    "batch": _compare_batch,
    "checkpointing": _compare_checkpointing,
    "merge": _merge,
    "plain": _load_plain,
    "export": _export,
    "inspect": _inspect,
}
_NEED_RUN = ("batch", "checkpointing", "merge", "export", "inspect")
