"""`wegeft recipes import`: recipes of other tools, as their users write them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.importing.importer import import_recipe
from wegeft_cli.recipe.importing.tools import TOOLS, find_tool
from wegeft_cli.recipe.load import load_recipe

FOREIGN = Path(__file__).parent / "foreign"
# File -> tool, errors of the file as it is, and of the converted recipe.
RECIPES = {
    "axolotl_qlora.yaml": ("axolotl", 33, 0),
    "axolotl_chat.yaml": ("axolotl", 21, 0),
    "llama_factory.yaml": ("LLaMA-Factory", 31, 0),
    "trl_sft.yaml": ("TRL", 22, 0),
    "torchtune_lora.yaml": ("torchtune", 30, 0),
    "adapter_config.json": ("PEFT", 19, 1),  # it names no data
}


def count_errors(path: Path) -> int:
    try:
        load_recipe(path)
    except UserError:
        return 1
    except ExceptionGroup as group:
        return len(group.exceptions)
    return 0


def convert(tmp_path: Path, name: str, text: str):
    source = tmp_path / name
    source.write_text(text, encoding="utf-8")
    result = import_recipe(source)
    return result, load(tmp_path, result.text)


def load(tmp_path: Path, text: str, *overrides: str):
    (tmp_path / "new.yaml").write_text(text, encoding="utf-8")
    return load_recipe(tmp_path / "new.yaml", overrides, need_data=False).recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_after_the_import(tmp_path, name):
    tool, before, after = RECIPES[name]
    assert count_errors(FOREIGN / name) == before
    result = import_recipe(FOREIGN / name)
    assert result.tool == tool
    (tmp_path / "new.yaml").write_text(result.text, encoding="utf-8")
    assert count_errors(tmp_path / "new.yaml") == after == len(result.missing)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_accounted_for(name):
    """Each key is written, differs, has no counterpart, or is listed as not needed."""
    result = import_recipe(FOREIGN / name)
    from omegaconf import OmegaConf

    keys = {key for key, value in OmegaConf.load(FOREIGN / name).items() if value is not None}
    known = {each.source for each in result.converted if each.source} | set(result.unneeded)
    known |= {remark.key for remark in (*result.differs, *result.dropped)}
    # Set keys whose value is "off", or that a converted key includes.
    included = {
        "sample_packing", "lora_target_linear", "stage", "dataset_dir", "max_samples",
        "dataset_train_split", "load_in_8bit", "train_on_inputs", "resume_from_checkpoint",
        "lora_dropout", "eval_strategy", "use_dora", "use_rslora", "packing_strategy",
    }  # fmt: skip
    known = {re.split(r"[.\[ ]", key)[0] for key in known}
    liger = {key for key in keys if key.startswith("liger_")}
    assert keys - known - included - liger == set()


@pytest.mark.parametrize("name", RECIPES)
def test_an_override_turns_the_import_into_wegeft(tmp_path, name):
    recipe = load(tmp_path, import_recipe(FOREIGN / name).text, "adapter.type=wegeft")
    assert recipe.adapter.type == "wegeft"


def test_values_of_an_axolotl_recipe(tmp_path):
    recipe = load(tmp_path, import_recipe(FOREIGN / "axolotl_qlora.yaml").text)
    assert recipe.model.load_in_4bit
    assert recipe.adapter.type == "lora"
    assert (recipe.adapter.r, recipe.adapter.alpha) == (32, 16)
    assert recipe.adapter.target_modules == "all-linear"
    assert recipe.adapter.peft == {"lora_dropout": 0.05}
    assert recipe.data.train[0].path == "data/support_tickets.jsonl"
    assert recipe.data.packing == "bfd"
    assert recipe.data.validation_fraction == 0.05
    assert recipe.data.validation_split == "random"
    assert recipe.train.learning_rate == 2e-4
    assert recipe.train.optim == "paged_adamw_32bit"
    # 4 epochs, 4 validations and 1 checkpoint in each.
    assert recipe.train.eval_steps == 1 / 16
    assert recipe.train.save_strategy == "epoch"


def test_conversations_of_axolotl_learn_every_answer(tmp_path):
    result = import_recipe(FOREIGN / "axolotl_chat.yaml")
    recipe = load(tmp_path, result.text)
    assert [source.format for source in recipe.data.train] == ["conversations", "messages"]
    assert recipe.data.loss_on == "assistant"
    assert recipe.train.learning_rate == 1e-4  # text in YAML 1.1
    assert any(remark.key == "deepspeed" for remark in result.dropped)


def test_llama_factory_reads_the_description_of_its_datasets(tmp_path):
    recipe = load(tmp_path, import_recipe(FOREIGN / "llama_factory.yaml").text)
    first, second = recipe.data.train
    assert first.columns == {"instruction": "question", "output": "reply"}
    assert second.format == "messages"
    assert first.limit == second.limit == 1000
    assert recipe.data.template == "chat"
    assert (recipe.adapter.r, recipe.adapter.alpha) == (8, 16)  # its default: twice the rank


def test_a_dataset_that_is_not_described_must_be_set(tmp_path):
    text = "stage: sft\nfinetuning_type: lora\nmodel_name_or_path: m\ndataset: mine\n"
    source = tmp_path / "lf.yaml"
    source.write_text(text)
    (remark,) = import_recipe(source).missing
    assert remark.key == "data.train[0].path"
    assert "`mine`" in remark.text


def test_defaults_of_trl_are_written(tmp_path):
    text = "model_name_or_path: m\ndataset_name: a/b\nuse_peft: true\n"
    result, recipe = convert(tmp_path, "trl.yaml", text)
    assert (recipe.adapter.r, recipe.adapter.alpha) == (16, 32)
    assert recipe.train.learning_rate == 2e-5
    assert recipe.data.max_length == 1024
    assert {"lora_target_modules", "completion_only_loss"} <= {each.key for each in result.differs}


def test_trl_without_peft_trains_every_weight(tmp_path):
    text = "model_name_or_path: m\ndataset_name: a/b\nlora_r: 4\nmax_length: 64\n"
    result, recipe = convert(tmp_path, "trl.yaml", text)
    assert recipe.adapter.type == "full"
    assert [remark.key for remark in result.dropped] == ["lora_r"]


def test_no_clipping_of_torchtune_stays(tmp_path):
    recipe = load(tmp_path, import_recipe(FOREIGN / "torchtune_lora.yaml").text)
    assert recipe.train.max_grad_norm == 0
    assert recipe.data.train[0].path == "yahma/alpaca-cleaned"
    assert recipe.data.loss_on == "all"


@pytest.mark.parametrize(
    ("line", "key"),
    [("rl: dpo", "rl"), ("stage: dpo", "stage"), ("finetuning_type: freeze", "finetuning_type")],
)
def test_another_kind_of_training_is_refused(tmp_path, line, key):
    head = "base_model: m\nsequence_len: 9\n" if key == "rl" else "cutoff_len: 9\ntemplate: a\n"
    source = tmp_path / "other.yaml"
    source.write_text(f"{head}{line}\n")
    with pytest.raises(UserError) as raised:
        import_recipe(source)
    assert raised.value.key == key
    assert raised.value.file == str(source)


def test_a_recipe_of_this_package_and_an_unknown_one_are_refused(tmp_path):
    source = tmp_path / "r.yaml"
    source.write_text("model: {name_or_path: m}\n")
    with pytest.raises(UserError, match="of this package already"):
        import_recipe(source)
    source.write_text("a: 1\nb: 2\n")
    with pytest.raises(UserError, match="no tool has these keys: a, b"):
        import_recipe(source)


def test_a_pasted_recipe_names_the_import():
    with pytest.raises(ExceptionGroup) as raised:
        load_recipe(FOREIGN / "trl_sft.yaml")
    last = raised.value.exceptions[-1]
    assert "recipe of TRL" in str(last)
    assert "wegeft recipes import" in last.hint


def test_every_tool_is_found_by_its_own_keys():
    for tool in TOOLS:
        assert find_tool(dict.fromkeys(tool.keys, 1)) == tool


def test_strategies_by_epoch_are_keys(tmp_path):
    """`epoch` is no fraction of the steps, which another number of epochs would change."""
    text = "model_name_or_path: m\ndataset_name: a/b\neval_strategy: epoch\nsave_strategy: epoch\n"
    result, recipe = convert(tmp_path, "trl.yaml", text)
    assert (recipe.train.eval_strategy, recipe.train.save_strategy) == ("epoch", "epoch")
    assert not {"eval_strategy", "save_strategy"} & {each.key for each in result.differs}


def test_system_prompts_and_template_arguments(tmp_path):
    lf = "stage: sft\nmodel_name_or_path: m\ndataset: mine\ntemplate: {}\n"
    options = "default_system: Be brief.\nenable_thinking: false\n"
    source = tmp_path / "lf.yaml"
    source.write_text(lf.format("qwen3") + options)
    text = import_recipe(source).text
    assert "system: Be brief." in text
    assert "enable_thinking: false" in text
    source.write_text(lf.format("alpaca") + options)
    dropped = {remark.key for remark in import_recipe(source).dropped}
    assert {"default_system", "enable_thinking"} <= dropped
    axolotl = "base_model: m\nsequence_len: 64\ndatasets:\n- path: a/b\n  type: {}\n"
    axolotl += (
        "default_system_message: Be brief.\nchat_template_kwargs: {{enable_thinking: false}}\n"
    )
    _, recipe = convert(tmp_path, "ax.yaml", axolotl.format("chat_template"))
    assert recipe.data.system == "Be brief."
    assert recipe.data.chat_template_kwargs == {"enable_thinking": False}
    result, recipe = convert(tmp_path, "ax.yaml", axolotl.format("alpaca"))
    assert recipe.data.system is None
    assert "default_system_message" in {remark.key for remark in result.dropped}
