"""Recipes of LLaMA-Factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.importing.adapter_keys import set_dropout, set_method, set_targets
from wegeft_cli.recipe.importing.conversion import Conversion, as_names
from wegeft_cli.recipe.importing.trainer_keys import TRAINER_DEFAULTS, convert_trainer_keys
from wegeft_cli.storage.json_files import read_object

_RENAMED = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "adapter_name_or_path": "adapter.init_from",
    "cutoff_len": "data.max_length",
    "tokenized_path": "data.cache_dir",
    "streaming": "data.streaming",
    "buffer_size": "data.shuffle_buffer_size",
    "enable_liger_kernel": "train.use_liger_kernel",
    "early_stopping_steps": "train.early_stopping_patience",
}
_NO_EFFECT = (
    "overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size", "cache_dir",
    "use_fast_tokenizer", "quantization_method", "quantization_type", "double_quantization",
    "upcast_layernorm", "upcast_lmhead_output", "low_cpu_mem_usage", "infer_backend",
    "print_param_status", "ignore_pad_token_for_loss", "predict_with_generate", "eval_num_beams",
    "create_new_adapter", "pissa_iter", "pissa_convert", "media_dir",
    "include_effective_tokens_per_second",
)  # fmt: skip
_REASONS = {
    "loraplus_lr_ratio": "has no counterpart for LoRA (train.lr_ratio is WeGeFT's)",
    "shift_attn": "has no counterpart: attention is not changed",
    "rope_scaling": "has no counterpart: the base's own position encoding is used",
    "resize_vocab": "has no counterpart: the vocabulary is not extended",
    "use_unsloth": "has no counterpart",
    "compute_accuracy": "has no counterpart: validation logs the loss and `train.eval_tasks`",
}
_REFUSED = ("freeze", "oft")
_KERNELS = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "sdpa": "sdpa",
            "disabled": "eager"}  # fmt: skip


def convert(at: Conversion, folder: Path) -> None:
    """Convert a recipe of LLaMA-Factory; its `dataset_info.json` is read if it is found."""
    stage = at.take("stage", "sft")
    if stage not in ("sft", "pt"):
        raise UserError(
            f"`stage: {stage}` is another kind of training; only supervised fine-tuning is "
            "converted",
            key="stage",
        )
    at.rename(_RENAMED)
    _convert_adapter(at)
    _convert_model(at)
    _convert_data(at, folder, is_text=stage == "pt")
    convert_trainer_keys(at)
    if at.take("disable_gradient_checkpointing"):
        at.set("train.gradient_checkpointing", False, "disable_gradient_checkpointing")
    at.fill({"data.max_length": 2048, **TRAINER_DEFAULTS, "train.gradient_checkpointing": True})
    at.drop_each(_REASONS)
    at.skip(_NO_EFFECT)


def _convert_adapter(at: Conversion) -> None:
    kind = at.take("finetuning_type", "lora")
    if kind in _REFUSED:
        hint = "set it to lora or full before the import"
        raise UserError(f"the method {kind!r} has no counterpart", key="finetuning_type", hint=hint)
    if kind != "lora":
        at.set("adapter.type", kind, "finetuning_type")
        return
    set_method(at, "finetuning_type", dora="use_dora", rslora="use_rslora")
    if at.take("pissa_init"):
        at.set("adapter.type", "pissa", "pissa_init")
    rank = at.take("lora_rank")
    at.set("adapter.r", rank or 8, "lora_rank" if rank else None)
    alpha = at.take("lora_alpha")
    at.set("adapter.alpha", alpha or 2 * at.value("adapter.r"), "lora_alpha" if alpha else None)
    set_dropout(at, "lora_dropout")
    set_targets(at, "lora_target", at.take("lora_target", "all"))
    if (names := at.take("additional_target")) is not None:
        at.set("adapter.modules_to_save", as_names(names), "additional_target")


def _convert_model(at: Conversion) -> None:
    bits = at.take("quantization_bit")
    if bits in (4, 8):
        at.set(f"model.load_in_{bits}bit", True, "quantization_bit")
    elif bits is not None:
        at.drop("quantization_bit", f"{bits} bits have no counterpart: 4 and 8 are supported")
    kernel = at.take("flash_attn")
    if kernel in _KERNELS:
        at.set("model.attn_implementation", _KERNELS[kernel], "flash_attn")
    elif kernel not in (None, "auto"):
        at.drop("flash_attn", f"`{kernel}` has no counterpart")
    if at.take("pure_bf16"):
        at.set("model.dtype", "bfloat16", "pure_bf16")
        at.differ("pure_bf16", "the base is bfloat16; the trained factors stay float32")


def _convert_data(at: Conversion, folder: Path, *, is_text: bool) -> None:
    from wegeft_cli.recipe.importing.llama_factory_data import find_datasets, set_template

    info = _read_info(at, folder)
    limit = at.take("max_samples")
    for key, target in (("dataset", "data.train"), ("eval_dataset", "data.validation")):
        names = at.take(key)
        if names is None:
            continue
        sources = find_datasets(at, key, target, as_names(names), info, is_text=is_text)
        for source in sources:
            if limit is not None and key == "dataset":
                source["limit"] = limit
        at.set(target, sources, key)
    if at.value("data.train") is None:
        at.require("data.train", "set the training files: `train: [{path: FILE}]`")
    _convert_mixture(at)
    _convert_loss(at, is_text=is_text)
    set_template(at, at.take("template"), is_text=is_text)
    _convert_template_options(at)
    share = at.take("val_size")
    if share and float(share) < 1:
        at.set("data.validation_fraction", share, "val_size")
        at.set("data.validation_split", "random", "val_size")
        at.differ("val_size", "random rows are held out, other ones than LLaMA-Factory's")
    elif share:
        at.drop("val_size", f"{share} rows: only a fraction of the rows can be held out")
        at.require("data.validation_fraction", f"LLaMA-Factory holds out {share} rows")
    if at.take("packing") or at.take("neat_packing"):
        at.set("data.packing", "bfd", "neat_packing" if at.take("neat_packing") else "packing")
        if not at.take("neat_packing"):
            at.differ("packing", "rows of a pack do not attend to each other, as with neat_packing")


def _convert_template_options(at: Conversion) -> None:
    """Convert the system prompt and the thinking mode, which need a chat template."""
    system, thinks = at.take("default_system"), at.take("enable_thinking")
    if at.value("data.template") != "chat":
        for key, value in (("default_system", system), ("enable_thinking", thinks)):
            if value is not None:
                at.drop(key, "has no counterpart without a chat template (data.template: chat)")
        return
    if system is not None:
        at.set("data.system", system, "default_system")
    if thinks is not None:
        at.set("data.chat_template_kwargs", {"enable_thinking": thinks}, "enable_thinking")


def _read_info(at: Conversion, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder of the data and its `dataset_info.json`, if it is found."""
    named = Path(str(at.take("dataset_dir", "data")))
    for place in (named, folder / named, folder / ".." / named, folder / "../.." / named):
        file = place / "dataset_info.json"
        if file.is_file():
            return place, read_object(file)
    return None


def _convert_mixture(at: Conversion) -> None:
    strategy, shares = at.take("mix_strategy", "concat"), at.take("interleave_probs")
    sources = at.value("data.train") or []
    if shares is not None and strategy != "concat":
        weights = [float(share) for share in as_names(shares)]
        for source, weight in zip(sources, weights, strict=False):
            source["weight"] = weight
        at.differ("mix_strategy", "an epoch has as many rows as all sources together")
    elif strategy != "concat":
        at.drop("mix_strategy", f"`{strategy}`: sources are concatenated unless they have weights")


def _convert_loss(at: Conversion, *, is_text: bool) -> None:
    last_only, on_prompt = at.take("mask_history"), at.take("train_on_prompt")
    if is_text:
        return
    if on_prompt:
        at.set("data.loss_on", "all", "train_on_prompt")
    elif last_only:
        at.set("data.loss_on", "completion", "mask_history")
    else:
        at.set("data.loss_on", "assistant")
