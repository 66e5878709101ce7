"""Recipes of axolotl."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.importing.adapter_keys import set_dropout, set_method, set_targets
from wegeft_cli.recipe.importing.conversion import Conversion
from wegeft_cli.recipe.importing.trainer_keys import (
    convert_checkpointing_kwargs,
    convert_intervals,
    convert_optimizer_name,
    set_times_per_epoch,
)
from wegeft_cli.recipe.schema import SPECIAL_TOKENS

_RENAMED = {
    "base_model": "model.name_or_path",
    "revision_of_model": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "load_in_4bit": "model.load_in_4bit",
    "load_in_8bit": "model.load_in_8bit",
    "attn_implementation": "model.attn_implementation",
    "sequence_len": "data.max_length",
    "dataset_prepared_path": "data.cache_dir",
    "micro_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "num_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "learning_rate": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "lr_scheduler_kwargs": "train.lr_scheduler_kwargs",
    "weight_decay": "train.weight_decay",
    "warmup_steps": "train.warmup_steps",
    "warmup_ratio": "train.warmup_ratio",
    "max_grad_norm": "train.max_grad_norm",
    "adam_beta1": "train.adam_beta1",
    "adam_beta2": "train.adam_beta2",
    "adam_epsilon": "train.adam_epsilon",
    "neftune_noise_alpha": "train.neftune_noise_alpha",
    "group_by_length": "train.group_by_length",
    "save_total_limit": "train.save_total_limit",
    "logging_steps": "train.logging_steps",
    "early_stopping_patience": "train.early_stopping_patience",
    "load_best_model_at_end": "train.load_best_model_at_end",
    "metric_for_best_model": "train.metric_for_best_model",
    "torch_compile": "train.compile",
    "ddp_timeout": "train.ddp_timeout",
    "seed": "seed",
    "output_dir": "output_dir",
}
_NO_EFFECT = (
    "model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model",
    "is_qwen_derived_model", "is_falcon_derived_model", "base_model_config", "tokenizer_config",
    "tokenizer_use_fast", "strict", "pad_to_sequence_len", "eval_sample_packing",
    "dataset_processes", "dataset_num_proc", "dataset_keep_in_memory", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "shuffle_merged_datasets", "debug",
    "tf32", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "flash_attn_cross_entropy",
    "flash_attn_rms_norm", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp", "low_cpu_mem_usage",
    "include_tokens_per_second", "save_safetensors", "save_only_model", "local_rank", "device",
    "eval_table_size", "remove_unused_columns", "sample_packing_group_size",
    "sample_packing_bin_size", "greater_is_better", "batch_flattening", "resize_token_embeddings",
    "eval_max_new_tokens", "lora_on_cpu",
)  # fmt: skip
_REASONS = {
    "batch_size": "the batch is micro_batch_size x gradient_accumulation_steps x processes",
    "peft_layers_to_transform": "has no counterpart: adapter.target_modules takes a regular "
    "expression over full module names, such as `.*layers\\.(0|1)\\..*`",
    "lora_fan_in_fan_out": "has no counterpart: it follows from the layers",
    "loraplus_lr_ratio": "has no counterpart for LoRA (train.lr_ratio is WeGeFT's)",
    "xformers_attention": "has no counterpart",
    "flex_attention": "has no counterpart: set model.attn_implementation",
    "tokens": "has no counterpart: the vocabulary is not extended",
    "resume_from_checkpoint": "is an option of the command: `wegeft train RECIPE --resume PATH`",
    "auto_resume_from_checkpoints": "is an option of the command: `--resume auto`",
    "hub_model_id": "is an option of the command: `wegeft train RECIPE --push-to-hub REPO`",
    "wandb_entity": "has no counterpart: set the variable WANDB_ENTITY",
    "wandb_log_model": "has no counterpart: the adapter is not uploaded to W&B",
    "wandb_watch": "has no counterpart: gradients are not uploaded to W&B",
}
_DEFAULTS = {
    "data.max_length": 512,
    "train.per_device_train_batch_size": 1,
    "train.num_train_epochs": 1.0,
    "train.lr_scheduler_type": "cosine",
    "train.optim": "adamw_torch_fused",
}


def convert(at: Conversion, folder: Any) -> None:
    """Convert a recipe of axolotl."""
    _refuse_other_training(at)
    packs, optimizer = at.take("sample_packing"), at.take("optimizer")
    if "max_length" in at.source:
        at.drop("max_length", "is no key of axolotl for fine-tuning")
    at.rename(_RENAMED)
    _convert_adapter(at)
    if packs:
        at.set("data.packing", "bfd", "sample_packing")
    if optimizer is not None:
        convert_optimizer_name(at, "optimizer", str(optimizer))
    _convert_schedule(at)
    _convert_precision(at)
    _convert_attention(at)
    _convert_data(at)
    _convert_special_tokens(at)
    _convert_intervals(at)
    _convert_trackers(at)
    _convert_plugins(at)
    at.differ("sequence_len", "longer rows are cut here; axolotl excludes them by default")
    at.fill(_DEFAULTS)
    if not at.value("train.warmup_steps") and at.value("train.warmup_ratio") is None:
        at.set("train.warmup_ratio", 0.03)
        at.differ("warmup", "axolotl's default is 3 % of the steps, 100 steps at most")
    at.drop_each(_REASONS)
    at.skip(_NO_EFFECT)


def _refuse_other_training(at: Conversion) -> None:
    for key in ("rl", "reward_model", "process_reward_model", "pretraining_dataset", "relora"):
        if value := at.take(key):
            raise UserError(
                f"`{key}: {value}` is another kind of training; only supervised fine-tuning "
                "is converted",
                key=key,
            )


def _convert_adapter(at: Conversion) -> None:
    kind = at.take("adapter")
    if kind in ("lora", "qlora"):
        set_method(at, "adapter", dora="peft_use_dora", rslora="peft_use_rslora")
    elif not kind:
        at.set("adapter.type", "full", "adapter")
    else:
        raise UserError(f"the adapter {kind!r} has no counterpart", key="adapter")
    if kind == "qlora" and not at.value("model.load_in_4bit"):
        at.set("model.load_in_4bit", True, "adapter")
    if not kind:
        return
    at.rename({"lora_r": "adapter.r", "lora_alpha": "adapter.alpha"})
    at.rename({"lora_modules_to_save": "adapter.modules_to_save"})
    at.rename({"lora_model_dir": "adapter.init_from"})
    set_dropout(at, "lora_dropout")
    names = at.take("lora_target_modules")
    if at.take("lora_target_linear"):
        at.set("adapter.target_modules", "all-linear", "lora_target_linear")
        if names:
            at.differ("lora_target_modules", "`lora_target_linear` already selects every layer")
    elif names:
        set_targets(at, "lora_target_modules", names)
    if at.value("adapter.type") == "lora" and at.take("peft_init_lora_weights") == "pissa":
        at.set("adapter.type", "pissa", "peft_init_lora_weights")


def _convert_schedule(at: Conversion) -> None:
    share = at.take("cosine_min_lr_ratio")
    if share is not None:
        at.set("train.lr_scheduler_type", "cosine_with_min_lr", "cosine_min_lr_ratio")
        at.set("train.lr_scheduler_kwargs", {"min_lr_rate": share}, "cosine_min_lr_ratio")
    if at.value("train.lr_scheduler_type") in ("rex", "one_cycle"):
        at.drop("lr_scheduler", "has no counterpart: axolotl's own default, cosine, is set")
        del at.converted["train.lr_scheduler_type"]


def _convert_precision(at: Conversion) -> None:
    bf16, fp16 = at.take("bf16"), at.take("fp16")
    if bf16:
        at.set("train.mixed_precision", "bf16", "bf16")
        if bf16 == "auto":
            at.differ("bf16", "`auto` is read as bf16; set none or fp16 on a GPU without bfloat16")
    elif fp16:
        at.set("train.mixed_precision", "fp16", "fp16")
    else:
        at.skip(("bf16", "fp16"))
    for key, dtype in (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32")):
        if at.take(key):
            at.set("model.dtype", dtype, key)
    checkpointing = at.take("gradient_checkpointing")
    if checkpointing:
        at.set("train.gradient_checkpointing", True, "gradient_checkpointing")
        if checkpointing is not True:
            at.differ(
                "gradient_checkpointing",
                f"`{checkpointing}` has no counterpart: activations are recomputed",
            )
    convert_checkpointing_kwargs(at)


def _convert_attention(at: Conversion) -> None:
    kernels = {
        "flash_attention": "flash_attention_2",
        "sdp_attention": "sdpa",
        "eager_attention": "eager",
    }
    for key, kernel in kernels.items():
        if at.take(key):
            at.set("model.attn_implementation", kernel, key)


def _convert_data(at: Conversion) -> None:
    from wegeft_cli.recipe.importing.axolotl_data import convert_sources

    sources = convert_sources(at, "datasets", at.take("datasets") or [])
    if sources:
        at.set("data.train", sources, "datasets")
    else:
        at.require("data.train", "set the training files: `train: [{path: FILE}]`")
    validation = convert_sources(at, "test_datasets", at.take("test_datasets") or [])
    if validation:
        at.set("data.validation", validation, "test_datasets")
    share = at.take("val_set_size")
    if share and not validation:
        _set_validation(at, share)
    if at.take("train_on_inputs"):
        at.set("data.loss_on", "all", "train_on_inputs")
    _convert_template(at)


def _set_validation(at: Conversion, share: Any) -> None:
    if isinstance(share, float) and share < 1:
        at.set("data.validation_fraction", share, "val_set_size")
        at.set("data.validation_split", "random", "val_set_size")
        at.differ("val_set_size", "random rows are held out, other ones than axolotl's")
    else:
        at.drop("val_set_size", f"{share} rows: only a fraction of the rows can be held out")
        at.require("data.validation_fraction", f"axolotl holds out {share} rows")


def _convert_template(at: Conversion) -> None:
    name, text = at.take("chat_template"), at.take("chat_template_jinja")
    if text is not None and PurePath(str(text)).suffix in (".jinja", ".j2"):
        at.set("data.template", text, "chat_template_jinja")
    elif text is not None:
        at.drop(
            "chat_template_jinja",
            "is a template's text: save it as a .jinja file and set data.template to its path",
        )
    elif name == "tokenizer_default":
        at.unneeded.append("chat_template")
    elif name is not None:
        at.differ(
            "chat_template",
            f"`{name}` is axolotl's own text; the tokenizer's chat "
            "template is used, unless data.template is a .jinja file",
        )
    at.rename({"chat_template_kwargs": "data.chat_template_kwargs"})
    if (text := at.take("default_system_message")) is not None:
        forms = {source.get("format") for source in at.value("data.train") or ()}
        if forms <= {"messages", "conversations"}:
            at.set("data.system", text, "default_system_message")
        else:
            at.drop("default_system_message", "has no counterpart for rows without turns")


def _convert_special_tokens(at: Conversion) -> None:
    given = at.take("special_tokens") or {}
    if tokens := {name: text for name, text in given.items() if name in SPECIAL_TOKENS}:
        at.set("model.special_tokens", tokens, "special_tokens")
    for name in given.keys() - tokens.keys():
        at.drop(f"special_tokens.{name}", "has no counterpart: change it in a copy of the base")


def _convert_intervals(at: Conversion) -> None:
    epochs = float(at.value("train.num_train_epochs") or 1.0)
    convert_intervals(at)
    for key, what in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        if (times := at.take(key)) is not None:
            set_times_per_epoch(at, key, what, float(times), epochs)


def _convert_trackers(at: Conversion) -> None:
    project, name = at.take("wandb_project"), at.take("wandb_name") or at.take("wandb_run_id")
    experiment = at.take("mlflow_experiment_name")
    trackers = [
        tracker
        for tracker, is_used in (
            ("wandb", project),
            ("mlflow", experiment or at.take("mlflow_tracking_uri")),
            ("tensorboard", at.take("use_tensorboard")),
        )
        if is_used
    ]
    at.take("wandb_mode")
    if trackers:
        at.set("logging.report_to", trackers, "wandb_project" if project else "use_tensorboard")
    if project or experiment:
        key = "wandb_project" if project else "mlflow_experiment_name"
        at.set("logging.project", project or experiment, key)
    if name:
        at.set("logging.run_name", name, "wandb_name")


def _convert_plugins(at: Conversion) -> None:
    plugins = [str(name) for name in at.take("plugins") or []]
    liger = [key for key in at.source if key.startswith("liger_")]
    if any("liger" in name.lower() for name in plugins) or any(at.take(key) for key in liger):
        at.set("train.use_liger_kernel", True, "plugins")
        at.differ("plugins", "liger-kernel replaces norms, rotary embedding and MLP together")
    for key in liger:
        at.take(key)
    for name in plugins:
        if "liger" not in name.lower():
            at.drop("plugins", f"`{name}` has no counterpart")
