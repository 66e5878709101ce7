"""Keys of transformers' TrainingArguments, which LLaMA-Factory and TRL share."""

from __future__ import annotations

from typing import Any, get_args

from wegeft_cli.recipe.importing.conversion import Conversion
from wegeft_cli.recipe.rules import TRACKERS
from wegeft_cli.recipe.schema import Optimizer

_SAME = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_kwargs", "warmup_ratio",
    "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon",
    "neftune_noise_alpha", "gradient_checkpointing", "group_by_length", "use_liger_kernel",
    "save_total_limit", "metric_for_best_model", "load_best_model_at_end", "ddp_timeout",
)  # fmt: skip
_RENAMED = {
    "seed": "seed",
    "output_dir": "output_dir",
    "run_name": "logging.run_name",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "torch_compile": "train.compile",
    "activation_offloading": "train.activation_offload",
}
_NO_EFFECT = (
    "do_train", "do_eval", "do_predict", "overwrite_output_dir", "logging_dir", "logging_strategy",
    "logging_first_step", "plot_loss", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataloader_persistent_workers", "remove_unused_columns",
    "save_safetensors", "save_only_model", "include_num_input_tokens_seen", "disable_tqdm", "tf32",
    "log_level", "greater_is_better", "auto_find_batch_size", "data_seed", "use_cpu",
    "include_tokens_per_second", "skip_memory_metrics", "eval_accumulation_steps",
    "prediction_loss_only", "eval_on_start", "hub_strategy", "hub_private_repo",
)  # fmt: skip
_REASONS = {
    "push_to_hub": "is an option of the command: `wegeft train RECIPE --push-to-hub REPO`",
    "hub_model_id": "is an option of the command: `wegeft train RECIPE --push-to-hub REPO`",
    "resume_from_checkpoint": "is an option of the command: `wegeft train RECIPE --resume auto`",
    "label_smoothing_factor": "has no counterpart: the loss is the plain cross entropy",
}
TRAINER_DEFAULTS = {
    "train.per_device_train_batch_size": 8,
    "train.learning_rate": 5e-5,
    "train.num_train_epochs": 3.0,
}
"""TrainingArguments' own defaults that differ from those of the recipe."""


def convert_trainer_keys(at: Conversion) -> None:
    """Convert the keys of transformers' TrainingArguments."""
    at.rename({name: f"train.{name}" for name in _SAME} | _RENAMED)
    _convert_warmup(at)
    _convert_optimizer(at)
    _convert_precision(at)
    convert_intervals(at)
    _convert_logging(at)
    convert_checkpointing_kwargs(at)
    at.drop_each(_REASONS)
    at.skip(_NO_EFFECT)


def convert_checkpointing_kwargs(at: Conversion) -> None:
    """Convert the settings of gradient checkpointing, of which only one changes the result."""
    kwargs = at.take("gradient_checkpointing_kwargs")
    if kwargs is None:
        return
    at.unneeded.append("gradient_checkpointing_kwargs")
    if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        text = "`use_reentrant: true`: checkpointing is never reentrant here"
        at.differ("gradient_checkpointing_kwargs", text)


def _convert_warmup(at: Conversion) -> None:
    steps = at.take("warmup_steps")
    if steps is None:
        return
    is_share = isinstance(steps, float) and 0 < steps < 1
    at.set("train.warmup_ratio" if is_share else "train.warmup_steps", steps, "warmup_steps")
    if at.value("train.warmup_steps") and at.value("train.warmup_ratio"):
        del at.converted["train.warmup_ratio"]
        at.differ("warmup_ratio", "is ignored, as transformers does with `warmup_steps`")
    elif at.value("train.warmup_steps") == 0 and at.value("train.warmup_ratio"):
        del at.converted["train.warmup_steps"]
        at.unneeded.append("warmup_steps")


