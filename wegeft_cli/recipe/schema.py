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
    """Load the base's linears in 4 bits (nf4 with double quantisation)."""
    load_in_8bit: bool = False
    """Load the base's linears in 8 bits."""
    quant_method: str = "bitsandbytes"
    """Who quantises: bitsandbytes, or torchao (8 bits, of the weights alone; bitsandbytes rounds
    activations too)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless the recipe says so."""
    drop_path_rate: float | None = None
    """Stochastic depth of an image model while training: the last block's share of rows whose
    residual branches are left out, 0 <= rate < 1, rising from 0 at the first block. Null takes the
    model's own."""


@dataclass(frozen=True)
class AdapterSection:
    """What is learned."""

    type: str = "wegeft"
    """wegeft; full (every weight of the base), bitfit (its biases), linear_probe (a classifier's
    head alone); or the name of a PEFT method (lora, dora, adalora, ia3, vera, ...). A
    classifier's head learns with every one of them."""
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
    """Modules trained and saved whole beside the adapter, by the end of their names (`lm_head`,
    `embed_tokens`, `classifier`); never one that is tied to another."""
    init_from: str | None = None
    """An adapter or run folder whose factors are the start instead of a fresh draw; rank, sharing,
    side and layers must be the same."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Keys of the PEFT method's own config, for the baselines (`lora_dropout`, ...). adalora goes
    from `init_r` ranks a layer (1.5 r) to r on average, between `tinit` first and `tfinal` last
    steps."""


@dataclass(frozen=True)
class DataSource:
    """One data set: a local file or folder, or a hub id."""

    path: str = ""
    """A JSON, JSONL, CSV or Parquet file, a folder of such files, or a hub data set id. Required.
    For image_classification also a folder with one folder of images for each class, or a JSON file
    {image path: class}. A relative path is tried from the working folder, then from the recipe's
    folder."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set or of a folder."""
    format: str = "auto"
    """How a row reads: auto (from its columns), instruction (alpaca), prompt_completion, messages,
    conversations (sharegpt), text, or a named corpus (metamath, codefeedback, wizardlm) with its
    published filter and order."""
    columns: dict[str, str] | None = None
    """Renames: the format's field -> the file's column, e.g. {prompt: question}."""
    weight: float | None = None
    """Share of this source in a mixture, relative to the other weights, above 0; all training
    sources have one or none has. An epoch holds as many rows as all sources together: a source
    with more rows than its share gives other ones each epoch, one with fewer repeats. When
    streaming, each row is drawn from the source that lags most behind its share."""
    limit: int | None = None
    """Take only the first so many rows."""
    image_dir: str | None = None
    """Folder that the image paths in a file are relative to; null is the file's own folder."""


