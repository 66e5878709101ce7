"""One step is one gradient, however it is cut; what goes wrong is told, and stops the run."""

import math

import pytest
import torch
from loop_hooks import LoopHooks

from wegeft_cli.data.batches.ahead import StepAhead
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import MachineError
from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.training.gradients import clip_gradients, read_step, sum_gradients
from wegeft_cli.training.trainer import Trainer

# Sums of the same float64 numbers in another order; the loss itself rounds each logit to float32,
# the same way however the rows are cut, but for the odd logit that lies on the edge.
SAME_SUMS = 1e-7
# The same in float32, where every product of a batch of another shape rounds by itself.
FLOAT32 = 1e-5
CUTS = [(4, 1), (2, 2), (1, 4)]  # rows in a forward pass, forward passes in a step


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, SAME_SUMS), (torch.float32, FLOAT32)]
)
def test_accumulation_is_exact_for_unequal_token_counts(
    make_model, make_source, run, factors_of, dtype, tolerance
):
    start = factors_of(make_model(dtype=dtype))
    moves = []
    for micro_batch, _ in CUTS:
        model = make_model(dtype=dtype)
        run(model, make_source(micro_batch=micro_batch))
        moves.append(factors_of(model) - start)
    for move in moves[1:]:
        assert (move - moves[0]).abs().max() < tolerance * moves[0].abs().max()


def test_the_step_is_the_gradient_of_the_mean_over_all_labels(
    make_model, make_source, run, factors_of, rows, plain_mean_loss
):
    """And not the mean of the micro-batches' means, which these rows tell apart."""
    reference = make_model(dtype=torch.float64)
    start = factors_of(reference)
    plain_mean_loss(reference, rows[:4]).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in reference.wegeft.parameters()])
    mean_of_means = make_model(dtype=torch.float64)
    for row in rows[:4]:
        (plain_mean_loss(mean_of_means, [row]) / 4).backward()
    wrong = torch.cat([p.grad.reshape(-1) for p in mean_of_means.wegeft.parameters()])

    model = make_model(dtype=torch.float64)
    losses = []
    hooks = LoopHooks(on_step=lambda step, loss: losses.append(loss))
    run(model, make_source(num_steps=1, micro_batch=1), learning_rate=1.0, hooks=hooks)
    moved = start - factors_of(model)
    size = expected.abs().max()
    assert (moved - expected).abs().max() < 2e-6 * size  # the loss rounds logits to float32
    assert (wrong - expected).abs().max() > 1e-2 * size
    assert losses == [pytest.approx(plain_mean_loss(make_model(), rows[:4]).item(), rel=FLOAT32)]


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_clipping_bounds_the_step_and_tells_the_norm_before(
    make_model, make_source, run, factors_of, limit
):
    model = make_model(dtype=torch.float64)
    start = factors_of(model)
    lines = []
    source = make_source(num_steps=1)
    run(
        model,
        source,
        learning_rate=1.0,
        hooks=LoopHooks(on_metrics=lines.append),
        max_grad_norm=limit,
    )
    free = make_model(dtype=torch.float64)
    run(free, source, learning_rate=1.0)
    norm = (factors_of(free) - start).norm().item()
    assert lines[0].grad_norm == pytest.approx(norm, rel=SAME_SUMS)
    wanted = limit if 0 < limit < norm else norm
    # torch adds 1e-6 to the norm before it divides.
    assert (factors_of(model) - start).norm().item() == pytest.approx(wanted, rel=1e-5)


def test_a_line_of_metrics_sums_up_its_steps(make_model, make_source, run):
    lines, losses = [], []
    hooks = LoopHooks(on_step=lambda step, loss: losses.append(loss), on_metrics=lines.append)
    source = make_source(num_steps=5, rows_per_step=3, micro_batch=2)
    result = run(make_model(), source, hooks=hooks, logging_steps=2)
    assert [line.step for line in lines] == [2, 4, 5]
    labels = [source.num_label_tokens(step) for step in range(5)]
    for line, steps in zip(lines, [(0, 1), (2, 3), (4,)], strict=True):
        mean = sum(losses[s] * labels[s] for s in steps) / sum(labels[s] for s in steps)
        assert line.loss == pytest.approx(mean, rel=1e-12)
        done = steps[-1] + 1
        assert line.num_tokens == sum(source.num_tokens(s) for s in range(done))
        assert line.epoch == source.epoch_at(done)
        assert line.learning_rate == 0.1
        assert line.grad_norm > 0
        assert line.tokens_per_second > 0
        assert line.step_seconds > 0
        assert line.peak_memory_gib > 0
    assert result.final_loss == lines[-1].loss
    assert (result.status, result.num_steps) == ("finished", 5)


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_mixed_precision_learns_and_keeps_float32_factors(
    make_model, make_source, run, factors_of, mixed_precision
):
    models, losses = {}, {}
    source = make_source(num_steps=10, rows_per_step=8, micro_batch=4)
    for name in ("none", mixed_precision):
        models[name] = make_model(fresh=True)
        losses[name] = []
        hooks = LoopHooks(on_step=lambda step, loss, into=losses[name]: into.append(loss))
        run(models[name], source, optim="adamw_torch", learning_rate=0.01, hooks=hooks,
            mixed_precision=name)  # fmt: skip
    model, told = models[mixed_precision], losses[mixed_precision]
    assert {p.dtype for p in model.wegeft.parameters()} == {torch.float32}
    assert told[-1] < 0.8 * told[0]
    assert not torch.equal(
        factors_of(model), factors_of(models["none"])
    )  # it did compute in 16 bits
    # 8 bits of mantissa in bfloat16 (11 in float16), averaged over 37 labels.
    assert told[-1] == pytest.approx(losses["none"][-1], rel=0.05)


