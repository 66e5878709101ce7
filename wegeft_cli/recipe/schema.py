"""The recipe as typed, frozen values: each key with its choices, range, default and meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, get_args


@dataclass(frozen=True)
class Range:
    """The values that a number may have, the words for them, and the same as JSON Schema."""

    words: str
    holds: Callable[[float], bool]
    json_schema: dict[str, Any] = field(hash=False)


Count: TypeAlias = Annotated[int, Range("at least 1", lambda value: value >= 1, {"minimum": 1})]
CountOrZero: TypeAlias = Annotated[
    int, Range("at least 0", lambda value: value >= 0, {"minimum": 0})
]
NotNegative: TypeAlias = Annotated[
    float, Range("at least 0", lambda value: value >= 0, {"minimum": 0})
]
Positive: TypeAlias = Annotated[
    float, Range("above 0", lambda value: value > 0, {"exclusiveMinimum": 0})
]
Fraction: TypeAlias = Annotated[
    float,
    Range("between 0 and 1", lambda value: 0 <= value <= 1, {"minimum": 0, "maximum": 1}),
]
BelowOne: TypeAlias = Annotated[
    float,
    Range(
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        {"minimum": 0, "exclusiveMaximum": 1},
    ),
]
Decay: TypeAlias = Annotated[
    float,
    Range(
        "above 0 and below 1",
        lambda value: 0 < value < 1,
        {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    ),
]
Every: TypeAlias = Annotated[
    float,
    Range(
        "0, a fraction of the steps below 1, or a whole number of steps",
        lambda value: 0 <= value < 1 or (value >= 1 and value == int(value)),
        {"anyOf": [{"minimum": 0, "exclusiveMaximum": 1}, {"minimum": 1, "multipleOf": 1}]},
    ),
]
MaxSteps: TypeAlias = Annotated[
    int,
    Range(
        "-1 or at least 1",
        lambda value: value == -1 or value >= 1,
        {"anyOf": [{"const": -1}, {"minimum": 1}]},
    ),
]
Seed: TypeAlias = Annotated[
    int,
    Range(
        "between 0 and 4294967295",
        lambda value: 0 <= value < 2**32,
        {"minimum": 0, "maximum": 2**32 - 1},
    ),
]

TaskName: TypeAlias = Literal["causal_lm", "sequence_classification", "image_classification"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
QuantMethod: TypeAlias = Literal["bitsandbytes", "torchao"]
InPlaceMethod: TypeAlias = Literal["full", "bitfit", "linear_probe"]
PeftMethod: TypeAlias = Literal[
    "lora", "dora", "rslora", "pissa", "adalora", "ia3", "vera", "loha", "lokr", "oft", "boft",
    "hra", "fourierft", "vblora", "randlora", "c3a", "miss", "road", "delora", "waveft", "hira",
    "ln_tuning", "adamss", "beft", "deft", "frod", "glora", "gralora", "osf", "peanut", "psoft",
    "pvera", "shira", "supertuning", "tinylora", "unilora",
]  # fmt: skip
SiblingMethod: TypeAlias = Literal["red", "ssf", "1lora", "tied_lora", "loreft"]
MethodName: TypeAlias = Literal["wegeft", InPlaceMethod, SiblingMethod, PeftMethod]
Share: TypeAlias = Literal["module_type", "input_dim", "none"]
ScaleRule: TypeAlias = Literal["none", "rank_width"]
Side: TypeAlias = Literal["input", "output"]
Init: TypeAlias = Literal["phi_zero", "psi_zero"]
View: TypeAlias = Literal["auto", "activation", "weight"]
RowFormat: TypeAlias = Literal[
    "auto", "instruction", "prompt_completion", "messages", "conversations", "text", "metamath",
    "codefeedback", "wizardlm",
]  # fmt: skip
Split: TypeAlias = Literal["last", "random"]
SystemTurn: TypeAlias = Literal["template", "merge"]
LossOn: TypeAlias = Literal["completion", "assistant", "all"]
Packing: TypeAlias = Literal["none", "bfd"]
ProblemType: TypeAlias = Literal["single_label_classification", "regression"]
ImageTransform: TypeAlias = Literal["crop_flip", "crop", "resize"]
Scheduler: TypeAlias = Literal[
    "linear", "cosine", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "cosine_with_restarts",
    "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip
Optimizer: TypeAlias = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit",
    "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit",
    "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
]  # fmt: skip
MixedPrecision: TypeAlias = Literal["none", "bf16", "fp16"]
Interval: TypeAlias = Literal["steps", "epoch"]
Strategy: TypeAlias = Literal["replicated", "fsdp2", "hsdp"]
ClassMetric: TypeAlias = Literal["accuracy", "f1", "f1_macro", "matthews_correlation"]
RegressionMetric: TypeAlias = Literal["pearson", "spearmanr"]
AnswerMetric: TypeAlias = Literal["exact_match", "contains", "number", "rouge_l", "judge"]
Metric: TypeAlias = Literal["auto", ClassMetric, RegressionMetric]

INPLACE_TYPES: tuple[str, ...] = get_args(InPlaceMethod)
"""Methods that train some or all of the base's own parameters."""
SIBLING_TYPES: tuple[str, ...] = get_args(SiblingMethod)
"""Methods that edit a linear layer's output by an affine map."""
PEFT_TYPES: tuple[str, ...] = get_args(PeftMethod)
"""PEFT's methods that adapt linear layers selected by name."""
CLASS_METRICS: tuple[str, ...] = get_args(ClassMetric)
REGRESSION_METRICS: tuple[str, ...] = get_args(RegressionMetric)
METRICS = (*CLASS_METRICS, *REGRESSION_METRICS)
"""The metrics of `eval.metric`; higher is better in all of them."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")
"""Keys of `model.special_tokens`."""
PACKING_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Attention kernels (transformers' names) that separate packed rows by their positions."""


