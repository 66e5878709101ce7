"""`adapter.type: adalora` from the recipe to the merged base: fewer ranks, and an exact resume."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import UserError
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.peft.loading import load_peft
from wegeft_cli.planning.plan import plan
from wegeft_cli.runs.train import train
from wegeft_cli.training import trainer as loop

FLOAT32 = 1e-5
NUM_LAYERS = 6  # two decoder layers, three targets each
# 6 steps: one with all ranks, three that take some away, the last two with what is left.
ADAPTER = {"type": "adalora", "r": 2, "peft": {"tinit": 1, "tfinal": 2}}


def ranks_of(adapter_dir):
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    return sum(t.shape[0] for name, t in tensors.items() if name.endswith(".lora_E"))


def test_ranks_fall_to_r_on_average(write_recipe, read_metrics):
    recipe = write_recipe(adapter=ADAPTER)
    planned = plan(recipe)
    result = train(recipe)
    assert planned.trainable_parameters == result.trainable_parameters
    assert ranks_of(result.adapter_dir) == 2 * NUM_LAYERS
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert (config["init_r"], config["target_r"], config["total_step"]) == (3, 2, 6)
    assert sum(map(sum, config["rank_pattern"].values())) == 2 * NUM_LAYERS
    # Without an end of their own, ranks are taken away to the last step.
    short = train(write_recipe("short", adapter={"type": "adalora", "r": 2}))
    assert ranks_of(short.adapter_dir) == 2 * NUM_LAYERS
    free = write_recipe("free", adapter={"type": "adalora", "r": 2, "peft": {"orth_reg_weight": 0}})
    with_term, without = (read_metrics(r.run_dir)[0]["loss"] for r in (short, train(free)))
    assert with_term > without + 0.1  # half of the mean distance from orthogonal factors


def test_a_last_step_that_is_skipped_leaves_the_ranks_chosen(write_recipe, monkeypatch):
    sound = loop.is_usable_step
    calls = []

    def is_usable_step(*args):
        calls.append(args)
        return sound(*args) and len(calls) < 6

    monkeypatch.setattr(loop, "is_usable_step", is_usable_step)
    result = train(write_recipe(adapter={"type": "adalora", "r": 2}))
    assert (len(calls), result.num_skipped) == (6, 1)
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert sum(map(sum, config["rank_pattern"].values())) == 2 * NUM_LAYERS
    assert ranks_of(result.adapter_dir) == 2 * NUM_LAYERS


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5])
def test_a_resumed_run_equals_one_that_was_never_stopped(
    write_recipe, stop_after, read_adapter, read_metrics, stop_at
):
    whole = train(write_recipe("whole", adapter=ADAPTER)).run_dir
    recipe = write_recipe("parts", adapter=ADAPTER)
    assert train(recipe, should_stop=stop_after(stop_at)).num_steps == stop_at
    parts = train(recipe, resume="auto").run_dir
    assert read_adapter(parts) == read_adapter(whole)
    assert read_metrics(parts) == read_metrics(whole)
    configs = [
        json.loads((p / "adapter" / "adapter_config.json").read_text()) for p in (whole, parts)
    ]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]


def test_a_longer_run_cannot_go_on_from_a_shorter_one(write_recipe, stop_after):
    train(write_recipe(adapter=ADAPTER), should_stop=stop_after(5))
    longer = write_recipe(adapter=ADAPTER, train={"num_train_epochs": 4})
    with pytest.raises(UserError, match="over 6 steps, and the run has 12 now"):
        train(longer, resume="auto")


def test_an_earlier_step_is_saved_with_the_ranks_it_had(write_recipe, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "Q1:", "completion": " xyz zyx qqq"}) + "\n")
    settings = {"eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    recipe = write_recipe(
        adapter={**ADAPTER, "peft": {"tinit": 6, "tfinal": 2}},
        data={"validation": [{"path": str(held)}]},
        train={**settings, "num_train_epochs": 4, "learning_rate": 0.3},
    )
    result = train(recipe)
    assert result.adapter_step < 10  # before the ranks are chosen for good
    assert ranks_of(result.adapter_dir) == 3 * NUM_LAYERS
    kept = load_file(
        result.run_dir / f"checkpoints/step-{result.adapter_step:08d}/parameters.safetensors"
    )
    written = load_file(result.adapter_dir / "adapter_model.safetensors")
    assert {t.numpy().tobytes() for t in written.values()} == {
        t.numpy().tobytes() for t in kept.values()
    }


def test_the_merged_base_answers_as_the_adapter(write_recipe, llama_dir, ids):
    result = train(write_recipe(adapter=ADAPTER, train={"learning_rate": 0.05}))
    base = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    with torch.no_grad():
        plain = base(ids).logits
        adapted = load_peft(base, Adapter.open(result.adapter_dir))(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(merge(result.run_dir).output_dir)(ids).logits
    assert (adapted - plain).abs().max() > 100 * FLOAT32
    torch.testing.assert_close(merged, adapted, rtol=FLOAT32, atol=FLOAT32)


def test_phases_that_do_not_fit_are_told_before_the_weights(write_recipe):
    recipe = write_recipe(adapter={**ADAPTER, "peft": {"tinit": 4, "tfinal": 2}})
    with pytest.raises(UserError, match="leave no step of 6 to reduce ranks") as caught:
        train(recipe, dry_run=True)
    assert caught.value.key == "adapter.peft.tfinal"