def _convert_optimizer(at: Conversion) -> None:
    name = at.take("optim")
    if name is not None:
        convert_optimizer_name(at, "optim", str(name))
    arguments = at.take("optim_args")
    if isinstance(arguments, str):
        pairs = (pair.partition("=") for pair in arguments.replace(" ", "").split(",") if pair)
        arguments = {key: _read_number(value) for key, _, value in pairs}
    if arguments:
        at.set("train.optim_args", arguments, "optim_args")


def convert_optimizer_name(at: Conversion, key: str, name: str) -> None:
    """Convert the name of an optimizer; one that is not known here must be chosen."""
    if name == "adamw_hf":
        at.set("train.optim", "adamw_torch", key)
        at.differ(key, "`adamw_hf` is torch's AdamW here: transformers has removed it")
    elif name in get_args(Optimizer):
        at.set("train.optim", name, key)
    else:
        at.drop(key, f"`{name}` has no counterpart: the default optimizer adamw_torch is used")


def _read_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _convert_precision(at: Conversion) -> None:
    is_bf16, is_fp16 = at.take("bf16"), at.take("fp16")
    if is_bf16:
        at.set("train.mixed_precision", "bf16", "bf16")
    elif is_fp16:
        at.set("train.mixed_precision", "fp16", "fp16")
    elif is_bf16 is False or is_fp16 is False:
        at.set("train.mixed_precision", "none", "bf16" if is_bf16 is False else "fp16")


def convert_intervals(at: Conversion) -> None:
    """Convert when to validate and when to save: steps, epochs or never."""
    _convert_interval(at, "eval", ("eval_strategy", "evaluation_strategy"))
    _convert_interval(at, "save", ("save_strategy",))


def _convert_interval(at: Conversion, what: str, names: tuple[str, ...]) -> None:
    found = [(name, value) for name in names if (value := at.take(name)) is not None]
    steps = at.take(f"{what}_steps")
    name, strategy = found[0] if found else (f"{what}_steps", "steps")
    strategy = "no" if strategy is False else strategy  # a bare `no` is false in YAML 1.1
    if strategy == "epoch":
        at.set(f"train.{what}_strategy", "epoch", name)
    elif strategy == "no":
        if what == "eval" and (at.value("data.validation") or at.value("data.validation_fraction")):
            at.differ(name, "validation runs once, at the end of the run")
        at.set(f"train.{what}_steps", 0, name)
    elif strategy == "best":
        at.differ(name, "`best`: set train.load_best_model_at_end and train.save_steps")
    elif steps is not None:
        at.set(f"train.{what}_steps", steps, f"{what}_steps")


def set_times_per_epoch(at: Conversion, key: str, what: str, times: float, epochs: float) -> None:
    """Set how often an epoch is validated or saved: once, never, or a fraction of all steps."""
    if times == 1:
        at.set(f"train.{what}_strategy", "epoch", key)
        return
    share = 1 / (times * epochs) if times else 0
    share = round(share, 6) if share < 1 else 0
    limited = "; max_steps sets their number, so check it" if at.value("train.max_steps") else ""
    if times:
        shown = share or "only at the end"
        at.differ(key, f"is written as a fraction of all steps: {shown}{limited}")
    at.set(f"train.{what}_steps", share, key)


def _convert_logging(at: Conversion) -> None:
    steps = at.take("logging_steps")
    if isinstance(steps, float) and 0 < steps < 1:
        at.differ("logging_steps", "a fraction has no counterpart: every step is logged")
    elif steps is not None:
        at.set("train.logging_steps", steps, "logging_steps")
    trackers = at.take("report_to")
    if trackers is None:
        return
    names = [trackers] if isinstance(trackers, str) else [str(name) for name in trackers]
    known = [name for name in names if name in TRACKERS]
    for name in names:
        if name not in (*TRACKERS, "none"):
            at.differ("report_to", f"`{name}` has no counterpart")
    at.set("logging.report_to", known or "none", "report_to")