@dataclass(frozen=True)
class ModelSection:
    """The frozen base model."""

    name_or_path: str = ""
    """Model folder, hub id, or GGUF file. Required."""
    revision: str | None = None
    """Hub branch, tag or commit. Null: the default branch."""
    dtype: Dtype = "auto"
    """Type of the base's weights: auto (as in the checkpoint), float32, bfloat16, float16."""
    attn_implementation: str | None = None
    """Attention kernel by its transformers name (eager, sdpa, flash_attention_2, ...). Null:
    transformers chooses."""
    load_in_4bit: bool = False
    """Load the base's linear layers in 4 bits (nf4 with double quantization)."""
    load_in_8bit: bool = False
    """Load the base's linear layers in 8 bits."""
    quant_method: QuantMethod = "bitsandbytes"
    """Quantization library: bitsandbytes, or torchao (8 bits, weights only; bitsandbytes also
    rounds activations)."""
    trust_remote_code: bool = False
    """Run Python code that is part of the model's repository."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """Tokens of the vocabulary that replace the tokenizer's own, e.g. {eos_token: "<|im_end|>"}:
    bos_token, eos_token, pad_token. The adapter records them, and a merged model has them in its
    files. A new token needs an extended base."""
    drop_path_rate: BelowOne | None = None
    """Stochastic depth of an image model during training, 0 <= rate < 1: the probability that the
    last block's residual branches are dropped, rising linearly from 0 at the first block. Null:
    the model's own rate."""


