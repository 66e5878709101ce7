"""What a recipe will cost, from config.json alone; the published counts, exactly."""

import json

import pytest
from typer.testing import CliRunner

from wegeft_cli.cli.app import app
from wegeft_cli.errors import UserError
from wegeft_cli.planning import preflight
from wegeft_cli.planning.plan import plan
from wegeft_cli.runs.train import train

FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA2_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
LLAMA3_8B = {
    **LLAMA2_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
ROBERTA_BASE = {
    "model_type": "roberta",
    "architectures": ["RobertaForCausalLM"],
    "is_decoder": True,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50265,
    "max_position_embeddings": 514,
}
# The paper's tables; of all parameters, where it tells the share, in percent to three digits.
PUBLISHED = [
    (LLAMA2_7B, {"r": 64, "target_modules": FIVE}, 3_506_176, 0.052),
    (LLAMA3_8B, {"r": 64, "target_modules": FIVE}, 3_932_160, 0.049),
    (LLAMA2_7B, {"r": 64, "target_modules": SEVEN}, 4_554_752, 0.068),
    (LLAMA2_7B, {"r": 64, "target_modules": ["q_proj", "v_proj"]}, 1_048_576, 0.016),
    (LLAMA2_7B, {"r": 64, "target_modules": FIVE, "share": "none"}, 112_197_632, None),
    (LLAMA2_7B, {"type": "lora", "r": 16, "target_modules": FIVE}, 28_049_408, 0.416),
    (ROBERTA_BASE, {"r": 32, "target_modules": ["query", "value"]}, 98_304, None),
]
NUM_PARAMETERS = {4096: 6_738_415_616, 8192: 8_030_261_248}


@pytest.fixture
def write_config(tmp_path):
    def write(config):
        folder = tmp_path / "config-only"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


@pytest.mark.parametrize(("config", "adapter", "count", "percent"), PUBLISHED)
def test_published_counts(write_recipe, write_config, config, adapter, count, percent):
    recipe = write_recipe(model={"name_or_path": write_config(config)}, adapter=adapter)
    result = plan(recipe)
    assert result.trainable_parameters == count
    assert sum(group.num_parameters for group in result.groups) == count
    if percent is not None:
        assert result.base_parameters == NUM_PARAMETERS[config["max_position_embeddings"]]
        assert round(100 * count / result.base_parameters, 3) == percent
    # There is no tokenizer: what hangs on it is open, and the reason is told.
    assert result.num_steps is None
    assert result.num_rows is None
    assert "tokenizer" in result.unknown[0]


def test_groups_of_the_published_setting(write_recipe, write_config):
    adapter = {"r": 64, "target_modules": FIVE}
    recipe = write_recipe(model={"name_or_path": write_config(LLAMA2_7B)}, adapter=adapter)
    result = plan(recipe)
    told = result.to_json()
    assert told["groups"] == {
        **dict.fromkeys(["q_proj", "k_proj", "v_proj", "up_proj"], 2 * 64 * 4096),
        "down_proj": 2 * 64 * 11008,
    }
    assert {group.num_layers for group in result.groups} == {32}
    assert told["scale"] == 2
    assert json.loads(json.dumps(told)) == told
    assert told.keys() >= {"trainable_parameters", "base_parameters", "num_steps", "memory_gib"}


def test_plan_shows_the_scale_of_the_rule(write_recipe, write_config):
    adapter = {"r": 16, "target_modules": FIVE, "scale_rule": "rank_width"}
    recipe = write_recipe(model={"name_or_path": write_config(LLAMA2_7B)}, adapter=adapter)
    d = (4 * 4096 + 11008) / 5
    assert plan(recipe).scale == pytest.approx(32768 / (16 * d))
    result = CliRunner().invoke(app, ["plan", str(recipe)])
    assert f"s = {32768 / (16 * d):.4g}" in result.stdout
    lora = plan(recipe, ["adapter.scale_rule=none", "adapter.type=lora"])
    assert lora.scale is None


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"target_modules": "all-linear", "share": "input_dim", "side": "output"},
        {"groups": {"a": ["q_proj", "v_proj"]}, "target_modules": ["q_proj", "v_proj"]},
        {"type": "lora"},
        {"type": "dora"},
        {"type": "ia3", "peft": {"feedforward_modules": ["down_proj"]}},
    ],
    ids=str,
)
def test_counts_are_those_that_train_reports(write_recipe, adapter, read_run):
    recipe = write_recipe(adapter=adapter, train={"max_steps": 1})
    planned, trained = plan(recipe), train(recipe)
    assert planned.trainable_parameters == trained.trainable_parameters
    assert planned.num_steps == trained.num_steps == 1
    assert planned.num_rows == read_run(trained.run_dir)["data"]["num_rows"]
    checkpoint = trained.run_dir / "checkpoints" / "step-00000001" / "parameters.safetensors"
    from safetensors.torch import load_file

    learned = sum(tensor.numel() for tensor in load_file(checkpoint).values())
    assert learned == trained.trainable_parameters


