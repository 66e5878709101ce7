"""Packing in a run: proved on the loaded model, refused where rows would see each other."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from wegeft_cli.data.batches.packing import pack_rows
from wegeft_cli.data.batches.sampler import StepPlan
from wegeft_cli.data.batches.text import PlannedBatches
from wegeft_cli.data.text.encode import EncodedDataset
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSection, ModelSection, Recipe, TrainSection
from wegeft_cli.runs.train import train
from wegeft_cli.tasks.support import flat_check
from wegeft_cli.tasks.support.packing_check import check_packing

# Float32 sums in another order, over some steps of training.
FLOAT32 = 1e-5
PACKED = Recipe(data=DataSection(packing="bfd"))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def with_max_length(max_length: int) -> Recipe:
    return replace(PACKED, data=replace(PACKED.data, max_length=max_length))


@pytest.fixture
def llama(llama_dir) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(llama_dir)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["none", "bf16", "fp16"])
def test_a_model_that_keeps_rows_apart_passes(llama, attention, precision):
    llama.set_attn_implementation(attention)
    recipe = replace(PACKED, train=TrainSection(mixed_precision=precision))
    state = torch.get_rng_state()
    check_packing(llama.train(), recipe)
    assert llama.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_passes(llama, dtype):
    check_packing(llama.to(dtype), PACKED)


def test_gpt2_passes(build_gpt2_dir):
    check_packing(AutoModelForCausalLM.from_pretrained(build_gpt2_dir()), PACKED)


class FarSighted:
    """A model that forgets its window or chunks where a sequence is long."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        mask = attention_mask
        if input_ids.shape[1] > 30:
            mask = torch.ones_like(input_ids)
        return super().forward(
            input_ids, attention_mask=mask, position_ids=position_ids, use_cache=use_cache
        )


def build_mistral() -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16))


def build_llama4() -> Llama4ForCausalLM:
    sizes = {"num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
    return Llama4ForCausalLM(
        Llama4TextConfig(**SIZES, **sizes, attention_chunk_size=16, no_rope_layers=[1, 1])
    )


@pytest.mark.parametrize("build", [build_mistral, build_llama4])
def test_windows_and_chunks_are_tried_where_rows_are_longer(build):
    torch.manual_seed(0)
    model = build()
    check_packing(model, with_max_length(40))
    model.__class__ = type("Forgetting", (FarSighted, type(model)), {})
    check_packing(model, with_max_length(16))  # no row is longer than a window: nothing to forget
    with pytest.raises(UserError, match="see each other"):
        check_packing(model, with_max_length(40))


class Leaking(LlamaForCausalLM):
    """A model that hides from its attention that rows are packed."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        mask = torch.ones_like(input_ids)
        return super().forward(
            input_ids, attention_mask=mask, position_ids=position_ids, use_cache=use_cache
        )


class WithoutPositions(LlamaForCausalLM):
    """A model that takes no positions."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize(
    ("kind", "words"), [(Leaking, "see each other"), (WithoutPositions, "position_ids")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_rows_is_refused(llama, kind, words, dtype):
    llama.to(dtype).__class__ = kind
    with pytest.raises(UserError, match=words) as caught:
        check_packing(llama, PACKED)
    assert caught.value.key == "data.packing"
    check_packing(llama, Recipe())  # without packing nothing is asked of a model


def test_a_model_without_attention_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(UserError, match=r"position_ids|not known"):
        check_packing(model, PACKED)


def test_attention_that_is_not_known_to_keep_rows_apart_is_refused(llama):
    llama.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="flex_attention") as caught:
        check_packing(llama, PACKED)
    assert "sdpa" in caught.value.hint


def test_packs_that_are_laid_flat_need_flash_attention(llama):
    recipe = replace(PACKED, model=ModelSection(attn_implementation="flash_attention_2"))
    with pytest.raises(UserError, match="came with the attention 'sdpa'"):
        check_packing(llama, recipe)


def test_packed_training_is_training(write_recipe, read_metrics):
    """Where a step takes all rows, packs of them give the same losses and factors."""
    runs = {
        packing: train(
            write_recipe(packing, data={"packing": packing}),
            ["train.per_device_train_batch_size=10", "train.num_train_epochs=4"],
        ).run_dir
        for packing in ("none", "bfd")
    }
    plain, packed = (read_metrics(runs[packing]) for packing in ("none", "bfd"))
    assert len(plain) == len(packed) == 4
    for one, two in zip(plain, packed, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=FLOAT32)
        assert two["num_tokens"] == one["num_tokens"]
    factors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs.values()]
    for name, factor in factors[0].items():
        assert (factors[1][name] - factor).abs().max() < 100 * FLOAT32 * factor.abs().max()


ROWS = 61


@pytest.fixture
def dataset() -> EncodedDataset:
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(random.integers(2, 33, ROWS))])
    label_mask = random.random(offsets[-1]) < 0.3
    label_mask[offsets[:-1]] = False
    return EncodedDataset(np.arange(offsets[-1], dtype=np.int32), label_mask, offsets)


