"""The recipe as typed, frozen values: every key, its meaning, unit, range and default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelSection:
    """The frozen base model."""

    name_or_path: str = ""
    """A model folder, a hub id, or a GGUF file. Required."""
    revision: str | None = None
    """Hub branch, tag or commit; null is the default branch."""
    dtype: str = "auto"
    """Type of the base's weights: auto (as in the checkpoint), float32, bfloat16, float16."""
    attn_implementation: str | None = None
    """Attention kernel by its transformers name (eager, sdpa, flash_attention_2, ...); null lets
    transformers choose."""
    load_in_4bit: bool = False
    """Load the base in 4 bits (bitsandbytes nf4). Not in this version."""
    load_in_8bit: bool = False
    """Load the base in 8 bits (bitsandbytes). Not in this version."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless the recipe says so."""


@dataclass(frozen=True)
class AdapterSection:
    """What is learned."""

    type: str = "wegeft"
    """wegeft, or the name of a PEFT method (lora, dora, ia3, vera, ...). (full and adalora are not
    in this version.)"""
    r: int = 64
    """Rank of the two shared maps; at least 1. Published setting: 64."""
    alpha: float | None = None
    """The edit is scaled by alpha / r. Null means 2 r, the published scale of 2."""
    target_modules: Any = "all-linear"
    """Which linears are adapted: a list of module names (`q_proj`; `qkv_proj:q` for rows of a fused
    projection, by name or as `name:start-stop`), one regular expression over full module names, or
    `all-linear` (every linear but the output head)."""
    share: str = "module_type"
    """Who shares one pair: module_type (all layers of a kind), input_dim (all of a width), none."""
    groups: dict[str, list[str]] | None = None
    """Explicit sharing: group name -> patterns over full module names. Replaces `share`."""
    side: str = "input"
    """input edits what enters the layer (W (I + s phi psi)), output what leaves it."""
    dropout: float = 0.0
    """Dropout on the entries of the frozen weight while training, 0 <= p < 1. Needs the weight
    view."""
    init: str = "phi_zero"
    """Which factor starts at zero: phi_zero (language setting) or psi_zero (vision setting)."""
    view: str = "auto"
    """How the edit is computed: auto (the cheaper exact one), activation, weight."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained and saved whole beside the adapter. Not in this version."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Keys of the PEFT method's own config, for the baselines (`lora_dropout`, ...)."""


@dataclass(frozen=True)
class DataSource:
    """One data set: a local file or folder, or a hub id."""

    path: str = ""
    """A JSON, JSONL, CSV or Parquet file, a folder of such files, or a hub data set id. Required.
    A relative path is tried from the working folder, then from the recipe's folder."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set or of a folder."""
    format: str = "auto"
    """How a row reads: auto (from its columns), instruction, prompt_completion, messages, text, or
    a named corpus (metamath, codefeedback, wizardlm) with its published filter and order."""
    columns: dict[str, str] | None = None
    """Renames: the format's field -> the file's column, e.g. {prompt: question}."""
    weight: float | None = None
    """Share of this source in a mixture. Not in this version."""
    limit: int | None = None
    """Take only the first so many rows."""


@dataclass(frozen=True)
class DataSection:
    """What is learned from."""

    train: list[DataSource] = field(default_factory=list)
    """Training sources, concatenated in the order given. Required for `train`."""
    validation: list[DataSource] = field(default_factory=list)
    """Sources for the validation loss."""
    validation_fraction: float = 0.0
    """Hold out the last floor(fraction x rows) of the training rows for validation (the authors'
    tuning rule), 0 <= fraction < 1. Not together with `validation`."""
    template: str = "auto"
    """auto (instruction rows take the Alpaca form, messages the chat template, prompt/completion
    nothing), a template's name, or the path of a Jinja file."""
    loss_on: str = "completion"
    """Which tokens carry the loss: completion, assistant (every assistant turn), all."""
    max_length: int = 512
    """Longest row in tokens; the rest is cut from the right, counted and told."""
    packing: str = "none"
    """none. (bfd, best-fit decreasing, is not in this version.)"""
    shuffle: bool = True
    """Draw the rows in a new order each epoch, a pure function of (seed, epoch)."""


@dataclass(frozen=True)
class TrainSection:
    """How it is learned; names as in Hugging Face TrainingArguments."""

    per_device_train_batch_size: int = 16
    """Rows in one forward pass on one device."""
    per_device_eval_batch_size: int = 16
    """Rows in one forward pass of the validation loss."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step; exact for unequal token counts."""
    num_train_epochs: float = 3.0
    """Passes over the data; ignored when max_steps is set."""
    max_steps: int = -1
    """Optimizer steps in all; -1 counts by epochs."""
    learning_rate: float = 2e-4
    """Highest learning rate."""
    lr_scheduler_type: str = "linear"
    """linear, cosine, constant (it warms up too where a warm-up is set), constant_with_warmup."""
    warmup_ratio: float = 0.0
    """Share of the steps spent warming up, 0 to 1."""
    warmup_steps: int = 0
    """Steps spent warming up; not together with warmup_ratio."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the optimizer."""
    max_grad_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    optim: str = "adamw_torch"
    """adamw_torch, adamw_torch_fused, sgd, adagrad, rmsprop: transformers' names."""
    adam_beta1: float = 0.9
    """AdamW's first moment decay."""
    adam_beta2: float = 0.999
    """AdamW's second moment decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    mixed_precision: str = "none"
    """none, bf16, fp16 (with a loss scaler): autocast over the base; factors stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant): less memory, more time."""
    eval_steps: float = 0.0
    """Validation loss every so many steps; below 1 a share of all steps; 0: only at the end."""
    save_steps: float = 0.0
    """Checkpoint every so many steps; below 1 a share of all steps; 0: only when interrupted and at
    the end."""
    save_total_limit: int | None = 2
    """Keep the newest so many checkpoints; null keeps all."""
    logging_steps: int = 1
    """Write a line of metrics every so many steps."""
    early_stopping_patience: int | None = None
    """Stop after so many validations without a better value of metric_for_best_model."""
    metric_for_best_model: str = "eval_loss"
    """Metric that early stopping watches."""
    strategy: str = "replicated"
    """replicated: every process keeps the base. (fsdp2 and hsdp are not in this version.)"""
    compile: bool = False
    """Compile the model with torch.compile. Not in this version."""


@dataclass(frozen=True)
class EvalSection:
    """How the result is measured, when the command line does not say."""

    tasks: list[str] = field(default_factory=list)
    """Tasks by name (`wegeft eval --list`)."""
    protocol: str = "wegeft"
    """Prompt, decoding and scoring rules: wegeft, gift, ..."""
    batch_size: int = 16
    """Prompts generated at a time."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; null takes the protocol's."""
    limit: int | None = None
    """Only the first so many rows of each test set."""
    data_dir: str | None = None
    """Folder that holds `<set>/test.json`; null takes the hub."""


@dataclass(frozen=True)
class LoggingSection:
    """Where figures go besides metrics.jsonl."""

    report_to: str = "none"
    """Experiment tracker: none."""


@dataclass(frozen=True)
class Recipe:
    """One recipe: everything that a run needs, and what every command reads."""

    seed: int = 42
    """Seed of the factors, the data order and dropout."""
    output_dir: str = ""
    """The run's folder; empty means runs/<recipe file's name>."""
    task: str = "causal_lm"
    """causal_lm. (sequence_classification and image_classification are not in this version.)"""
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
