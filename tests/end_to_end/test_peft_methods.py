"""Methods of PEFT by their own names, from the recipe to the merged base."""

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from wegeft_cli.errors import UserError
from wegeft_cli.merging.merge import merge
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.runs.train import train

TYPES = {str(getattr(kind, "value", kind)).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
# State beside the parameters: masks, projections or copies that a resume builds again.
METHODS = ("hira", "ln_tuning", "adamss", "frod", "osf", "shira", "pvera")
FAST = ("hira", "ln_tuning")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # frod
@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(
    write_recipe, stop_after, read_adapter, read_metrics, name
):
    if name not in TYPES:
        pytest.skip("a newer PEFT's")
    settings = {"train": {"num_train_epochs": 1}}
    own = [f"adapter.type={name}"]
    whole = train(write_recipe("whole", **settings), own).run_dir
    recipe = write_recipe("parts", **settings)
    assert train(recipe, own, should_stop=stop_after(1)).status == "interrupted"
    parts = train(recipe, own, resume="auto").run_dir
    assert read_adapter(parts) == read_adapter(whole)
    assert read_metrics(parts) == read_metrics(whole)
    assert (merge(parts).output_dir / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("prompt_tuning", "learns a prompt"), ("poly", "id of its task"), ("lily", "cannot merge")],
)
def test_a_type_that_is_refused_is_explained(write_recipe, name, reason):
    with pytest.raises(UserError, match=reason) as caught:
        load_recipe(write_recipe(adapter={"type": name}))
    assert caught.value.key == "adapter.type"
    assert caught.value.hint.startswith("use `")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"adapter": {"type": "adamss", "peft": {"use_asa": True}}}, "adapter.peft.use_asa"),
        ({"adapter": {"type": "deft"}, "model": {"load_in_4bit": True}}, "model.load_in_4bit"),
        ({"adapter": {"type": "ln_tuning", "r": 3}}, "adapter.r"),
    ],
)
def test_what_a_method_cannot_do_is_told_at_its_key(write_recipe, settings, key):
    with pytest.raises(UserError) as caught:
        load_recipe(write_recipe(**settings))
    assert caught.value.key == key


def test_a_rank_without_effect_is_told(write_recipe, listener):
    for name, is_told in (("ia3", True), ("lora", False)):
        listener.notes.clear()
        train(write_recipe(adapter={"type": name, "r": 3}), dry_run=True, reporter=listener)
        note = f"`adapter.r` 3 has no effect on {name!r}"
        assert (note in listener.notes) == is_told