def test_steps_follow_the_recipe(write_recipe):
    assert plan(write_recipe()).num_steps == 6  # ten rows by four, two epochs
    assert plan(write_recipe(), ["train.gradient_accumulation_steps=2"]).num_steps == 4
    assert plan(write_recipe(), ["train.max_steps=9"]).num_steps == 9


def test_memory_adds_up_and_follows_its_causes(write_recipe, write_config, monkeypatch):
    # Less free memory than this model needs lowers the size of a pass.
    monkeypatch.setattr(preflight, "measure_available", lambda: ("cpu", 64.0))
    recipe = write_recipe(
        model={"name_or_path": write_config(LLAMA2_7B)},
        adapter={"r": 64, "target_modules": FIVE},
    )

    def memory(*overrides):
        return plan(recipe, overrides).memory_gib

    usual = memory()
    parts = [value for name, value in usual.items() if name != "total"]
    assert usual["total"] == pytest.approx(sum(parts))
    gib = 2**30
    assert usual["base_weights"] == 2 * 6_738_415_616 / gib  # float16, as the config says
    assert usual["factors"] == usual["gradients"] == 4 * 3_506_176 / gib
    assert usual["optimizer"] == 8 * 3_506_176 / gib
    assert usual["ema"] == 0
    assert memory("train.ema_decay=0.99")["ema"] == usual["factors"]
    assert memory("model.dtype=float32")["base_weights"] == 2 * usual["base_weights"]
    assert memory("train.optim=sgd")["optimizer"] == 0
    longer = memory("data.max_length=128")  # twice 64
    assert longer["activations"] == pytest.approx(2 * usual["activations"], rel=0.01)
    wider = memory("train.per_device_train_batch_size=8")  # twice 4
    assert wider["activations"] == pytest.approx(2 * usual["activations"], rel=0.01)
    spared = memory("train.gradient_checkpointing=true")
    assert spared["activations"] < 0.1 * usual["activations"]
    assert spared["total"] < usual["total"]
    head = memory("adapter.modules_to_save=[lm_head]")
    assert head["factors"] == pytest.approx(usual["factors"] + 4 * 4096 * 32000 / gib)


def test_the_largest_batch_is_the_one_that_comes(write_recipe):
    rows = [{"prompt": "Q:", "completion": " ab" * n} for n in (1, 2, 3, 4, 20, 21)]
    recipe = write_recipe(rows=rows, train={"per_device_train_batch_size": 2})
    told = plan(recipe, ["train.gradient_accumulation_steps=3"])
    # All six rows make one step, cut by length: the two longest meet, end to end.
    longest = told.lengths["max"]
    assert told.largest_batch["sequences"] == 1
    assert longest < told.largest_batch["length"] < 2 * longest
    padded = plan(
        recipe, ["train.gradient_accumulation_steps=3", "model.attn_implementation=eager"]
    )
    assert padded.largest_batch == {**told.largest_batch, "sequences": 2, "length": longest}
    cut = plan(
        recipe, ["train.gradient_accumulation_steps=3", f"train.max_tokens_per_pass={longest}"]
    )
    assert cut.largest_batch["length"] == longest
    assert longest < told.largest_batch["labels"] < 2 * longest
    alone = plan(recipe, ["train.per_device_train_batch_size=1"])
    assert (alone.largest_batch["sequences"], alone.largest_batch["length"]) == (1, longest)
    assert alone.memory_gib["activations"] < told.memory_gib["activations"]
    packed = plan(recipe, ["data.packing=bfd", "data.max_length=256"])
    assert packed.largest_batch["sequences"] == 1
    assert packed.largest_batch["length"] > 2 * longest