@dataclass(frozen=True)
class AdapterSection:
    """The method and what it trains."""

    type: MethodName = "wegeft"
    """wegeft; full (every weight of the base), bitfit (its biases), linear_probe (only a
    classifier's head); red, ssf, 1lora, tied_lora or loreft (affine edits of a layer's output); or
    the name of a PEFT method (lora, dora, adalora, ia3, vera, ...). Every method also trains a
    classifier's head."""
    r: Count = 64
    """Rank of the two shared maps, at least 1. Published setting: 64."""
    alpha: Positive | None = None
    """The weight change is scaled by alpha / r. Null: 2 r, the published scale of 2."""
    scale_rule: ScaleRule = "none"
    """Rule that computes the scale s: none (alpha / r), or rank_width (32768 / (r d), where d is
    the mean width of the adapted layers on the edited side), under which one learning rate serves
    several ranks and models. Excludes `alpha`. The adapter records s r as its alpha."""
    match_params: Any = None
    """Number of trainable parameters that chooses the rank, instead of `r`: the rank of the nearest
    number, which must be within 10 %. The path of a recipe counts the parameters of its `adapter`
    on this base. The number includes modules that are trained whole and a classifier's head. Alpha
    stays as it is (null: scale 2); {params: N, scale: 0.5} sets alpha / r instead. A file or an
    override that sets `match_params` replaces an earlier `r` and keeps its scale."""
    target_modules: Any = "all-linear"
    """Adapted linear layers: a list of module names (`q_proj`; `qkv_proj:q` for rows of a fused
    projection, by name or as `name:start-stop`), one regular expression over full module names, or
    `all-linear` (every linear layer that learns except heads, routers and tied layers, and on the
    input side the stacked weights of experts; `wegeft plan` lists what it omits)."""
    share: Share = "module_type"
    """Layers that share one pair of maps: module_type (all layers of a kind; a kind with several
    input widths is split by the modules around it, or by width), input_dim (all layers of an input
    width), none."""
    groups: dict[str, list[str]] | None = None
    """Explicit sharing: group name -> patterns over full module names. Replaces `share`."""
    side: Side = "input"
    """Side of the weight on which the maps are applied: input (W (I + s phi psi)) or output."""
    dropout: BelowOne = 0.0
    """Dropout on the entries of the frozen weight during training, 0 <= p < 1. Requires the weight
    view."""
    init: Init = "phi_zero"
    """Map that starts at zero: phi_zero (language setting) or psi_zero (vision setting)."""
    view: View = "auto"
    """How the weight change is computed: auto (the cheaper exact view), activation, weight."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained and saved whole with the adapter, by the end of their names (`lm_head`,
    `embed_tokens`, `classifier`). A module with tied weights is refused."""
    init_from: str | None = None
    """Adapter or run folder whose factors initialize this adapter. Rank, sharing, side and layers
    must be equal."""
    peft: dict[str, Any] = field(default_factory=dict)
    """Keys of the PEFT method's own config, for baselines (`lora_dropout`, ...). adalora reduces
    `init_r` ranks per layer (default: 1.5 r) to r on average, between its `tinit` first and
    `tfinal` last steps."""


@dataclass(frozen=True)
class DataSource:
    """One dataset: a local file or folder, or a hub id."""

    path: str = ""
    """JSON, JSONL, CSV or Parquet file, a folder of such files, or a hub dataset id. Required.
    For image_classification also a folder with one folder of images per class, or a JSON file
    {image path: class}. A relative path is resolved against the working folder, then against the
    recipe's folder."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset or of a folder."""
    format: RowFormat = "auto"
    """Format of a row: auto (from its columns), instruction (alpaca), prompt_completion, messages,
    conversations (sharegpt), text, or a named corpus (metamath, codefeedback, wizardlm) with its
    published filter and order."""
    field: str | None = None
    """Field of a JSON file that holds the list of rows, e.g. data; with dots for nested fields."""
    columns: dict[str, str] | None = None
    """Renames: the format's field -> the file's column, e.g. {prompt: question}."""
    weight: Positive | None = None
    """Share of this source in a mixture, relative to the other weights, above 0. Set it for every
    training source or for none. An epoch has as many rows as all sources together: a source with
    more rows than its share contributes different rows each epoch, one with fewer rows repeats.
    When streaming, each row is taken from the source that is furthest behind its share."""
    limit: Count | None = None
    """Use only the first N rows."""
    image_dir: str | None = None
    """Folder that image paths in a file are relative to. Null: the file's own folder."""


