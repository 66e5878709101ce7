"""A text classifier's rows get the logits in a batch that they get alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import write_recipe, write_texts
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    ConvBertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MobileBertConfig,
    ModernBertConfig,
    NystromformerConfig,
    RobertaConfig,
    XLNetConfig,
    YosoConfig,
)

from wegeft_cli.data.batches.base import ClassBatch
from wegeft_cli.data.batches.labelled import TextCollator
from wegeft_cli.data.batches.layout import Layout
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.recipe.schema import DataSection, Recipe, TrainSection
from wegeft_cli.reporter import SilentReporter
from wegeft_cli.runs.train import train
from wegeft_cli.tasks.registry import find_task
from wegeft_cli.tasks.support.padding_check import tokenise_test_rows
from wegeft_cli.training.classification_loss import ClassLoss, compute_class_logits

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {
    **SIZES,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FAMILIES: dict[str, tuple[Callable[[int], Any], str]] = {
    "bert": (lambda n: BertConfig(**PLAIN, vocab_size=n), "flat"),
    "gpt2": (lambda n: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=n), "flat"),
    "roberta": (
        lambda n: RobertaConfig(**{**PLAIN, "max_position_embeddings": 512}, vocab_size=n),
        "flat",
    ),
    "distilbert": (
        lambda n: DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=n),
        "flat",
    ),
    "modernbert": (
        lambda n: ModernBertConfig(**SIZES, intermediate_size=48, vocab_size=n),
        "right",
    ),
    "llama": (lambda n: LlamaConfig(**SIZES, intermediate_size=48, vocab_size=n), "flat"),
    "xlnet": (
        lambda n: XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=n),
        "left",
    ),
    "convbert": (lambda n: ConvBertConfig(**PLAIN, embedding_size=32, vocab_size=n), "equal"),
    "mobilebert": (
        lambda n: MobileBertConfig(
            **PLAIN, embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32, vocab_size=n
        ),
        "equal",
    ),
    "nystromformer": (
        lambda n: NystromformerConfig(**PLAIN, vocab_size=n, segment_means_seq_len=64),
        "equal",
    ),
    "yoso": (lambda n: YosoConfig(**PLAIN, vocab_size=n), "equal"),
}
TWO = Recipe(
    task="sequence_classification",
    data=DataSection(max_length=64),
    train=TrainSection(per_device_train_batch_size=2, per_device_eval_batch_size=1),
)


@pytest.fixture
def tokenizer(build_tokenizer):
    return build_tokenizer(pad="<pad>")


def build(family, tokenizer):
    torch.manual_seed(0)
    config = FAMILIES[family][0](len(tokenizer))
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def runs_on_meta(skeleton: torch.nn.Module) -> bool:
    """Return whether the rotary embedding, where there is one, accepts tensors without values."""
    rotary = getattr(skeleton.base_model, "rotary_emb", None)
    places = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        if rotary is not None:
            rotary(torch.zeros(1, 2, 32, device="meta"), position_ids=places)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_loss_and_gradient_of_single_rows(family, tokenizer):
    model, expected = build(family, tokenizer), FAMILIES[family][1]
    layout = find_task("sequence_classification").check_built(model, tokenizer, TWO)
    assert layout.kind == expected
    skeleton = build(family, tokenizer).to("meta")
    planned = find_task("sequence_classification").expect_layout(skeleton, TWO)
    # transformers 5.2 turns autocast off in a rotary embedding, which torch 2.6 cannot do for
    # tensors without values. The plan then takes padded batches.
    finds_rows = expected == "flat" and runs_on_meta(skeleton)
    assert planned == ("flat" if finds_rows else "right")
    assert not any(module._forward_pre_hooks for module in skeleton.modules())
    assert (layout.note is None) == (expected in ("flat", "right"))
    assert (layout.reason is None) == (expected == "flat")
    rows = tokenise_test_rows(tokenizer, 64)
    collator, loss = TextCollator(tokenizer), ClassLoss(is_regression=False, layout=layout.kind)

    def gradient(groups):
        model.zero_grad()
        total = 0.0
        for numbers in groups:
            labels = torch.tensor([number % 2 for number in numbers])
            inputs = collator.submit(rows, numbers, None)()
            lengths = tuple(rows.lengths[numbers].tolist())
            found = loss(model, ClassBatch(inputs, labels, numbers, lengths))
            found.backward()
            total += found.item()
        return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    together, gradients = gradient([[1, 0, 2]])
    alone, single = gradient([[1], [0], [2]])
    assert together == pytest.approx(alone, rel=1e-4)
    torch.testing.assert_close(gradients, single, rtol=1e-3, atol=1e-4)
    assert loss.pop_outputs().rows == [1, 0, 2, 1, 0, 2]


def test_layers_compute_no_padding_and_are_recomputed_alike(tokenizer):
    model, widths = build("bert", tokenizer), []
    task = find_task("sequence_classification")
    layout = task.check_built(model, tokenizer, TWO)
    rows = tokenise_test_rows(tokenizer, 64)
    inputs = TextCollator(tokenizer).submit(rows, [1, 0, 2], None)()
    lengths = tuple(rows.lengths[[1, 0, 2]].tolist())
    model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[:2])
    )
    found = []
    for checkpoints in (False, True):
        if checkpoints:
            model.train()  # without dropout
            enable_checkpointing(model)
        model.zero_grad()
        compute_class_logits(model, inputs, layout.kind, lengths).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert widths == [(1, sum(lengths))] * 3  # the last one in the backward pass
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_run_begun_with_padding_continues_with_it(tokenizer):
    model = build("bert", tokenizer)
    layout = find_task("sequence_classification").check_built(
        model, tokenizer, TWO, may_be_flat=False
    )
    assert (layout.kind, layout.reason) == ("right", "the run was begun with padded batches")


def test_single_rows_need_no_layout(tokenizer):
    model = build("convbert", tokenizer)
    single = replace(TWO.train, per_device_train_batch_size=1)
    task = find_task("sequence_classification")
    assert task.check_built(model, tokenizer, replace(TWO, train=single)) == Layout("right")


class Warnings(SilentReporter):
    """A reporter that keeps its warnings."""

    def __init__(self):
        self.texts = []

    def warn(self, text):
        self.texts.append(text)


def test_training_and_scores_do_not_depend_on_the_batch(tmp_path, tokenizer):
    base = tmp_path / "convbert"
    build("convbert", tokenizer).base_model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    words = ["true", "false", "true false true", "false true", "true true false false true"]
    rows = [{"text": text, "label": "yes" if len(text) % 2 else "no"} for text in words]
    path = write_texts(tmp_path / "rows.jsonl", rows)
    losses, confidences = [], []
    for size in (1, 4):
        recipe = write_recipe(
            tmp_path,
            f"by-{size}",
            task="sequence_classification",
            model={"name_or_path": str(base)},
            adapter={"target_modules": ["query"]},
            data={part: [{"path": str(path)}] for part in ("train", "validation", "test")}
            | {"max_length": 64},
            train={
                "per_device_train_batch_size": size,
                "per_device_eval_batch_size": size,
                "gradient_accumulation_steps": 4 // size,
                "max_steps": 2,
            },
        )
        trained, scored = Warnings(), Warnings()
        result = train(recipe, reporter=trained)
        losses.append(result.final_loss)
        found = evaluate(result.run_dir, batch_size=size, reporter=scored)
        for reporter in (trained, scored):
            assert sum("rows of equal length" in text for text in reporter.texts) == (size > 1)
        lines = Path(found["samples_path"]).read_text().splitlines()
        confidences.append([json.loads(line)["confidence"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert confidences[1] == pytest.approx(confidences[0], rel=1e-4)