def test_operations_follow_the_rows(write_recipe, write_config, monkeypatch):
    monkeypatch.setattr(preflight, "measure_available", lambda: ("cpu", 64.0))
    recipe = write_recipe()
    usual = plan(recipe)
    assert usual.train_flops == pytest.approx(usual.num_steps * usual.flops_per_step)
    twice = plan(recipe, ["train.num_train_epochs=4"])
    # The same rows twice as often, put together otherwise.
    assert twice.train_flops == pytest.approx(2 * usual.train_flops, rel=0.05)
    blind = plan(recipe, [f"model.name_or_path={write_config(LLAMA3_8B)}", "train.max_steps=3"])
    assert (blind.num_steps, blind.train_flops, blind.lengths) == (3, None, None)
    reasons = [reason.partition(":")[0] for reason in blind.unknown]
    assert reasons == ["rows and steps", "operations"]
    assert blind.largest_batch == {"sequences": 1, "length": 4 * 64, "labels": 4 * 63}


def test_what_does_not_fit_is_warned_of(write_recipe, listener, monkeypatch):
    monkeypatch.setattr("wegeft_cli.planning.plan.measure_available", lambda: ("cpu", 0.25))
    monkeypatch.setattr("wegeft_cli.planning.plan._measure_free_disk", lambda path: 1e-9)
    told = plan(write_recipe(), reporter=listener)
    assert told.available_gib == 0.25
    memory, disk = listener.warnings
    assert "0.25 GiB are free on cpu" in memory
    assert "train.per_device_train_batch_size (4)" in memory
    assert "train.save_total_limit" in disk


def test_disk_counts_every_checkpoint_that_lies_there(write_recipe, read_run):
    recipe = write_recipe(train={"save_steps": 2})

    def disk(*overrides):
        told = plan(recipe, overrides)
        return round(told.disk_gib / told.checkpoint_gib, 6)

    assert disk() == 3  # two and the one being written
    assert (
        disk(
            "train.load_best_model_at_end=true",
            "data.validation_fraction=0.2",
            "train.eval_steps=2",
        )
        == 4
    )
    assert disk("train.save_total_limit=null") == 4  # of six steps, and the one being written
    run = train(recipe)
    (newest,) = run.run_dir.glob("checkpoints/step-00000006")
    tensors = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    estimate = plan(recipe).checkpoint_gib * 2**30
    # Headers of a few KiB, and random states, are not counted.
    assert estimate < tensors < estimate + 40_000


def test_rows_longer_than_the_context_are_refused(write_recipe):
    with pytest.raises(UserError, match="context of 256"):
        plan(write_recipe(), ["data.max_length=300"])
    with pytest.raises(UserError, match="no template"):
        plan(write_recipe(), ["data.template=alpca"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim_args": {"bogus": 1}}, "does not know bogus"),
        ({"lr_scheduler_kwargs": {"bogus": 1}}, "does not know bogus"),
        (  # the rows make six steps
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 7},
            },
            "6 steps are too few",
        ),
    ],
)
def test_what_optimizer_or_schedule_refuse_is_found(write_recipe, settings, words):
    with pytest.raises(UserError, match=words):
        plan(write_recipe(train=settings))


def test_missing_data_leave_the_figures_open_and_bad_data_are_refused(write_recipe, tmp_path):
    recipe = write_recipe()
    (tmp_path / "tiny.jsonl").rename(tmp_path / "elsewhere.jsonl")
    result = plan(recipe)
    assert result.num_steps is None
    assert "tiny.jsonl" in result.unknown[0]
    assert plan(recipe, ["train.max_steps=5"]).num_steps == 5
    with pytest.raises(UserError, match="matches no linear"):
        plan(recipe, ["adapter.target_modules=[q_prj]"])
    (tmp_path / "tiny.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match="not JSON"):
        plan(recipe)


def test_the_command_prints_one_object(write_recipe):
    recipe = write_recipe()
    done = CliRunner().invoke(app, ["plan", str(recipe), "--json"])
    assert done.exit_code == 0
    told, expected = json.loads(done.stdout), plan(recipe).to_json()
    for moving in ("available_gib", "free_disk_gib"):
        assert told.pop(moving) > 0
        assert expected.pop(moving) > 0
    for moving in ("runtime", "total"):  # this process has grown in between
        grown = expected["memory_gib"].pop(moving) - told["memory_gib"].pop(moving)
        assert abs(grown) < 0.1
    assert told == expected
    shown = CliRunner().invoke(app, ["plan", str(recipe)])
    assert shown.exit_code == 0
    assert "896" in shown.stdout