def test_fp16_skips_a_step_whose_gradient_overflows(make_model, make_source, run, factors_of):
    """The scaler begins at 65,536 and halves until the gradients fit into 16 bits."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
    rate = 1e-6
    moves, before = [], factors_of(model)

    def on_step(step, loss):
        nonlocal before
        moves.append(not torch.equal(factors_of(model), before))
        before = factors_of(model)

    lines = []
    hooks = LoopHooks(on_step=on_step, on_metrics=lines.append)
    settings = {"mixed_precision": "fp16", "learning_rate": rate, "schedule": "linear"}
    run(model, make_source(num_steps=12), hooks=hooks, **settings)
    assert moves[0] is False
    assert moves[-1] is True
    assert [math.isfinite(line.grad_norm) for line in lines] == moves
    # The schedule waits for a step that counts, as in transformers.
    waited = moves.index(True)
    assert [line.learning_rate for line in lines[: waited + 1]] == [rate] * (waited + 1)
    assert lines[waited + 1].learning_rate < rate


class Counter:
    num_calls = 0

    def __call__(self, *_):
        self.num_calls += 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(make_model, make_source, run, factors_of, dropout):
    moved = []
    for checkpointing in (False, True):
        model = make_model(dropout=dropout)
        if checkpointing:
            enable_checkpointing(model)
        counter = Counter()
        model.model.layers[0].mlp.register_forward_pre_hook(counter)
        torch.manual_seed(5)
        run(model, make_source(num_steps=2, micro_batch=2))
        # Two steps of two batches, and the loss's own look at the head.
        assert counter.num_calls == 1 + (8 if checkpointing else 4)
        moved.append(factors_of(model) - factors_of(make_model()))
    assert (moved[1] - moved[0]).abs().max() < FLOAT32 * moved[0].abs().max()


@pytest.mark.parametrize("mixed_precision", ["none", "bf16", "fp16"])
def test_nan_in_a_weight_stops_before_the_factors_are_touched(
    make_model, make_source, run, factors_of, mixed_precision
):
    model = make_model()
    start = factors_of(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    saved = []
    hooks = LoopHooks(on_save=lambda step, snapshot, is_best: saved.append(step))
    with pytest.raises(MachineError, match="diverged at step 1: loss nan") as caught:
        run(model, make_source(), hooks=hooks, mixed_precision=mixed_precision, save_steps=1,
            max_skipped_steps=0)  # fmt: skip
    assert "learning_rate" in caught.value.hint
    assert saved == []
    assert torch.equal(factors_of(model), start)


def test_validation_loss_is_the_plain_mean_and_leaves_training_alone(
    make_model, make_source, run, factors_of, rows, plain_mean_loss
):
    told = {}
    hooks = LoopHooks(on_validation=told.__setitem__)
    model = make_model(dropout=0.2)
    torch.manual_seed(1)
    result = run(model, make_source(num_steps=3, validation=rows[4:]), hooks=hooks, eval_steps=2)
    assert list(told) == [2, 3]
    assert result.validation == told
    assert model.training
    model.eval()
    expected = plain_mean_loss(model.double(), rows[4:]).item()
    assert told[3]["eval_loss"] == pytest.approx(expected, rel=FLOAT32)
    without = make_model(dropout=0.2)
    torch.manual_seed(1)
    assert run(without, make_source(num_steps=3), eval_steps=2).validation == {}
    assert torch.equal(factors_of(without), factors_of(model.float()))


def test_early_stopping_waits_for_its_patience(make_model, make_source, run, rows):
    saved = []
    hooks = LoopHooks(on_save=lambda step, snapshot, is_best: saved.append(step))
    source = make_source(num_steps=50, validation=rows[4:])
    # A rate of zero never betters the first validation, at step 2; patience lasts for two more.
    settings = {"learning_rate": 0.0, "eval_steps": 2, "early_stopping_patience": 2}
    result = run(make_model(), source, hooks=hooks, **settings)
    assert (result.num_steps, result.stopped_early, result.status) == (6, True, "finished")
    assert list(result.validation) == [2, 4, 6]
    assert saved == [6]


def test_early_stopping_lets_a_learning_run_go_on(make_model, make_source, run, rows):
    source = make_source(num_steps=6, validation=rows[:4], rows=rows[:4])
    result = run(make_model(), source, eval_steps=1, early_stopping_patience=1, learning_rate=0.01)
    assert (result.num_steps, result.stopped_early) == (6, False)


def test_a_wish_to_stop_saves_and_leaves(make_model, make_source, run):
    steps, saved = [], []
    hooks = LoopHooks(
        on_step=lambda step, loss: steps.append(step),
        on_save=lambda step, snapshot, is_best: saved.append(step),
        should_stop=lambda: len(steps) == 1,  # asked in the second step, before it is counted
    )
    result = run(make_model(), make_source(num_steps=9), hooks=hooks, logging_steps=5)
    assert (result.status, result.num_steps) == ("interrupted", 2)
    assert saved == [2]
    assert math.isfinite(result.final_loss)


@pytest.mark.parametrize("num_done", [0, 2])
def test_a_wish_to_stop_leaves_a_step_between_its_passes(make_model, make_source, run, num_done):
    """The step counts as not begun; what was saved already is not saved again."""
    steps, saved, passes = [], [], []
    hooks = LoopHooks(
        on_step=lambda step, loss: steps.append(step),
        on_save=lambda *given: saved.append(given),
        should_stop=lambda: len(steps) == num_done,
    )
    model = make_model()
    learned = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    learned.register_post_accumulate_grad_hook(passes.append)
    result = run(model, make_source(num_steps=4, micro_batch=1), hooks=hooks)
    assert (result.status, result.num_steps, len(steps)) == ("interrupted", num_done, num_done)
    assert len(passes) == 4 * num_done + 1
    assert [step for step, _, _ in saved] == [num_done]
    assert all(parameter.grad is None for parameter in model.parameters())

    saved_again = []
    hooks = LoopHooks(on_save=lambda *given: saved_again.append(given), should_stop=lambda: True)
    source = make_source(num_steps=4, micro_batch=1)
    again = run(make_model(), source, hooks=hooks, resume_from=saved[0][1])
    assert (again.status, again.num_steps, saved_again) == ("interrupted", num_done, [])


def test_a_stop_at_the_last_step_is_no_interruption(make_model, make_source, run):
    hooks = LoopHooks(should_stop=lambda: True)
    assert run(make_model(), make_source(num_steps=1), hooks=hooks).status == "finished"


def test_saves_come_as_often_as_told(make_model, make_source, run):
    for save_steps, expected in [(0, [7]), (3, [3, 6, 7]), (7, [7]), (1, [1, 2, 3, 4, 5, 6, 7])]:
        saved = []
        hooks = LoopHooks(on_save=lambda step, snapshot, is_best, into=saved: into.append(step))
        run(make_model(), make_source(num_steps=7), hooks=hooks, save_steps=save_steps)
        assert saved == expected


def test_batches_made_by_a_thread_train_the_same_bits(
    make_model, make_source, run, factors_of, monkeypatch
):
    plain = make_model()
    expected = run(plain, make_source(num_steps=3, micro_batch=2))
    prepare, made = Trainer.__post_init__, []

    def make(trainer, step):  # as for a GPU, but without page-locked memory
        made.append(step)
        return list(trainer.source.micro_batches(step))

    def prepare_ahead(trainer):
        prepare(trainer)
        trainer._ahead = StepAhead(lambda step: make(trainer, step), trainer.source.num_steps)

    monkeypatch.setattr(Trainer, "__post_init__", prepare_ahead)
    model = make_model()
    assert run(model, make_source(num_steps=3, micro_batch=2)) == expected
    assert torch.equal(factors_of(model), factors_of(plain))
    assert made == [0, 1, 2]


def test_a_step_waits_for_the_device_once():
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    alone = Processes(0, 1, torch.device("cpu"))
    num_reads, flags = [], (True, False, False)

    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                num_reads.append(1)
            return func(*args, **(kwargs or {}))

    with Reads():
        sums = sum_gradients(parameters, torch.tensor(5.0), alone, flags=flags)
        norm = clip_gradients(parameters, 1.0)
    assert num_reads == []  # all of it is computed before anything is read
    step = read_step(sums, norm, flags)
    assert (step.loss_sum, step.stop, step.is_cut, step.is_short) == (5.0, *flags)
    assert step.grad_norm == pytest.approx(math.sqrt(7 * 4))
