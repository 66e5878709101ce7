"""Recipes of TRL's `trl sft`, and of the alignment handbook."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from wegeft_cli.recipe.importing.adapter_keys import set_dropout, set_method, set_targets
from wegeft_cli.recipe.importing.conversion import Conversion
from wegeft_cli.recipe.importing.trainer_keys import TRAINER_DEFAULTS, convert_trainer_keys
from wegeft_cli.recipe.schema import SPECIAL_TOKENS

_RENAMED = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "load_in_4bit": "model.load_in_4bit",
    "load_in_8bit": "model.load_in_8bit",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "dataset_streaming": "data.streaming",
    "chat_template_kwargs": "data.chat_template_kwargs",
}
_NO_EFFECT = (
    "dataset_num_proc", "dataset_batch_size", "shuffle_dataset", "eval_packing", "padding_free",
    "pad_to_multiple_of", "lora_task_type", "use_bnb_nested_quant", "bnb_4bit_quant_type",
    "bnb_4bit_quant_storage", "truncation_mode", "dataset_kwargs", "ignore_bias_buffers",
    "add_special_tokens", "gradient_checkpointing_use_reentrant",
)  # fmt: skip
_REASONS = {
    "lora_target_parameters": "has no counterpart",
    "model_init_kwargs": "has no counterpart",
    "test_split_size": "has no counterpart: set data.validation_fraction",
    "dataset_mixer": "has no counterpart: list the datasets in data.train",
    "dataset_mixture": "has no counterpart: list the datasets in data.train",
    "chat_template": "is a template's text: save it as a .jinja file and set data.template",
}
_DEFAULTS = {
    **TRAINER_DEFAULTS,
    "data.max_length": 1024,
    "train.learning_rate": 2e-5,
    "train.gradient_checkpointing": True,
    "train.mixed_precision": "bf16",
    "train.logging_steps": 10,
}


def convert(at: Conversion, folder: Any) -> None:
    """Convert a recipe of `trl sft`."""
    at.rename(_RENAMED)
    if at.value("model.revision") == "main":
        del at.converted["model.revision"]
    names = [name for name in SPECIAL_TOKENS if at.source.get(name)]
    if tokens := {name: at.take(name) for name in names}:
        at.set("model.special_tokens", tokens, ", ".join(names))
    _convert_adapter(at)
    _convert_data(at)
    convert_trainer_keys(at)
    at.fill(_DEFAULTS)
    if (kind := at.take("loss_type")) not in (None, "nll", "chunked_nll"):
        at.drop("loss_type", f"`{kind}` has no counterpart: the loss is the plain cross entropy")
    at.drop_each(_REASONS)
    at.skip(_NO_EFFECT)


def _convert_adapter(at: Conversion) -> None:
    keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
    if not at.take("use_peft"):
        at.set("adapter.type", "full", "use_peft" if "use_peft" in at.source else None)
        for key in keys:
            if key in at.source:
                at.drop(key, "is ignored by TRL without `use_peft: true`: every weight is trained")
        return
    set_method(at, "use_peft", dora="use_dora", rslora="use_rslora")
    at.rename({"lora_r": "adapter.r", "lora_alpha": "adapter.alpha"})
    at.rename({"lora_modules_to_save": "adapter.modules_to_save"})
    if "lora_dropout" in at.source:
        set_dropout(at, "lora_dropout")
    else:
        at.set("adapter.peft.lora_dropout", 0.05)
    at.fill({"adapter.r": 16, "adapter.alpha": 32})
    names = at.take("lora_target_modules")
    if names:
        set_targets(at, "lora_target_modules", names)
    else:
        at.set("adapter.target_modules", ["q_proj", "v_proj"])
        at.differ(
            "lora_target_modules",
            "is not set: PEFT's default depends on the model; for "
            "Llama, Mistral and Qwen it is q_proj and v_proj",
        )


def _convert_data(at: Conversion) -> None:
    sources = _find_sources(at)
    if sources:
        at.set("data.train", sources, "dataset_name" if "dataset_name" in at.source else "datasets")
    else:
        at.require("data.train", "set the training files: `train: [{path: FILE}]`")
    packs, strategy = at.take("packing"), at.take("packing_strategy", "bfd")
    if packs:
        at.set("data.packing", "bfd", "packing")
        if strategy != "bfd":
            at.differ("packing_strategy", f"`{strategy}`: rows are packed whole here (bfd)")
    on_answers, on_completion = at.take("assistant_only_loss"), at.take("completion_only_loss")
    if on_answers:
        at.set("data.loss_on", "assistant", "assistant_only_loss")
    elif on_completion is not None:
        loss = "completion" if on_completion else "all"
        at.set("data.loss_on", loss, "completion_only_loss")
    else:
        at.set("data.loss_on", "completion")
        at.differ(
            "completion_only_loss",
            "is not set: TRL learns the completion of prompt and "
            "completion rows, but every token of messages; for messages set data.loss_on: all",
        )
    template = at.take("chat_template_path")
    if template is not None and PurePath(str(template)).suffix in (".jinja", ".j2"):
        at.set("data.template", template, "chat_template_path")
    elif template is not None:
        at.drop(
            "chat_template_path", f"the template of {template!r} must be saved as a .jinja file"
        )


def _find_sources(at: Conversion) -> list[dict[str, Any]]:
    column = at.take("dataset_text_field")
    if column in (None, "text"):
        column = None
    path, name = at.take("dataset_name"), at.take("dataset_config")
    train, test = at.take("dataset_train_split", "train"), at.take("dataset_test_split")
    entries = at.take("datasets") or []
    if path:
        entries = [{"path": path, "name": name, "split": train}]
    sources = []
    for number, entry in enumerate(entries):
        source = {"path": entry.get("path") or entry.get("id") or ""}
        if entry.get("name"):
            source["name"] = entry["name"]
        if entry.get("split", "train") != "train":
            source["split"] = entry["split"]
        if column:
            source |= {"format": "text", "columns": {"text": column}}
        for key in ("data_files", "data_dir", "columns"):
            if entry.get(key):
                at.drop(f"datasets[{number}].{key}")
        sources.append(source)
    validates = at.source.get("eval_strategy", at.source.get("evaluation_strategy"))
    if sources and path and validates not in (None, "no", False):
        validation = {**sources[0], "split": test or "test"}
        at.set("data.validation", [validation], "dataset_test_split" if test else None)
    elif test and path:
        at.unneeded.append("dataset_test_split")
    return sources
