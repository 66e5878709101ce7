"""A stopped run that goes on ends in the bits of a run that was never stopped."""

from dataclasses import asdict
from typing import get_args

import pytest
import torch
from loop_hooks import LoopHooks

from wegeft_cli.artifacts.checkpoint import load_checkpoint, save_checkpoint
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import Optimizer, Scheduler
from wegeft_cli.training.neftune import add_neftune
from wegeft_cli.training.scheduler import build_schedule
from wegeft_cli.training.snapshot import Progress, Snapshot, TrainingState

NUM_STEPS, STOP = 7, 4

# Names and settings for the `run` fixture. The factors of these tests are small, so that an 8-bit
# optimizer keeps its state in 8 bits only when it is told to.
SMALL = {"min_8bit_size": 1}
OPTIMIZERS = {
    name: {"optim": name, **({"optim_args": SMALL} if name.endswith("8bit") else {})}
    for name in get_args(Optimizer)
    if not name.startswith("paged_")  # these need a GPU
}
SCHEDULES = {
    name: {"schedule": name, "schedule_args": options, "warmup_steps": 2}
    for name, options in {
        **{name: {} for name in get_args(Scheduler)},
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr": 0.01},
        "cosine_with_restarts": {"num_cycles": 2},
        "polynomial": {"power": 2.0, "lr_end": 0.01},
        "warmup_stable_decay": {"num_decay_steps": 3},
    }.items()
}
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01}
OTHERS = {
    "momentum": {"optim_args": {"momentum": 0.9, "nesterov": True}},
    "amsgrad": {**ADAM, "optim_args": {"amsgrad": True}},
    "adafactor with momentum": {"optim": "adafactor", "optim_args": {"beta1": 0.9}},
    "average": {**ADAM, "ema_decay": 0.9, "eval_steps": 2},
    "ratio of rates": {**ADAM, "lr_ratio": 8.0, "schedule": "cosine"},
    "lines of three steps": {**ADAM, "logging_steps": 3},
    "clipping": {**ADAM, "max_grad_norm": 0.01},
    "fp16": {**ADAM, "mixed_precision": "fp16", "ema_decay": 0.5},
    "bf16": {**ADAM, "mixed_precision": "bf16"},
    "validation": {**ADAM, "eval_steps": 1, "early_stopping_patience": 50},
}
CASES = {**OPTIMIZERS, **SCHEDULES, **OTHERS}


def comparable(lines):
    """What a line says of the training, not of the time and memory that it took; NaN is NaN."""
    measured = ("tokens_per_second", "step_seconds", "peak_memory_gib")
    return [{k: repr(v) for k, v in asdict(line).items() if k not in measured} for line in lines]


@pytest.fixture
def compare(make_model, make_source, run, rows, tmp_path):
    """A function: train whole, and with a stop in between; give the snapshots at both ends."""

    def compare_(settings, *, prepare=lambda model: None, data=None, **model_settings):
        def start(hooks, resume_from=None):
            model = make_model(dropout=0.2, view="weight", **model_settings)
            prepare(model)
            torch.manual_seed(5)
            source = make_source(
                num_steps=NUM_STEPS, rows=data or rows, micro_batch=2, validation=rows[5:]
            )
            result = run(model, source, hooks=hooks, resume_from=resume_from, **settings)
            return model, source, result

        runs = {}
        for name in ("whole", "first", "second"):
            lines, saved, steps, told = [], [], [], {}
            hooks = LoopHooks(
                on_step=lambda step, loss, into=steps: into.append(step),
                on_skip=lambda step, loss, norm, into=steps: into.append(step),
                on_metrics=lines.append,
                on_validation=told.__setitem__,
                on_save=lambda *given, into=saved: into.append(given),
                should_stop=lambda name=name, steps=steps: (
                    name == "first" and len(steps) == STOP  # in the middle of the next step
                ),
            )
            resume_from = None
            if name == "second":
                step, snapshot, _ = runs["first"]["saved"][-1]
                # By way of the disk, which takes tensors and JSON alone.
                path = save_checkpoint(
                    tmp_path, step, tensors=snapshot.tensors, state=snapshot.state, keep=None
                )
                checkpoint = load_checkpoint(path)
                resume_from = Snapshot(checkpoint.tensors, checkpoint.state)
            model, source, result = start(hooks, resume_from)
            runs[name] = {
                "lines": comparable(lines), "saved": saved, "told": told,
                "model": model, "source": source, "result": result,
            }  # fmt: skip
        whole, first, second = (runs[name] for name in ("whole", "first", "second"))
        assert (first["result"].status, first["result"].num_steps) == ("interrupted", STOP)
        assert second["source"].sought == [STOP]
        assert whole["source"].sought == []
        assert [*first["lines"], *second["lines"]] == whole["lines"]
        assert {**first["told"], **second["told"]} == whole["told"]
        kept = dict(second["model"].wegeft.named_parameters())
        assert len(kept) == 10
        for name, parameter in whole["model"].wegeft.named_parameters():
            assert torch.equal(parameter, kept[name]), name
        ends = [run["saved"][-1][1] for run in (whole, second)]
        assert repr(ends[0].state) == repr(ends[1].state)
        for stem, tensors in ends[0].tensors.items():
            assert tensors.keys() == ends[1].tensors[stem].keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, ends[1].tensors[stem][name]), f"{stem} {name}"
        for key in ("num_steps", "final_loss", "best_step", "best_metric", "num_skipped"):
            assert getattr(whole["result"], key) == getattr(second["result"], key)
        return runs

    return compare_


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(compare, case):
    settings = {"learning_rate": 0.05, **CASES[case]}
    end = compare(settings)["second"]["saved"][-1][1]
    if case.endswith("8bit"):
        kinds = {tensor.dtype for tensor in end.tensors["optimizer"].values()}
        assert torch.uint8 in kinds
    assert ("ema" in end.tensors) == ("ema_decay" in settings)
    assert end.state["source"] == {"place": 4 * NUM_STEPS}