def build_batches(
    dataset, rank=0, *, packs=None, flat=False, grouped=False, world_size=1, max_length=None
):
    plan = StepPlan(
        num_rows=len(dataset) if packs is None else len(packs),
        per_device_batch_size=3,
        accumulation_steps=2,
        world_size=world_size,
        seed=1,
        shuffle=True,
        num_epochs=1.0,
        group_lengths=dataset.lengths if grouped else None,
    )
    batches = PlannedBatches(
        dataset,
        plan,
        packs=packs,
        flat=flat,
        validation={},
        rank=rank,
        eval_batch_size=1,
        pad_token_id=0,
    )
    batches.max_length = max_length
    return batches


def pair_up() -> list[list[int]]:
    return [[i, i + 30] for i in range(30)] + [[60]]


WAYS = [
    {},
    {"grouped": True},
    {"packs": pair_up()},
    {"packs": pair_up(), "flat": True},
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_holds_every_token_once_and_waste_counts_the_rest(dataset, way, world_size):
    ranks = [
        build_batches(dataset, rank, world_size=world_size, **way) for rank in range(world_size)
    ]
    tokens: list[int] = []
    positions = num_labels = 0
    for step in range(ranks[0].num_steps):
        batches = [batch for rank in ranks for batch in rank.micro_batches(step)]
        assert ranks[0].num_tokens(step) == sum(batch.num_tokens for batch in batches)
        assert ranks[0].num_label_tokens(step) == sum(b.num_label_tokens for b in batches)
        for batch in batches:
            positions += batch.input_ids.numel()
            num_labels += batch.num_label_tokens
            assert batch.num_tokens + batch.num_padding == batch.input_ids.numel()
            tokens += batch.input_ids.flatten().tolist()
    # The ids number the tokens; 0 is a token and what fills up.
    assert sorted(set(tokens)) == list(range(dataset.offsets[-1]))
    assert len(tokens) - tokens.count(0) + 1 == dataset.offsets[-1]
    statistics = ranks[0].padding_statistics()
    assert statistics.pop("packed_padding_share") is None
    grouped = statistics.pop("grouped_padding_share")
    if way:
        assert grouped is None
    else:
        sorted_way = build_batches(dataset, world_size=world_size, **WAYS[1])
        assert grouped == sorted_way.padding_statistics()["padding_share"]
    assert statistics == {
        "padding_share": pytest.approx(1 - dataset.offsets[-1] / positions),
        "packed_sequences": 31 if "packs" in way else None,
        "head_share": pytest.approx(num_labels / positions),
    }


def test_the_padding_of_packs_is_known_before(dataset):
    max_length = 2 * int(dataset.lengths.max())
    told = build_batches(dataset, max_length=max_length).padding_statistics()
    packs = pack_rows(dataset.lengths, max_length)
    left = build_batches(dataset, packs=packs).padding_statistics()["padding_share"]
    # A batch is padded to its own longest pack, and the estimate to that of all.
    assert left <= told["packed_padding_share"] <= left + 0.1
    assert told["packed_padding_share"] < told["padding_share"]


def test_what_is_done_against_padding_leaves_less(dataset):
    shares = [build_batches(dataset, **way).padding_statistics()["padding_share"] for way in WAYS]
    assert shares[0] > shares[1] > shares[3] == 0


def test_a_run_lays_rows_end_to_end_and_its_losses_are_those_of_padded_rows(
    write_recipe, tmp_path, monkeypatch
):
    recipe = write_recipe(train={"max_steps": 4, "logging_steps": 1, "save_steps": 2})
    flat = train(recipe)
    record = json.loads((flat.run_dir / "run.json").read_text())
    assert record["layout"] == "flat"
    assert record["waste"]["padding_share"] == 0
    monkeypatch.setattr(flat_check, "expect_flat", lambda model, recipe: "no reason")
    padded = train(recipe, [f"output_dir={tmp_path / 'padded'}"])
    record = json.loads((padded.run_dir / "run.json").read_text())
    assert record["layout"] == "left"
    assert record["waste"]["padding_share"] > 0
    found, expected = (read_losses(run.run_dir) for run in (flat, padded))
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=FLOAT32)


def test_a_run_of_padded_batches_continues_with_them(write_recipe, tmp_path, monkeypatch):
    """Checkpoints of earlier versions record no layout."""
    recipe = write_recipe(train={"max_steps": 4, "logging_steps": 1, "save_steps": 2})
    with monkeypatch.context() as patched:
        patched.setattr(flat_check, "expect_flat", lambda model, recipe: "no reason")
        whole = train(recipe)
    checkpoint = whole.run_dir / "checkpoints" / "step-00000002"
    assert "layout" not in json.loads((checkpoint / "state.json").read_text())["source"]
    continued = train(recipe, [f"output_dir={tmp_path / 'on'}"], resume=str(checkpoint))
    assert json.loads((continued.run_dir / "run.json").read_text())["layout"] == "left"
    files = [x.run_dir / "adapter" / "adapter_model.safetensors" for x in (whole, continued)]
    assert files[0].read_bytes() == files[1].read_bytes()


def read_losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [each["loss"] for each in map(json.loads, lines) if "loss" in each]
