"""No key is accepted that nothing reads: each one that train reads changes what can be seen."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaMLP

from wegeft_cli.recipe.schema import DataSource, Recipe
from wegeft_cli.runs.train import train

VALIDATED: dict[str, Any] = {"data": {"validation_fraction": 0.4}}
LORA: dict[str, Any] = {"adapter": {"type": "lora"}}
WEIGHTED: dict[str, Any] = {
    "data": {"train": [{"path": f"{{folder}}/{n}.jsonl", "weight": 1} for n in ("train", "test")]}
}
STREAMED: dict[str, Any] = {"data": {"streaming": True}, "train": {"max_steps": 3}}
SCORED: dict[str, Any] = {
    "data": {"validation_fraction": 0.4},
    "train": {"eval_steps": 1, "learning_rate": 1e-30},
    "eval": {"data_dir": "{data}", "limit": 1, "max_new_tokens": 2},
}

# Where a changed key must show: a field of `observe`.
FACTORS, SHAPES, GROUPS, SIDE = "factors", "shapes", "groups", "side"
DATA, METRICS, LINES, EVALS, SAVED = "data", "metrics", "lines", "evals", "saved"
STEPS, CALLS, FOLDER = "num_steps", "layer calls", "folder"
SCORES, BEST, KEPT, FILES = "scores", "best_metric", "adapter_step", "files"

CASES: list[tuple[str, str] | tuple[str, str, dict[str, Any]]] = [
    ("seed=8", FACTORS),
    ("output_dir={dir}/elsewhere", FOLDER),
    ("model.name_or_path={other}", FACTORS),
    ("model.dtype=bfloat16", FACTORS),
    ("model.attn_implementation=eager", FACTORS),
    ("model.load_in_4bit=true", FACTORS),
    ("model.load_in_8bit=true", FACTORS),
    ("model.quant_method=torchao", FACTORS, {"model": {"load_in_8bit": True}}),
    ("adapter.type=lora", GROUPS),
    ("adapter.r=2", SHAPES),
    ("adapter.alpha=3", FACTORS),
    ("adapter.scale_rule=rank_width", FACTORS),
    ("adapter.match_params=448", SHAPES),
    ("adapter.target_modules=[q_proj]", GROUPS),
    ("adapter.target_modules='.*layers[.]0[.].*(q|k)_proj'", GROUPS),
    ("adapter.target_modules=all-linear", FACTORS, {"adapter": {"share": "input_dim"}}),
    ("adapter.share=none", GROUPS),
    ("adapter.share=input_dim", GROUPS),
    ("adapter.groups={{both: [q_proj, v_proj], last: [down_proj]}}", GROUPS),
    ("adapter.side=output", SIDE),
    ("adapter.dropout=0.3", FACTORS),
    ("adapter.init=psi_zero", FACTORS),
    ("adapter.view=weight", FACTORS),
    ("adapter.modules_to_save=[lm_head]", GROUPS),
    ("adapter.modules_to_save=[embed_tokens, norm]", GROUPS, LORA),
    ("adapter.init_from={earlier}", FACTORS),
    ("adapter.init_from={earlier}", FACTORS, LORA),
    ("adapter.peft={{lora_dropout: 0.5}}", FACTORS, LORA),
    ("adapter.peft={{use_rslora: true}}", FACTORS, LORA),
    ("adapter.r=2", SHAPES, LORA),
    ("adapter.alpha=3", FACTORS, LORA),
    ("data.train[0].path={rows}", DATA),
    ("data.train[0].split=test", DATA, {"data": {"train": [{"path": "{folder}"}]}}),
    ("data.train[0].format=text", DATA),
    ("data.train[0].columns={{completion: text}}", FACTORS),
    ("data.train[0].limit=5", DATA),
    ("data.validation=[{{path: {rows}}}]", EVALS),
    ("data.validation_fraction=0.2", EVALS),
    ("data.validation_split=random", EVALS, VALIDATED),
    (
        "data.validation_seed=3",
        EVALS,
        {"data": {"validation_fraction": 0.4, "validation_split": "random"}},
    ),
    ("data.template=question_answer", DATA),
    ("data.loss_on=all", DATA),
    ("data.max_length=9", DATA),
    ("data.packing=bfd", STEPS),
    ("data.train[0].weight=9", FACTORS, WEIGHTED),
    ("data.streaming=true", DATA, {"train": {"max_steps": 3}}),
    ("data.shuffle_buffer_size=2", FACTORS, STREAMED),
    ("data.shuffle=false", FACTORS),
    ("train.per_device_train_batch_size=2", STEPS),
    ("train.per_device_eval_batch_size=1", CALLS, VALIDATED),
    ("train.gradient_accumulation_steps=2", STEPS),
    ("train.num_train_epochs=2", STEPS),
    ("train.max_steps=4", STEPS),
    ("train.learning_rate=0.02", METRICS),
    ("train.lr_ratio=4", FACTORS),
    ("train.lr_scheduler_type=cosine", METRICS),
    ("train.lr_scheduler_type=constant", METRICS),
    ("train.lr_scheduler_type=constant_with_warmup", METRICS),
    ("train.lr_scheduler_type=cosine_with_restarts", METRICS),
    ("train.lr_scheduler_type=polynomial", METRICS),
    ("train.lr_scheduler_type=inverse_sqrt", METRICS, {"train": {"warmup_steps": 1}}),
    ("train.lr_scheduler_type=warmup_stable_decay", METRICS),
    (
        "train.lr_scheduler_kwargs={{min_lr_rate: 0.5}}",
        METRICS,
        {
            "train": {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            }
        },
    ),
    ("train.warmup_ratio=0.5", METRICS),
    ("train.warmup_steps=2", METRICS),
    ("train.weight_decay=0.5", FACTORS),
    ("train.max_grad_norm=0.01", FACTORS, {"train": {"optim": "sgd"}}),
    ("train.max_grad_norm=0", FACTORS, {"train": {"optim": "sgd"}}),
    ("train.optim=sgd", FACTORS),
    ("train.optim=adafactor", FACTORS),
    ("train.optim=lion_8bit", FACTORS),
    ("train.optim=ademamix", FACTORS),
    ("train.optim_args={{momentum: 0.9}}", FACTORS, {"train": {"optim": "sgd"}}),
    ("train.optim=adagrad", FACTORS),
    ("train.optim=rmsprop", FACTORS),
    ("train.adam_beta1=0.5", FACTORS),
    ("train.adam_beta2=0.9", FACTORS),
    ("train.adam_epsilon=0.1", FACTORS),
    ("train.neftune_noise_alpha=5", FACTORS),
    ("train.ema_decay=0.5", FACTORS),
    ("train.mixed_precision=bf16", FACTORS),
    ("train.mixed_precision=fp16", FACTORS),
    ("train.gradient_checkpointing=true", CALLS),
    ("train.gradient_checkpointing=true", CALLS, LORA),
    ("train.group_by_length=true", FACTORS),
    ("train.max_tokens_per_pass=20", CALLS),
    ("train.eval_steps=1", EVALS, VALIDATED),
    ("train.save_steps=2", SAVED),
    ("train.save_total_limit=1", SAVED, {"train": {"save_steps": 1}}),
    ("train.logging_steps=2", LINES),
    (
        "train.early_stopping_patience=1",
        STEPS,
        {**VALIDATED, "train": {"eval_steps": 1, "learning_rate": 1e-30, "num_train_epochs": 2}},
    ),
    ("train.eval_tasks=[boolq]", SCORES, SCORED),
    (
        "train.metric_for_best_model=eval_boolq",
        BEST,
        {**SCORED, "train": {**SCORED["train"], "eval_tasks": ["boolq"]}},
    ),
    ("train.load_best_model_at_end=true", KEPT, SCORED),
    ("logging.report_to=tensorboard", FILES),
    ("logging.sample_prompts=[why]", FILES),
]

# One run for each key takes half a minute: these run with the fast tests, the others with the slow.
FAST = {
    "seed", "model.dtype", "adapter.type", "adapter.alpha", "adapter.share", "adapter.side",
    "adapter.dropout", "adapter.init", "adapter.modules_to_save",
    "data.train[0].limit", "data.loss_on", "data.max_length",
    "data.shuffle", "train.gradient_accumulation_steps", "train.learning_rate",
    "train.warmup_ratio", "train.weight_decay", "train.ema_decay", "train.lr_ratio",
    "train.max_grad_norm", "train.adam_beta2", "train.mixed_precision",
    "train.gradient_checkpointing", "train.eval_steps", "train.save_total_limit",
}  # fmt: skip

# Keys that train does not read, or of which one value alone is accepted, with the reason.
NOT_HERE = {
    "task": "test_image_classification.py, test_sequence_classification.py",
    **dict.fromkeys(
        (
            "model.drop_path_rate",
            "data.train[].image_dir",
            "data.test",
            "data.image_size",
            "data.image_transform",
        ),
        "a classifier's: test_image_classification.py",
    ),
    "data.problem_type": "a classifier's: test_sequence_classification.py",
    "model.revision": "a hub's; a folder has none",
    "model.special_tokens": "test_special_tokens.py",
    "model.trust_remote_code": "tests/models holds that it is off",
    "data.train[].name": "a hub data set's",
    "data.cache_dir": "changes no row: tests/data/test_cache",
    **dict.fromkeys(
        ("data.chat_template_kwargs", "data.system_turn", "data.system"),
        "need a chat template: tests/data/test_reasoning_templates.py, test_trained_form.py",
    ),
    "data.train[].field": "a JSON document's: tests/data/test_sources.py",
    **dict.fromkeys(
        ("train.eval_strategy", "train.save_strategy", "train.lr_scheduler_steps"),
        "test_train.py holds what they change",
    ),
    "train.max_skipped_steps": "tests/training/test_skip.py holds it; no row here is bad",
    "train.strategy": "needs processes: tests/distributed/test_strategies.py",
    "train.fsdp_size": "needs processes: tests/distributed/test_strategies.py",
    "train.check_steps": "needs processes: tests/distributed/test_strategies.py",
    "train.ddp_timeout": "how long a process waits: tests/distributed/test_launch.py",
    "train.use_liger_kernel": "needs a GPU: tests/interop/test_liger.py",
    "train.compile": "the same function in other kernels: tests/training/test_offload.py",
    "train.activation_offload": "moves, and computes the same: tests/training/test_offload.py",
    "sweep": "read by sweep: test_sweep",
    **dict.fromkeys(
        ("logging.project", "logging.run_name"), "names in the trackers: test_trackers.py"
    ),
    **dict.fromkeys(
        (f"eval.{field.name}" for field in fields(Recipe().eval)), "read by eval: test_evaluate"
    ),
}


def list_keys(section: Any, prefix: str = "") -> Iterator[str]:
    for field in fields(section):
        value = getattr(section, field.name)
        key = f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from list_keys(value, f"{key}.")
        elif key == "data.train":
            yield from (f"data.train[].{part.name}" for part in fields(DataSource()))
        else:
            yield key


def test_every_key_of_the_schema_is_tried_or_excused():
    assert {case[0].partition("=")[0] for case in CASES} >= FAST
    tried = {re.sub(r"\[\d+\]", "[]", case[0].partition("=")[0]) for case in CASES}
    assert tried | NOT_HERE.keys() == set(list_keys(Recipe()))
    assert not tried & NOT_HERE.keys()


def observe(recipe, overrides=()) -> dict[str, Any]:
    """Train, and gather all that can be seen of it from outside."""
    calls = 0

    def count(module, args):
        nonlocal calls
        calls += isinstance(module, LlamaMLP)

    handle = register_module_forward_pre_hook(count)
    try:
        result = train(recipe, overrides)
    finally:
        handle.remove()
    run_dir = result.run_dir
    tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    data = json.loads((run_dir / "run.json").read_text())["data"]
    seen = {
        "factors": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "shapes": sorted(tuple(tensor.shape) for tensor in tensors.values()),
        "groups": sorted(tensors),
        "side": config.get("side"),
        "data": {k: v for k, v in data.items() if k != "warnings"},
        "metrics": [(x["learning_rate"], x["loss"]) for x in lines if "loss" in x],
        "lines": [x["step"] for x in lines if "loss" in x],
        "evals": [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x],
        "saved": sorted(path.name for path in (run_dir / "checkpoints").iterdir()),
        "num_steps": result.num_steps,
        "layer calls": calls,
        "folder": str(run_dir),
        "scores": [x["eval_boolq"] for x in lines if "eval_boolq" in x],
        "best_metric": result.best_metric,
        "adapter_step": result.adapter_step,
        "files": sorted(path.name for path in run_dir.iterdir()),
    }
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    return seen


@pytest.fixture(scope="module")
def seen_before() -> dict[str, dict[str, Any]]:
    """What was observed without the change, by the settings that were used."""
    return {}


def merge(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    both = {**one, **two}
    for key in one.keys() & two.keys():
        both[key] = {**one[key], **two[key]}
    return both


def marked() -> Iterator[Any]:
    """The cases; but for the first of each key in FAST they are slow."""
    seen: set[str] = set()
    for number, case in enumerate(CASES):
        key = case[0].partition("=")[0]
        is_fast = key in FAST and key not in seen
        seen.add(key)
        yield pytest.param(
            case, id=f"{number}-{case[0]}", marks=() if is_fast else (pytest.mark.slow,)
        )


@pytest.mark.parametrize("case", list(marked()))
def test_each_key_changes_what_can_be_seen(
    write_recipe, build_llama_dir, unequal_rows, tmp_path, data_dir, seen_before, case
):
    override, where, settings = case if len(case) == 3 else (*case, {})
    rows = [{**row, "text": "in other words " * 2} for row in unequal_rows]
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, part in (("train", rows[:6]), ("test", rows[6:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    places = {
        "dir": tmp_path,
        "folder": folder,
        "rows": folder / "test.jsonl",
        "other": build_llama_dir(seed=1) if "{other}" in override else "",
    }
    base = merge({"train": {"num_train_epochs": 1}}, settings)
    base = json.loads(
        json.dumps(base).replace("{folder}", str(folder)).replace("{data}", str(data_dir))
    )
    if "{earlier}" in override:
        places["earlier"] = train(write_recipe("earlier", rows=rows, **base), ["seed=9"]).run_dir
    before = seen_before.get(repr(settings))
    if before is None or where == "folder":
        before = seen_before[repr(settings)] = observe(write_recipe("base", rows=rows, **base))
    recipe = write_recipe("changed" if where != "folder" else "base", rows=rows, **base)
    after = observe(recipe, [override.format(**places)])
    assert after[where] != before[where]


def test_the_fused_optimizer_is_the_plain_one_in_other_kernels(write_recipe, read_metrics):
    plain = train(write_recipe("plain")).run_dir
    fused = train(write_recipe("fused"), ["train.optim=adamw_torch_fused"]).run_dir
    for one, two in zip(read_metrics(plain), read_metrics(fused), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)  # float32, other roundings


def test_views_train_alike(write_recipe, read_metrics):
    lines = {
        view: read_metrics(train(write_recipe(view, adapter={"view": view})).run_dir)
        for view in ("auto", "activation", "weight")
    }
    for view in ("activation", "weight"):
        for one, two in zip(lines["auto"], lines[view], strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)  # float32, other roundings
