"""Operations counted from shapes against those that torch counts while a real model trains."""

import pytest
from families.checkpoints import build_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from wegeft_cli.data.batches.sampler import build_step_plan
from wegeft_cli.data.batches.text import build_source
from wegeft_cli.data.text.dataset import build_datasets
from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.models.loading import (
    build_skeleton,
    load_model,
    load_tokenizer,
)
from wegeft_cli.planning.batch_shapes import batch_shapes
from wegeft_cli.planning.fake_step import skeleton_with_adapter
from wegeft_cli.planning.flops import OPERATIONS, count_flops
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.tasks.registry import inject_adapter
from wegeft_cli.training.loss import CausalLoss

# The first layer needs no gradient for its input, and the last product of a recomputed layer is
# not computed again: both are counted as if they were, a share that shrinks with the layers.
TOLERANCE = 0.06


@pytest.fixture
def prepare(write_recipe, build_llama_dir):
    """A function: recipe, tokenised rows, plan of steps, on a Llama of eight layers."""
    folder = build_llama_dir(num_hidden_layers=8)

    def build(*overrides):
        path = write_recipe(model={"name_or_path": str(folder)})
        recipe = load_recipe(path, overrides).recipe
        data = build_datasets(recipe.data, tokenizer=load_tokenizer(folder), recipe_dir=None)
        return recipe, data, build_step_plan(recipe, data, 1)

    return build


def estimate(recipe, data, plan):
    _, skeleton = build_skeleton(recipe.model)
    shapes = batch_shapes(recipe, data, plan)
    return count_flops(skeleton_with_adapter(skeleton, recipe), recipe, shapes)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter.target_modules=all-linear", "adapter.r=16"],
        ["adapter.view=weight"],
        ["adapter.dropout=0.1"],
        ["adapter.side=output", "adapter.view=activation"],
        ["adapter.type=lora"],
        ["adapter.modules_to_save=[lm_head]"],
        ["model.attn_implementation=eager"],
        ["train.gradient_checkpointing=true"],
        ["train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=2"],
        ["data.loss_on=all"],
        ["data.packing=bfd", "data.max_length=24"],
    ],
    ids=str,
)
def test_a_run_counts_what_torch_counts(prepare, overrides):
    recipe, data, plan = prepare("train.num_train_epochs=1", *overrides)
    model = load_model(
        recipe.model.name_or_path, attn_implementation=recipe.model.attn_implementation
    )
    model = inject_adapter(model, recipe).train()
    if recipe.train.gradient_checkpointing:
        enable_checkpointing(model)
    source = build_source(recipe, data, plan, rank=0, pad_token_id=2)
    loss = CausalLoss(model)
    loss(model, next(iter(source.micro_batches(0))))  # it tries the head once
    with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
        for step in range(source.num_steps):
            for batch in source.micro_batches(step):
                loss(model, batch).backward()
    per_step, in_all = estimate(recipe, data, plan)
    assert source.num_steps == plan.num_steps > 1
    assert counter.get_total_flops() > 1e7
    assert in_all == pytest.approx(counter.get_total_flops(), rel=TOLERANCE)
    assert per_step == pytest.approx(in_all / source.num_steps)


def test_products_of_experts_are_counted(prepare, build_tokenizer, tmp_path):
    config = build_config("mixtral")
    config.num_hidden_layers = 6
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixtral")
    build_tokenizer().save_pretrained(tmp_path / "mixtral")
    test_a_run_counts_what_torch_counts(
        prepare,
        [f"model.name_or_path={tmp_path / 'mixtral'}", "adapter.target_modules=all-linear"],
    )


def test_a_long_run_is_told_from_its_first_steps(prepare):
    recipe, data, plan = prepare("train.max_steps=5000")
    survey = batch_shapes(recipe, data, plan)
    assert survey.num_steps == 4096
    assert survey.num_steps_in_all == 5000
    per_step, in_all = estimate(recipe, data, plan)
    assert in_all == pytest.approx(5000 * per_step)
    two = estimate(*prepare("train.num_train_epochs=1"))
    # Each epoch puts other rows together, and so pads otherwise.
    assert per_step == pytest.approx(two[0], rel=TOLERANCE)


def test_a_model_that_looks_at_values_is_refused(prepare, monkeypatch):
    recipe, data, plan = prepare()
    _, skeleton = build_skeleton(recipe.model)
    model = skeleton_with_adapter(skeleton, recipe)
    forward = type(model).forward

    def look(self, *args, **kwargs):
        if float(next(self.parameters()).sum()) > 0:
            return None
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", look)
    with pytest.raises(RuntimeError, match="does not run without numbers"):
        count_flops(model, recipe, batch_shapes(recipe, data, plan))