@dataclass(frozen=True)
class DataSection:
    """The data to train on."""

    train: list[DataSource] = field(default_factory=list)
    """Training sources, concatenated in the given order. Required for `train`."""
    validation: list[DataSource] = field(default_factory=list)
    """Sources for the validation loss."""
    validation_fraction: BelowOne = 0.0
    """Hold out floor(fraction x rows) of the training rows for validation, 0 <= fraction < 1; for a
    classifier, of each class. Excludes `validation`."""
    validation_split: Split = "last"
    """Rows that validation_fraction holds out: last (the authors' tuning rule), or random (a pure
    function of validation_seed)."""
    validation_seed: Seed = 42
    """Seed of a random validation split. It does not follow `seed`, so that runs with several seeds
    share their validation rows."""
    test: list[DataSource] = field(default_factory=list)
    """Sources on which `wegeft eval` scores a classifier. Training reads only their classes."""
    problem_type: ProblemType = "single_label_classification"
    """Output of a classifier's head: single_label_classification (one of the classes in the
    training, validation and test sources), or regression (a number)."""
    image_size: Count | None = None
    """Edge in pixels of the square input of an image model. Null: the base's own size."""
    image_transform: ImageTransform = "crop_flip"
    """How an image becomes that square: crop_flip (FGVC: short side resized to 8/7 of the edge, a
    random crop and a random flip in training, a center crop otherwise), crop (the same without a
    flip), resize (VTAB: resized to the square, bilinear without antialiasing, no randomness)."""
    template: str = "auto"
    """auto (Alpaca form for instruction rows, the chat template for messages, no template for
    prompt/completion), a template's name, or the path of a Jinja file."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}, in training and whenever the
    adapter is prompted. A row's column of this name takes precedence."""
    system: str | None = None
    """System prompt of the conversations that have no system turn, in training and whenever the
    adapter is prompted. Requires a chat template. Null: none."""
    system_turn: SystemTurn = "template"
    """template (the chat template writes a system turn), merge (its text goes before that of the
    first user turn, for templates that refuse a system turn)."""
    loss_on: LossOn = "completion"
    """Tokens that carry the loss: completion, assistant (every assistant turn), all."""
    max_length: Count = 512
    """Maximum length of a row in tokens. Longer rows are cut from the right, counted and
    reported."""
    packing: Packing = "none"
    """none, or bfd: rows are concatenated (best-fit decreasing) into sequences of at most
    max_length tokens, and no row attends to another. A batch then counts packed sequences."""
    shuffle: bool = True
    """Use a new order of the rows in each epoch, a pure function of (seed, epoch)."""
    streaming: bool = False
    """Read and tokenize the training rows during training, for datasets that do not fit into
    memory. Requires train.max_steps."""
    shuffle_buffer_size: Count = 10000
    """Size of the shuffle buffer in rows when streaming with shuffle."""
    cache_dir: str | None = None
    """Folder that stores tokenized rows for later runs, keyed by everything they depend on. Null:
    no cache."""