@dataclass(frozen=True)
class DataSection:
    """What is learned from."""

    train: list[DataSource] = field(default_factory=list)
    """Training sources, concatenated in the order given. Required for `train`."""
    validation: list[DataSource] = field(default_factory=list)
    """Sources for the validation loss."""
    validation_fraction: float = 0.0
    """Hold out the last floor(fraction x rows) of the training rows for validation (the authors'
    tuning rule), for a classifier of each class, 0 <= fraction < 1. Not together with
    `validation`."""
    test: list[DataSource] = field(default_factory=list)
    """Sources that `wegeft eval` scores a classifier on; training reads their classes alone."""
    problem_type: str = "single_label_classification"
    """What a classifier's head gives: single_label_classification (one of the classes that the
    training, validation and test sources hold), or regression (a number)."""
    image_size: int | None = None
    """Edge in pixels of the square that an image model sees; null takes the base's own."""
    image_transform: str = "crop_flip"
    """How an image becomes that square: crop_flip (FGVC: short side to 8/7 of it, a random crop and
    a random flip in training, the centre else), crop (the same without a flip), resize (VTAB: to
    the square at once, bilinear without antialiasing, nothing random)."""
    template: str = "auto"
    """auto (instruction rows take the Alpaca form, messages the chat template, prompt/completion
    nothing), a template's name, or the path of a Jinja file."""
    loss_on: str = "completion"
    """Which tokens carry the loss: completion, assistant (every assistant turn), all."""
    max_length: int = 512
    """Longest row in tokens; the rest is cut from the right, counted and told."""
    packing: str = "none"
    """none, or bfd: rows are laid end to end (best-fit decreasing) into sequences of at most
    max_length tokens, and no row sees another. A batch then counts packed sequences."""
    shuffle: bool = True
    """Draw the rows in a new order each epoch, a pure function of (seed, epoch)."""
    streaming: bool = False
    """Read and tokenise the training rows while training instead of before it, for sets that do not
    fit into memory; needs train.max_steps."""
    shuffle_buffer_size: int = 10000
    """Rows that are drawn from at a time when streaming with shuffle."""
    cache_dir: str | None = None
    """Folder that keeps tokenised rows for later runs, keyed by everything that they depend on;
    null keeps none."""


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
    lr_ratio: float = 1.0
    """Learning rate of phi over that of psi; psi learns at learning_rate (WeGeFT alone)."""
    lr_scheduler_type: str = "linear"
    """linear, cosine, cosine_with_min_lr, cosine_warmup_with_min_lr, cosine_with_restarts,
    polynomial, constant (it warms up too where a warm-up is set), constant_with_warmup,
    inverse_sqrt, warmup_stable_decay: transformers' names."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """The schedule's own settings (`min_lr_rate`, `num_decay_steps`, `power`, ...)."""
    warmup_ratio: float = 0.0
    """Share of the steps spent warming up, 0 to 1."""
    warmup_steps: int = 0
    """Steps spent warming up; not together with warmup_ratio."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the optimizer; never on biases and other parameters of one
    dimension."""
    max_grad_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    optim: str = "adamw_torch"
    """An optimizer of torch, transformers or bitsandbytes by transformers' name: adamw_torch,
    adamw_torch_fused, adafactor, sgd, adagrad, rmsprop; adamw_8bit, paged_adamw_8bit, lion_8bit,
    ... (bitsandbytes). Names that need another package (galore, apollo, lomo, ...) are refused."""
    optim_args: dict[str, Any] = field(default_factory=dict)
    """The optimizer's own settings beside those below."""
    adam_beta1: float = 0.9
    """AdamW's first moment decay."""
    adam_beta2: float = 0.999
    """AdamW's second moment decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    neftune_noise_alpha: float | None = None
    """NEFTune: uniform noise on the input embeddings while training, alpha / sqrt(tokens x width)
    at most; null is none."""
    ema_decay: float | None = None
    """Keep an exponential moving average of what learns, 0 < decay < 1; validation and the adapter
    then take the average. Null is none."""
    max_skipped_steps: int = 10
    """Optimizer steps whose loss or gradient is NaN or infinite are skipped and counted; more than
    so many in a run, or than half of its steps, end it. 0 ends it at the first."""
    mixed_precision: str = "none"
    """none, bf16, fp16 (with a loss scaler): autocast over the base; factors stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant): less memory, more time."""
    activation_offload: bool = False
    """Keep what the backward pass needs in the host's memory meanwhile: less GPU memory than
    without, and less time than to recompute it where the bus is fast."""
    group_by_length: bool = False
    """Let each step take rows of about one length: less padding, a less random order. (The rows of
    a step are always cut into forward passes by length, which changes no step's sum.)"""
    use_liger_kernel: bool = False
    """Fused GPU kernels of liger-kernel for norms, rotary embedding and MLP; needs a GPU."""
    eval_steps: float = 0.0
    """Validate every so many steps; below 1 a share of all steps; 0: only at the end."""
    eval_tasks: list[str] = field(default_factory=list)
    """Tasks and groups that each validation scores too (`wegeft eval --list`), by the settings of
    `eval`; their scores are logged as `eval_<task>`, a group's mean as `eval_<group>`."""
    save_steps: float = 0.1
    """Checkpoint every so many steps; below 1 a share of all steps; 0: only when interrupted and at
    the end, so that a crash costs the whole run."""
    save_total_limit: int | None = 2
    """Keep the newest so many checkpoints; null keeps all."""
    ddp_timeout: int = 1800
    """Seconds that a process of many waits for the others before the run ends."""
    logging_steps: int = 1
    """Write a line of metrics every so many steps."""
    early_stopping_patience: int | None = None
    """Stop after so many validations without a better value of metric_for_best_model."""
    metric_for_best_model: str = "eval_loss"
    """Metric that early stopping and load_best_model_at_end watch: eval_loss, or `eval_<task>` of
    one of eval_tasks, or a classifier's `eval_<metric>` (see eval.metric; higher is better)."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint of the best validation beside the newest ones, and write the adapter from
    it."""
    strategy: str = "replicated"
    """replicated: every process keeps the base, for bases that fit. fsdp2: all processes share one
    copy of it, each layer gathered when it is needed. hsdp: the processes of each machine do."""
    fsdp_size: int | None = None
    """With hsdp, how many processes share a copy of the base; null: those of one machine."""
    check_steps: int = 100
    """Compare a checksum of what learns over all processes every so many steps, and end a run whose
    processes hold different values; 0: only at each save."""
    compile: bool = False
    """Compile the model's layers with torch.compile: a minute or more before the first step, and
    faster ones after it, on a GPU above all."""


@dataclass(frozen=True)
class EvalSection:
    """How the result is measured, when the command line does not say."""

    tasks: list[str] = field(default_factory=list)
    """Tasks and groups by name (`wegeft eval --list`)."""
    protocol: str = "wegeft"
    """Prompt, decoding and scoring rules: wegeft, gift, llm_adapters, lora_ga, lora_pro, metamath,
    a `_fixed` form, chat, ...; a task that it does not score takes its own."""
    batch_size: int = 16
    """Prompts generated at a time."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; null takes the protocol's."""
    limit: int | None = None
    """Only the first so many rows of each test set."""
    data_dir: str | None = None
    """Folder that holds `<set>/test.json`; null takes the hub."""
    metric: str = "auto"
    """Which figure is a classifier's score: accuracy, f1 (of the second class), f1_macro,
    matthews_correlation; of a regression pearson, spearmanr. auto is accuracy, or pearson."""


@dataclass(frozen=True)
class LoggingSection:
    """Where figures go besides metrics.jsonl."""

    report_to: Any = "none"
    """Experiment trackers: none, or a name or a list of names out of tensorboard, wandb, mlflow,
    trackio."""
    project: str = "wegeft"
    """Project or experiment name for the trackers."""
    run_name: str | None = None
    """The run's name for the trackers; null is the name of output_dir."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that the model answers at each validation; the answers go to samples.jsonl and to the
    trackers."""


@dataclass(frozen=True)
class Recipe:
    """One recipe: everything that a run needs, and what every command reads."""

    seed: int = 42
    """Seed of the factors, the data order and dropout."""
    output_dir: str = ""
    """The run's folder; empty means runs/<recipe file's name>."""
    task: str = "causal_lm"
    """causal_lm, sequence_classification (one text or two, a class or a number), or
    image_classification."""
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    """What `wegeft sweep` tries: dotted key -> list of values, every combination one run."""

    @property
    def has_head(self) -> bool:
        """Whether the task puts a classification head on the base."""
        return self.task != "causal_lm"
