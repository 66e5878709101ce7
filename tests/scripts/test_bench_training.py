"""The training benchmark trains what it says it trains, and says so where variants disagree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from wegeft_cli.data.batches.collate import collate_rows
from wegeft_cli.training.loss import CausalLoss

NUM_ROWS = 10
# The same sum in float32, by other kernels and in another order.
FLOAT32_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("bench_training")


@pytest.fixture
def words(tmp_path: Path, llama_dir: Path) -> list[str]:
    rows = [{"question": f"How much is {n}?", "answer": f"{'so ' * n}{n}"} for n in range(12)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = f"--rows {NUM_ROWS} --batch-size 4 --max-length 96 --threads 1 --rounds 2"
    return [str(path), *options.split(), "--model", str(llama_dir)]


def test_variants_train_the_same_rows(script: ModuleType, words: list[str]) -> None:
    arguments = script.parse_arguments(words)
    here = [label for label in script.VARIANTS if label != script.TRL]
    threads = torch.get_num_threads()
    try:
        found = {label: [script.run_variant(arguments, label)] for label in here}
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 6
    assert script.find_disagreements(found) == []
    plain = found[script.PLAIN][0]
    assert (plain.num_rows, plain.num_steps) == (NUM_ROWS, 3)
    assert found[script.PACKED][0].num_steps < 10
    assert found[script.LORA][0].trainable_parameters != plain.trainable_parameters
    limit = found[script.LIMIT][0]
    assert (limit.num_steps, limit.trainable_parameters) == (plain.num_steps, 0)
    full = found[script.ALL_POSITIONS][0]
    assert full.last_loss == pytest.approx(plain.last_loss, rel=FLOAT32_TOLERANCE)
    result = script.describe(arguments, found)
    assert json.loads(json.dumps(result))["variants"][0]["label"] == script.PLAIN
    for variant in result["variants"]:
        seconds = found[variant["label"]][0].seconds
        assert variant["of_limit"] == pytest.approx(seconds / limit.seconds)
        assert variant["of_trl"] is None  # it was not run
    table = script.to_markdown(result).splitlines()
    assert len([line for line in table if line.startswith("| ")]) == 2 + len(here)


@pytest.mark.slow
def test_trl_trains_the_same_thing(script: ModuleType, words: list[str]) -> None:
    pytest.importorskip("trl")
    arguments = script.parse_arguments(words)
    both = {label: [script.start_variant(arguments, label)] for label in (script.LORA, script.TRL)}
    assert script.find_disagreements(both) == []
    lora, trl = (runs[0] for runs in both.values())
    assert trl.trainable_parameters == lora.trainable_parameters
    assert trl.num_steps == lora.num_steps


def test_all_positions_give_the_loss_of_the_labelled_ones(
    script: ModuleType, llama_dir: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    random = np.random.default_rng(0)
    rows = [(random.integers(4, 300, n), np.arange(n) >= n // 2) for n in (9, 5, 7)]
    batch = collate_rows(rows, pad_token_id=2)
    with torch.no_grad():
        full = float(script.full_head_loss(model, batch))
        kept = float(CausalLoss(model)(model, batch))
    assert full == pytest.approx(kept, rel=FLOAT32_TOLERANCE)
    assert full > 1


def test_the_limit_has_the_gradient_of_each_row_by_itself(
    script: ModuleType, words: list[str]
) -> None:
    arguments = script.parse_arguments(words)
    model = script.build_limit(arguments)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    random = np.random.default_rng(0)
    rows = [(random.integers(4, 300, n), np.arange(n) >= n // 2) for n in (9, 5, 7)]
    made: list[torch.Tensor] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: made.append(output))
    loss = CausalLoss(model)
    loss._has_plain_logits = True

    def run(chosen: list[Any]) -> tuple[float, int, torch.Tensor]:
        made.clear()
        inputs: list[torch.Tensor] = []
        handle = embeddings.register_forward_hook(
            lambda module, args, output: (output.retain_grad(), inputs.append(output))[0]
        )
        summed, labels = script.step_limit(model, loss, chosen)
        handle.remove()
        assert inputs[0].grad is not None
        return summed, labels, inputs[0].grad[0] * labels

    whole = run(rows)
    parts = [run([row]) for row in rows]
    assert whole[1] == sum(part[1] for part in parts)
    assert whole[0] == pytest.approx(sum(part[0] for part in parts), rel=FLOAT32_TOLERANCE)
    gradient = torch.cat([part[2] for part in parts])
    size = float(gradient.abs().max())
    assert size > 0
    assert (whole[2] - gradient).abs().max() < FLOAT32_TOLERANCE * size


def test_a_profile_names_what_lies_between(script: ModuleType, words: list[str]) -> None:
    threads = torch.get_num_threads()
    try:
        found = script.profile(script.parse_arguments(words))
    finally:
        torch.set_num_threads(threads)
    step, limit = found[script.PLAIN], found[script.LIMIT]
    assert step["aten::mm"][0] > limit["aten::mm"][0] > 0  # the factors' products
    assert any("Optimizer" in name for name in step)
    assert not any("Optimizer" in name for name in limit)
    table = script.profile_table(found, least=0.0).splitlines()
    assert len(table) == 3 + len({*step, *limit})


def test_first_layers_are_those_of_the_model(
    script: ModuleType, llama_dir: Path, tmp_path: Path
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(llama_dir)
    cut = AutoModelForCausalLM.from_pretrained(
        script.cut_model(str(llama_dir), 1, tmp_path / "cut")
    )
    assert len(cut.model.layers) == 1 < len(whole.model.layers)
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (whole, cut)]
    assert torch.equal(*weights)


def test_an_interrupted_run_continues(
    script: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order: list[str] = []

    def start(arguments: Any, label: str) -> Any:
        order.append(label)
        if len(order) == 4:
            raise KeyboardInterrupt
        return make_measurement(script, label, seconds=float(len(order)))

    monkeypatch.setattr(script, "start_variant", start)
    own = [*words, "--variants", "0,2,6", "--output", str(tmp_path / "out.json")]
    with pytest.raises(KeyboardInterrupt):
        script.measure(script.parse_arguments(own))
    found = script.measure(script.parse_arguments(own))
    assert len(order) == 4 + 3
    assert found[script.PLAIN][0].seconds == 1.0
    assert {len(runs) for runs in found.values()} == {2}
    other = script.parse_arguments([*own, "--threads", "2"])
    assert script.read_partial(other, tmp_path / "out.json.partial") == []


def make_measurement(script: ModuleType, label: str, **changes: Any) -> Any:
    names = [field.name for field in dataclasses.fields(script.Measurement)]
    return script.Measurement(**{**dict.fromkeys(names, 2), "label": label, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"seconds": 9.0, "last_loss": 9.0, "num_steps": 1}, None),
        ({"num_tokens": 3}, "num_tokens differ"),
        ({"num_label_tokens": 3}, "num_label_tokens differ"),
        ({"num_rows": 3}, "num_rows differ"),
        ({"num_threads": 3}, "num_threads differ"),
        ({"first_loss": 2.001}, "first step's losses differ"),
        ({"first_loss": float("nan")}, "first step's losses differ"),
    ],
)
def test_what_is_not_the_same_is_told(
    script: ModuleType, changes: dict[str, Any], told: str | None
) -> None:
    found = {
        script.PLAIN: [make_measurement(script, script.PLAIN)],
        script.TRL: [make_measurement(script, script.TRL, **changes)],
    }
    texts = script.find_disagreements(found)
    assert len(texts) == (told is not None)
    assert told is None or told in texts[0]


def test_variants_take_turns(
    script: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order: list[str] = []

    def start(arguments: Any, label: str) -> Any:
        order.append(label)
        return make_measurement(script, label, seconds=float(len(order)))

    monkeypatch.setattr(script, "start_variant", start)
    own = [*words, "--variants", "0,2,5", "--output", str(tmp_path / "out.json")]
    found = script.measure(script.parse_arguments(own))
    labels = [script.VARIANTS[number] for number in (0, 2, 5)]
    assert order == [*labels, *labels[1:], labels[0]]
    assert [run.seconds for run in found[labels[0]]] == [1.0, 6.0]


@pytest.mark.parametrize("rows", [[], ["no_such.jsonl"]])
def test_it_says_which_rows_it_needs(
    script: ModuleType, capsys: pytest.CaptureFixture[str], rows: list[str]
) -> None:
    with pytest.raises(SystemExit):
        script.parse_arguments(rows)
    assert "grade_school_math/data/train.jsonl" in capsys.readouterr().err


def test_a_batch_of_packs_holds_about_as_many_tokens(script: ModuleType) -> None:
    assert script.scale_pack_batch(np.full(16, 100), 8, 400) == 2
    assert script.scale_pack_batch(np.full(16, 100), 8, 100) == 8
    assert script.scale_pack_batch(np.full(4, 100), 2, 1000) == 1
