"""A tiny Llama that learns, and batches from plain rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from loop_hooks import LoopHooks
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli.data.batches.collate import Batch, collate_rows
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.training.loop_settings import LoopResult, LoopSettings
from wegeft_cli.training.loss import CausalLoss
from wegeft_cli.training.optimizer import build_optimizer
from wegeft_cli.training.scheduler import build_schedule
from wegeft_cli.training.snapshot import Snapshot
from wegeft_cli.training.trainer import Trainer

Row = tuple[np.ndarray, np.ndarray]
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    """A function: a two-layer Llama with generators far from zero, or fresh ones."""

    def make(*, dtype=torch.float32, fresh=False, dropout=0.0, view="auto") -> LlamaForCausalLM:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.2,
            )
        )
        generators = inject_generators(
            model, rank=4, target_modules=FIVE, dropout=dropout, view=view
        )
        if not fresh:
            random = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in generators.parameters():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
        return model.to(dtype)

    return make


@pytest.fixture
def rows() -> list[Row]:
    """Eight rows of 5 to 31 tokens, of which 1 to 15 at the end are learned."""
    random = np.random.default_rng(0)
    made = []
    for length, learned in zip(
        (5, 31, 8, 12, 29, 6, 17, 9), (1, 15, 2, 3, 2, 4, 9, 1), strict=True
    ):
        mask = np.zeros(length, dtype=bool)
        mask[-learned:] = True
        made.append((random.integers(1, 64, length).astype(np.int32), mask))
    return made


class RowSource:
    """Steps over the same rows in order, cut into micro-batches."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        num_steps: int,
        rows_per_step: int,
        micro_batch: int,
        validation: Sequence[Row] = (),
    ) -> None:
        self.num_steps = num_steps
        self.layout, self.max_tokens = "left", None
        self._rows, self._per_step, self._micro = rows, rows_per_step, micro_batch
        self._validation = validation
        self.sought: list[int] = []

    def _of_step(self, step: int) -> list[Row]:
        start = step * self._per_step
        return [self._rows[i % len(self._rows)] for i in range(start, start + self._per_step)]

    def micro_batches(self, step: int) -> Iterator[Batch]:
        rows = self._of_step(step)
        for start in range(0, len(rows), self._micro):
            yield collate_rows(rows[start : start + self._micro], pad_token_id=0)

    def use_layout(self, kind: str, max_tokens: int | None) -> None:
        self.layout, self.max_tokens = kind, max_tokens

    def halve_passes(self, step: int) -> None:
        return None

    def num_label_tokens(self, step: int) -> int:
        return sum(int(mask.sum()) for _, mask in self._of_step(step))

    def num_tokens(self, step: int) -> int:
        return sum(len(ids) for ids, _ in self._of_step(step))

    def epoch_at(self, step: int) -> float:
        return step * self._per_step / len(self._rows)

    def validation_batches(self) -> dict[str, Iterator[Batch]]:
        starts = range(0, len(self._validation), 3)
        parts = (self._validation[start : start + 3] for start in starts)
        batches = (collate_rows(part, pad_token_id=0) for part in parts)
        return {"held_out": batches} if self._validation else {}

    def state_at(self, step: int) -> dict[str, Any]:
        return {"place": step * self._per_step}

    def seek(self, step: int, state: Mapping[str, Any]) -> None:
        assert state == self.state_at(step)
        self.sought.append(step)


@pytest.fixture
def make_source(rows) -> Callable[..., RowSource]:
    """A function: the rows as a source of 3 steps of 4, or as told."""

    def make(**changes: Any) -> RowSource:
        given = {"num_steps": 3, "rows_per_step": 4, "micro_batch": 4, **changes}
        return RowSource(given.pop("rows", rows), **given)

    return make


@pytest.fixture
def run(make_source) -> Callable[..., LoopResult]:
    """A function: train a model, by plain descent unless told otherwise."""

    def run_(
        model: LlamaForCausalLM,
        source: RowSource | None = None,
        *,
        optim: str = "sgd",
        optim_args: dict[str, Any] | None = None,
        learning_rate: float = 0.1,
        lr_ratio: float = 1.0,
        schedule: str = "constant",
        schedule_args: dict[str, Any] | None = None,
        warmup_steps: int = 0,
        hooks: LoopHooks | None = None,
        before_step: Callable[[Optimizer], None] = lambda optimizer: None,
        resume_from: Snapshot | None = None,
        **settings: Any,
    ) -> LoopResult:
        source = source or make_source()
        model.to(Processes.join(timedelta(minutes=10)).device)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(
            optim,
            parameters,
            learning_rate=learning_rate,
            lr_ratio=lr_ratio,
            options=optim_args,
        )
        optimizer.register_step_pre_hook(lambda *_: before_step(optimizer))
        rates = build_schedule(
            schedule,
            optimizer,
            num_steps=source.num_steps,
            warmup_steps=warmup_steps,
            options=schedule_args,
        )
        trainer = Trainer(
            model,
            parameters,
            CausalLoss(model),
            optimizer,
            rates,
            source,
            LoopSettings(**{"max_grad_norm": 0.0, **settings}),
            Processes.join(timedelta(minutes=10)),
            callbacks=[] if hooks is None else [hooks.to_callback()],
        )
        return trainer.fit(resume_from)

    return run_


@pytest.fixture
def poison(rows) -> Callable[..., list[Row]]:
    """A function: the model's last token becomes NaN, and the rows told hold it, no others."""

    def poison_(model: LlamaForCausalLM, *bad: int) -> list[Row]:
        token = model.config.vocab_size - 1
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = math.nan
        made = []
        for number, (ids, mask) in enumerate(rows):
            ids = np.where(ids == token, token - 1, ids)
            if number in bad:
                ids[0] = token
            made.append((ids, mask))
        return made

    return poison_


@pytest.fixture
def factors_of() -> Callable[[LlamaForCausalLM], torch.Tensor]:
    """A function: everything that learns, as one copied vector."""

    def get(model: LlamaForCausalLM) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1).cpu().clone() for p in model.wegeft.parameters()])

    return get


@pytest.fixture
def plain_mean_loss() -> Callable[..., torch.Tensor]:
    """A function: mean loss over all labels from full logits, one row at a time, no padding."""

    def mean(model: LlamaForCausalLM, rows: Sequence[Row]) -> torch.Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for ids, mask in rows:
            logits = (
                model(torch.from_numpy(ids).long()[None].to(model.device)).logits[0].double().cpu()
            )
            log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
            for t in range(1, len(ids)):
                if mask[t]:
                    total = total - log_probabilities[t - 1, int(ids[t])]
                    count += 1
        return total / count

    return mean
