"""Recipes of torchtune: LoRA and full fine-tuning."""

from __future__ import annotations

from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.importing.conversion import Conversion

_RENAMED = {
    "batch_size": "train.per_device_train_batch_size",
    "epochs": "train.num_train_epochs",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "clip_grad_norm": "train.max_grad_norm",
    "compile": "train.compile",
    "enable_activation_checkpointing": "train.gradient_checkpointing",
    "enable_activation_offloading": "train.activation_offload",
    "log_every_n_steps": "train.logging_steps",
    "seed": "seed",
    "output_dir": "output_dir",
    "shuffle": "data.shuffle",
}
_NO_EFFECT = (
    "device", "log_peak_memory_stats", "log_level", "profiler", "save_adapter_weights_only", "loss",
    "custom_sharded_layers", "optimizer_in_bwd",
)  # fmt: skip
_ATTENTION = {"output_proj": "o_proj"}
_MLP = ["gate_proj", "up_proj", "down_proj"]
_DATASETS = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "instruction"),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "instruction"),
    "instruct_dataset": (None, "instruction"),
    "chat_dataset": (None, "messages"),
    "text_completion_dataset": (None, "text"),
}


def convert(at: Conversion, folder: Any) -> None:
    """Convert a recipe of torchtune."""
    at.rename(_RENAMED)
    if at.value("seed") is None:
        at.take("seed")
    _convert_model(at)
    _convert_optimizer(at)
    _convert_data(at)
    at.fill({"train.max_grad_norm": 0})
    dtype = at.take("dtype")
    if dtype in ("bf16", "fp16", "fp32"):
        names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        at.set("model.dtype", names[dtype], "dtype")
    logger = _part(at, "metric_logger")
    trackers = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}
    if tracker := trackers.get(_name(logger)):
        at.set("logging.report_to", tracker, "metric_logger")
        if logger.get("project"):
            at.set("logging.project", logger["project"], "metric_logger.project")
    elif logger:
        at.unneeded.append("metric_logger")
    if at.take("resume_from_checkpoint"):
        at.drop("resume_from_checkpoint", "is an option of the command: `--resume auto`")
    if (steps := at.take("max_steps_per_epoch")) is not None:
        at.set(
            "train.max_steps",
            int(steps) * int(at.value("train.num_train_epochs") or 1),
            "max_steps_per_epoch",
        )
        at.differ("max_steps_per_epoch", "the steps of all epochs are one number")
    at.skip(_NO_EFFECT)


def _part(at: Conversion, key: str) -> dict[str, Any]:
    part = at.take(key)
    return part if isinstance(part, dict) else {}


def _name(part: dict[str, Any]) -> str:
    """Return the last part of a component's name."""
    return str(part.get("_component_", "")).rpartition(".")[2]


def _convert_model(at: Conversion) -> None:
    model = _part(at, "model")
    checkpointer = _part(at, "checkpointer")
    folder = checkpointer.get("checkpoint_dir")
    if folder:
        at.set("model.name_or_path", folder, "checkpointer.checkpoint_dir")
        at.differ("checkpointer", "the folder must hold the model in Hugging Face's layout")
    else:
        at.require("model.name_or_path", "set the base's folder or hub id")
    name = _name(model)
    if "lora" not in name:
        at.set("adapter.type", "full", "model._component_")
        return
    if name.startswith("qlora"):
        at.set("model.load_in_4bit", True, "model._component_")
    at.set("adapter.type", "dora" if model.get("use_dora") else "lora", "model._component_")
    for key, target in (("lora_rank", "r"), ("lora_alpha", "alpha")):
        if model.get(key) is not None:
            at.set(f"adapter.{target}", model[key], f"model.{key}")
    if model.get("lora_dropout"):
        at.set("adapter.peft.lora_dropout", model["lora_dropout"], "model.lora_dropout")
    targets = [_ATTENTION.get(name, name) for name in model.get("lora_attn_modules") or []]
    targets += _MLP if model.get("apply_lora_to_mlp") else []
    targets += ["lm_head"] if model.get("apply_lora_to_output") else []
    if targets:
        at.set("adapter.target_modules", targets, "model.lora_attn_modules")
        at.differ("model.lora_attn_modules", "the names are those of Llama in transformers")


def _convert_optimizer(at: Conversion) -> None:
    optimizer, schedule = _part(at, "optimizer"), _part(at, "lr_scheduler")
    name = _name(optimizer)
    if name == "AdamW":
        is_fused = bool(optimizer.get("fused"))
        optim = "adamw_torch_fused" if is_fused else "adamw_torch"
        at.set("train.optim", optim, "optimizer._component_")
    elif name == "PagedAdamW8bit":
        at.set("train.optim", "paged_adamw_8bit", "optimizer._component_")
    elif name:
        at.drop("optimizer", f"`{name}` has no counterpart: adamw_torch is used")
    for key, target in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if optimizer.get(key) is not None:
            at.set(f"train.{target}", optimizer[key], f"optimizer.{key}")
    if "cosine" in _name(schedule):
        at.set("train.lr_scheduler_type", "cosine", "lr_scheduler._component_")
    elif schedule:
        at.drop("lr_scheduler", f"`{_name(schedule)}` has no counterpart: linear is used")
    else:
        at.set("train.lr_scheduler_type", "constant")
    if schedule.get("num_warmup_steps") is not None:
        at.set("train.warmup_steps", schedule["num_warmup_steps"], "lr_scheduler.num_warmup_steps")


def _convert_data(at: Conversion) -> None:
    tokenizer = _part(at, "tokenizer")
    if tokenizer.get("max_seq_len"):
        at.set("data.max_length", tokenizer["max_seq_len"], "tokenizer.max_seq_len")
    else:
        at.require("data.max_length", "torchtune cuts no row; the default here is 512 tokens")
    entries = at.take("dataset")
    sources = []
    for entry in entries if isinstance(entries, list) else [entries or {}]:
        if not isinstance(entry, dict):
            raise UserError("expected a map with `_component_`", key="dataset")
        sources.append(_convert_source(at, entry))
        if entry.get("packed"):
            at.set("data.packing", "bfd", "dataset.packed")
        if entry.get("train_on_input", _name(entry).startswith("alpaca")):
            at.set("data.loss_on", "all", "dataset.train_on_input")
    at.set("data.train", sources, "dataset")


def _convert_source(at: Conversion, entry: dict[str, Any]) -> dict[str, Any]:
    path, form = _DATASETS.get(_name(entry), (None, "auto"))
    files = entry.get("data_files")
    path = files or (entry.get("source") if entry.get("source") not in (None, "json") else path)
    source: dict[str, Any] = {"path": str(path or "")}
    if not path:
        at.require("data.train[0].path", f"set the file or hub id of `{_name(entry)}`")
    if entry.get("split", "train") != "train" and not files:
        source["split"] = entry["split"]
    if form == "messages" and entry.get("conversation_style") == "sharegpt":
        form = "conversations"
    if form != "auto":
        source["format"] = form
    columns = dict(entry.get("column_map") or {})
    if form == "text" and entry.get("column"):
        columns = {"text": entry["column"]}
    elif form in ("messages", "conversations") and entry.get("conversation_column"):
        columns = {form: entry["conversation_column"]}
    if columns:
        source["columns"] = columns
    return source