def test_resume_is_exact_with_noise_on_the_embeddings(compare):
    compare(ADAM, prepare=lambda model: add_neftune(model, 5.0))


@pytest.mark.parametrize("logging_steps", [1, 3, 4])
@pytest.mark.parametrize("bad_step", [1, STOP, STOP + 1])  # before, at and after the stop
def test_resume_is_exact_around_a_skipped_step(
    compare, make_model, poison, bad_step, logging_steps
):
    # Four rows a step: the rows are made as many as the steps take, and one of them is bad.
    data = (poison(make_model()) * 4)[: 4 * NUM_STEPS]
    data[4 * (bad_step - 1) + 2] = poison(make_model(), 2)[2]
    settings = {**ADAM, "ema_decay": 0.8, "schedule": "linear", "logging_steps": logging_steps}
    runs = compare(settings, prepare=lambda model: poison(model), data=data)
    assert runs["second"]["result"].num_skipped == 1


def test_resume_is_exact_after_a_step_that_overflowed(compare):
    """The loss scaler's scale and count go on too."""

    def enlarge(model):
        with torch.no_grad():
            model.lm_head.weight.mul_(300)

    settings = {"mixed_precision": "fp16", "learning_rate": 1e-6, "schedule": "linear"}
    runs = compare(settings, prepare=enlarge)
    scales = [run["saved"][-1][1].state["scaler"]["scale"] for run in runs.values()]
    assert scales[0] == scales[2] < 65536


def test_patience_and_the_best_step_go_on(make_model, make_source, run):
    """Three bad validations: one before the stop, two after it."""
    figures = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.6, 5: 0.7, 6: 1.0}
    settings = {
        "eval_steps": 1, "early_stopping_patience": 3, "metric_for_best_model": "eval_task",
        "greater_is_better": True,
    }  # fmt: skip
    results, saved = [], []
    for stop in (3, None):
        asked = []

        def should_stop(asked=asked, stop=stop):
            asked.append(None)
            return len(asked) == stop

        hooks = LoopHooks(
            evaluate=lambda step: {"eval_task": figures[step]},
            on_save=lambda *given: saved.append(given),
            should_stop=should_stop,
        )
        resume_from = saved[-1][1] if saved else None
        source = make_source(num_steps=6)
        results.append(run(make_model(), source, hooks=hooks, resume_from=resume_from, **settings))
    first, second = results
    assert (first.status, first.num_steps, first.best_step) == ("interrupted", 3, 2)
    assert (second.status, second.num_steps, second.stopped_early) == ("finished", 5, True)
    assert (second.best_step, second.best_metric) == (2, 0.9)
    assert list(second.validation) == [4, 5]


def test_other_parameters_are_refused(make_model, make_source, run):
    saved = []
    hooks = LoopHooks(on_save=lambda *given: saved.append(given))
    run(make_model(), make_source(num_steps=1), hooks=hooks)
    snapshot = saved[-1][1]
    snapshot.tensors["parameters"].popitem()
    with pytest.raises(UserError, match="other parameters"):
        run(make_model(), make_source(num_steps=2), resume_from=snapshot)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "warmup_stable_decay"])
def test_a_prolonged_run_takes_the_longer_schedule_at_once(schedule):
    def make(num_steps):
        parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in "ab"}
        groups = [
            {"params": [p], "lr": lr} for p, lr in zip(parameters.values(), (1, 3), strict=True)
        ]
        optimizer = torch.optim.AdamW(groups)
        return parameters, optimizer, build_schedule(schedule, optimizer, num_steps=num_steps)

    def walk(parts, num_steps):
        rates = []
        for _ in range(num_steps):
            rates.append([group["lr"] for group in parts[1].param_groups])
            parts[1].step()
            parts[2].step()
        return rates

    processes, scaler = Processes.single(), torch.amp.GradScaler("cpu", enabled=False)
    short, whole, longer = make(NUM_STEPS), make(2 * NUM_STEPS), make(2 * NUM_STEPS)
    walk(short, STOP + 1)
    expected = walk(whole, 2 * NUM_STEPS)[STOP + 1 :]
    snapshot = TrainingState(*short, scaler).capture(Progress(step=STOP + 1), processes)
    TrainingState(*longer, scaler).restore(snapshot, processes)
    assert longer[2].get_last_lr() == expected[0]
    assert walk(longer, 2 * NUM_STEPS - STOP - 1) == expected
