"""Tasks are found by folder: one new file adds a task to recipes, plans and runs."""

import subprocess
import sys

import pytest

from wegeft_cli import tasks
from wegeft_cli.errors import UserError
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.planning.plan import plan
from wegeft_cli.planning.preview import preview
from wegeft_cli.planning.validate import validate_recipe
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.runs.train import train
from wegeft_cli.tasks.registry import all_tasks, find_task, task_names, task_of_config

# Language modeling whose loss counts half: small, and yet another loss than any task's.
HALVED = '''
"""Causal language modeling with half the loss."""

from wegeft_cli.tasks.causal_lm import CausalLM


class Halved(CausalLM):
    noun = "halved language model"
    ignored_keys = (*CausalLM.ignored_keys, "train.neftune_noise_alpha")

    def loss(self, model, recipe, layout):
        whole = super().loss(model, recipe, layout)
        return lambda model, batch: whole(model, batch) / 2


TASK = Halved()
'''


@pytest.fixture
def halved(tmp_path, monkeypatch):
    """The name of a task that one file in another folder of the package defines."""
    folder = tmp_path / "more_tasks"
    folder.mkdir()
    (folder / "halved_lm.py").write_text(HALVED)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])
    yield "halved_lm"
    sys.modules.pop("wegeft_cli.tasks.halved_lm", None)
    vars(tasks).pop("halved_lm", None)
    from wegeft_cli.tasks import registry

    registry._load.cache_clear()


def test_one_file_adds_a_task(halved, write_recipe):
    recipe = write_recipe(train={"max_steps": 2})
    mine = f"task={halved}"
    assert halved in task_names()
    assert validate_recipe(recipe, [mine])
    assert plan(recipe, [mine]).memory_gib == plan(recipe).memory_gib | {
        name: pytest.approx(plan(recipe).memory_gib[name], rel=0.1)
        for name in ("runtime", "total", "loading")
    }
    assert preview(recipe, [mine]).to_json() == preview(recipe).to_json()
    whole = train(recipe, ["train.logging_steps=1"])
    half = train(recipe, [mine, "train.logging_steps=1", f"output_dir={recipe.parent / 'half'}"])
    assert half.status == "finished"
    assert half.final_loss == pytest.approx(whole.final_loss / 2, rel=0.05)


def test_its_rules_and_its_name_are_the_recipes(halved, write_recipe):
    recipe = write_recipe()
    with pytest.raises(UserError, match="is not read by `task` 'halved_lm'"):
        load_recipe(recipe, [f"task={halved}", "train.neftune_noise_alpha=1"])
    with pytest.raises(UserError, match="did you mean `halved_lm`"):
        load_recipe(recipe, ["task=halved_ml"])


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="there is no task 'other'"):
        find_task("other")


def test_the_tasks_agree_with_their_heads():
    assert list(all_tasks()) == ["causal_lm", "image_classification", "sequence_classification"]
    for name, task in all_tasks().items():
        assert task.name == name
        if task.has_head:
            head = HeadSpec(name, ("a", "b"))
            assert (head.auto_class, head.noun) == (task.auto_class, task.noun)


def test_a_saved_model_tells_its_task():
    class Config:
        def __init__(self, *architectures):
            self.architectures = architectures

    assert task_of_config(Config("BertForSequenceClassification")).name == "sequence_classification"
    assert task_of_config(Config("ViTForImageClassification")).name == "image_classification"
    assert task_of_config(Config("LlamaForCausalLM")).name == "causal_lm"
    assert task_of_config(Config()).name == "causal_lm"


def test_the_registry_loads_no_torch():
    code = (
        "import sys; from wegeft_cli.tasks.registry import all_tasks; all_tasks(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