@dataclass(frozen=True)
class TrainSection:
    """How to train; names as in Hugging Face TrainingArguments."""

    per_device_train_batch_size: Count = 16
    """Rows per forward pass on each device."""
    per_device_eval_batch_size: Count = 16
    """Rows per forward pass of the validation loss on each device."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step. Exact for unequal token counts."""
    max_tokens_per_pass: Count | None = None
    """Most tokens of one forward pass, padding counted. The rows of a batch are cut into passes of
    this size, which changes no step's gradient; a longer row has a pass to itself. A step that runs
    out of memory is repeated with half of it. Null: chosen by the device (1024 on a CPU, 16384 on a
    GPU) and its free memory. Not for images."""
    num_train_epochs: Positive = 3.0
    """Passes over the data. Ignored when max_steps is set."""
    max_steps: MaxSteps = -1
    """Total number of optimizer steps. -1: use num_train_epochs."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    lr_ratio: Positive = 1.0
    """Learning rate of phi divided by that of psi, which is learning_rate. WeGeFT only."""
    lr_scheduler_type: Scheduler = "linear"
    """transformers' name of the schedule: linear, cosine, cosine_with_min_lr,
    cosine_warmup_with_min_lr, cosine_with_restarts, polynomial, constant (with warmup if one is
    set), constant_with_warmup, inverse_sqrt, warmup_stable_decay."""
    lr_scheduler_steps: Count | None = None
    """Optimizer steps over which the schedule runs, at least those of the run: a run can end before
    its schedule does. warmup_ratio is a fraction of them. Null: the steps of the run."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Settings of the schedule (`min_lr_rate`, `num_decay_steps`, `power`, ...)."""
    warmup_ratio: Fraction = 0.0
    """Fraction of the steps used for warmup, 0 to 1."""
    warmup_steps: CountOrZero = 0
    """Number of warmup steps. Excludes warmup_ratio."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay. Never applied to biases and other one-dimensional parameters."""
    max_grad_norm: NotNegative = 1.0
    """Maximum global gradient norm. 0: no clipping."""
    optim: Optimizer = "adamw_torch"
    """transformers' name of an optimizer of torch, transformers or bitsandbytes: adamw_torch,
    adamw_torch_fused, adafactor, sgd, adagrad, rmsprop; adamw_8bit, paged_adamw_8bit, lion_8bit,
    ... (bitsandbytes). Optimizers of other packages (galore, apollo, lomo, ...) are refused."""
    optim_args: dict[str, Any] = field(default_factory=dict)
    """Further settings of the optimizer."""
    adam_beta1: BelowOne = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: BelowOne = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon."""
    neftune_noise_alpha: Positive | None = None
    """NEFTune: uniform noise of at most alpha / sqrt(tokens x width) on the input embeddings during
    training. Null: no noise."""
    ema_decay: Decay | None = None
    """Keep an exponential moving average of the trained parameters, 0 < decay < 1. Validation and
    the adapter use the average. Null: no average."""
    max_skipped_steps: CountOrZero = 10
    """Optimizer steps whose loss or gradient is NaN or infinite, or whose gradient is 0 at a loss
    that is not, are skipped and counted. The run fails after more skipped steps than this, or more
    than half of its steps. 0: fail at the first."""
    mixed_precision: MixedPrecision = "none"
    """none, bf16, or fp16 (with a loss scaler): autocast over the base. Factors stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant). Less memory, more time."""
    activation_offload: bool = False
    """Keep activations for the backward pass in host memory. Less GPU memory; faster than
    recomputation when the bus is fast."""
    group_by_length: bool = False
    """Use rows of similar length in each step. Less padding, a less random order. (The rows of a
    step are always split into forward passes by length, which changes no step's sum.)"""
    use_liger_kernel: bool = False
    """Use liger-kernel's fused kernels for norms, rotary embedding and MLP. Requires a GPU."""
    eval_strategy: Interval = "steps"
    """steps: validate by eval_steps. epoch: validate at the end of each epoch."""
    eval_steps: Every = 0.0
    """Validate every N steps; below 1: a fraction of all steps; 0: only at the end."""
    eval_tasks: list[str] = field(default_factory=list)
    """Benchmarks and groups to score at each validation (`wegeft eval --list`) with the settings of
    `eval`. Scores are logged as `eval_<task>`, a group's mean as `eval_<group>`."""
    save_strategy: Interval = "steps"
    """steps: save by save_steps. epoch: save at the end of each epoch, and do not read
    save_steps."""
    save_steps: Every = 0.1
    """Save a checkpoint every N steps; below 1: a fraction of all steps; 0: only when interrupted
    and at the end, so that a crash loses the whole run."""
    save_total_limit: Count | None = 2
    """Number of newest checkpoints to keep. Null: all."""
    ddp_timeout: Count = 1800
    """Seconds that a process waits for the others before the run fails."""
    logging_steps: Count = 1
    """Write a line of metrics every N steps."""
    early_stopping_patience: Count | None = None
    """Stop after this number of validations without improvement of metric_for_best_model. Null:
    never."""
    metric_for_best_model: str = "eval_loss"
    """Metric for early stopping and load_best_model_at_end: eval_loss, `eval_<task>` of one of
    eval_tasks, or a classifier's `eval_<metric>` (see eval.metric; higher is better)."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint of the best validation in addition to the newest ones, and write the
    adapter from it."""
    strategy: Strategy = "replicated"
    """replicated: every process holds the base. fsdp2: all processes share one copy of it, and each
    layer is gathered when needed. hsdp: the processes of each machine share a copy."""
    fsdp_size: Count | None = None
    """With hsdp, the number of processes that share a copy of the base. Null: those of one
    machine."""
    check_steps: CountOrZero = 100
    """Compare a checksum of the trained parameters over all processes every N steps, and fail if
    they differ. 0: only at each save."""
    compile: bool = False
    """Compile the model's layers with torch.compile: a minute or more before the first step, faster
    steps afterwards, mainly on a GPU."""


@dataclass(frozen=True)
class EvalSection:
    """Evaluation settings, used where the command line sets none."""

    tasks: list[str] = field(default_factory=list)
    """Benchmarks and groups by name (`wegeft eval --list`), and `data:FILE` for test sets of your
    own, scored by answer_metric."""
    protocol: str = "wegeft"
    """Prompt, decoding and scoring rules: wegeft, gift, llm_adapters, lora_ga, lora_pro, metamath,
    a `_fixed` form, chat, ... A benchmark that the protocol does not cover uses its own."""
    batch_size: Count = 16
    """Prompts per generation batch."""
    max_new_tokens: Count | None = None
    """Maximum length of an answer in tokens. Null: the protocol's."""
    limit: Count | None = None
    """Use only the first N rows of each test set."""
    data_dir: str | None = None
    """Folder with `<set>/test.json`. Null: the hub."""
    answer_metric: AnswerMetric = "exact_match"
    """Score of a test set of your own (`data:FILE` in tasks, or `wegeft eval --data FILE`):
    exact_match, contains (as whole words, case ignored), number (the last one), rouge_l, judge."""
    metric: Metric = "auto"
    """Score of a classifier: accuracy, f1 (of the second class), f1_macro, matthews_correlation; of
    a regression: pearson, spearmanr. auto: accuracy, or pearson."""


@dataclass(frozen=True)
class LoggingSection:
    """Where metrics are written besides metrics.jsonl."""

    report_to: Any = "none"
    """Experiment trackers: none, or a name or a list of names from tensorboard, wandb, mlflow,
    trackio."""
    project: str = "wegeft"
    """Project or experiment name for the trackers."""
    run_name: str | None = None
    """The run's name for the trackers. Null: the name of output_dir."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that the model answers at each validation. The answers are written to samples.jsonl
    and to the trackers."""


@dataclass(frozen=True)
class Recipe:
    """One recipe: everything that a run needs, read by every command."""

    seed: Seed = 42
    """Seed of the factors, the data order and dropout."""
    output_dir: str = ""
    """The run's folder. Empty: runs/<recipe file's name>."""
    task: TaskName = "causal_lm"
    """causal_lm, sequence_classification (one or two texts -> a class or a number), or
    image_classification."""
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    """Values that `wegeft sweep` tries: dotted key -> list of values. Each combination is one
    run."""

    @property
    def has_head(self) -> bool:
        """Whether the task puts a classification head on the base."""
        return self.task != "causal_lm"
