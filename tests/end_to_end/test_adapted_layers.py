"""Which layers a run adapts: the same for every method, without layers that cannot learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

from wegeft_cli.cli.app import app
from wegeft_cli.errors import UserError
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.layers.owner import disable_generators
from wegeft_cli.methods.wegeft.save_load import load_adapter
from wegeft_cli.models.loading import build_skeleton
from wegeft_cli.planning.plan import plan
from wegeft_cli.planning.targets import settle_targets
from wegeft_cli.planning.validate import validate_recipe
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.reporter import SilentReporter
from wegeft_cli.runs.train import train

TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {**TINY, "num_local_experts": 4},
    "deepseek_v3": {
        **TINY, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    },
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "bart": {
        "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24,
    },
    "gemma3": {
        "text_config": {**TINY, "sliding_window": 8},
        "vision_config": {
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
}  # fmt: skip

# Layers with a state run position by position on a CPU.
SHORT_ROWS = [{"prompt": f"Q{n}:", "completion": " a"} for n in range(4)]


@pytest.fixture
def write(
    write_recipe: Callable[..., Path], build_tokenizer: Callable[..., Any], tmp_path: Path
) -> Callable[..., Path]:
    """A function: a recipe for a tiny checkpoint of a family."""

    def write(kind: str, **adapter: Any) -> Path:
        folder, tokenizer = tmp_path / kind, build_tokenizer()
        if not folder.exists():
            torch.manual_seed(0)
            values = {key: dict(v) if isinstance(v, dict) else v for key, v in KINDS[kind].items()}
            sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
            values.get("text_config", values).update(sizes)
            auto = AutoModelForImageTextToText if kind == "gemma3" else AutoModelForCausalLM
            model = auto.from_config(AutoConfig.for_model(kind, **values))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return write_recipe(
            name=f"{kind}-{len(list(tmp_path.iterdir()))}",
            model={"name_or_path": str(folder)},
            adapter={"r": 2, "target_modules": "all-linear", **adapter},
            data={"max_length": 64},
            train={"max_steps": 1},
            rows=SHORT_ROWS,
        )

    return write


class Notes(SilentReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def count_file(run_dir: Path) -> int:
    tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


def adapted(recipe: Path) -> list[str]:
    """Return the layers in the file of an adapter."""
    config = json.loads((recipe / "adapter" / "adapter_config.json").read_text())
    return list(config["modules"])


@pytest.mark.parametrize(
    ("kind", "omitted"),
    [
        ("mamba", "backbone.layers.0.mixer.dt_proj"),
        ("bart", "model.decoder.layers.0.encoder_attn.q_proj"),
        ("gemma3", "model.vision_tower.encoder.layers.0.self_attn.q_proj"),
    ],
)
def test_layers_that_cannot_learn_are_omitted(
    write: Callable[..., Path], kind: str, omitted: str
) -> None:
    recipe, said = write(kind), Notes()
    planned = plan(recipe)
    result = train(recipe, reporter=said)
    assert planned.trainable_parameters == result.trainable_parameters == count_file(result.run_dir)
    [omission] = planned.omitted
    assert omitted in omission.names
    assert omission.num_parameters > 0
    assert any(f"`all-linear` omits {omission}" == note for note in said.notes)
    assert not set(omission.names) & set(adapted(result.run_dir))
    assert f"Not adapted: {omission}." in (result.run_dir / "adapter" / "README.md").read_text()
    if kind == "bart":
        table = CliRunner().invoke(app, ["plan", str(recipe)]).output
        assert "not adapted: layers that the task does not run" in table


@pytest.mark.parametrize("num_layers", [2, 3, 5])
def test_the_last_of_many_equal_layers_is_traced_too(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, num_layers: int
) -> None:
    """Two of the layers are run: the second stands for the last one."""
    monkeypatch.setitem(KINDS["mamba"], "num_hidden_layers", num_layers)
    recipe = write("mamba")
    [omission] = plan(recipe).omitted
    assert {f"backbone.layers.{n}.mixer.dt_proj" for n in range(num_layers)} <= set(omission.names)
    with pytest.raises(UserError, match="dt_proj"):
        plan(recipe, ["adapter.target_modules=[dt_proj]"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_of_a_float32_base_train_in_mixed_precision(
    write: Callable[..., Path], precision: str, implementation: str
) -> None:
    from wegeft_cli.methods.wegeft.inject import inject_generators

    recipe = load_recipe(write("mixtral")).recipe
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype="float32")
    model.set_experts_implementation(implementation)
    generators = inject_generators(model, rank=2, target_modules="all-linear")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.autocast("cpu", dtype=dtype):
        loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()
    experts = [name for name in generators["default"].groups if "gate_up_proj" in name]
    assert experts
    for name in experts:
        assert generators["default"][name].phi.grad.abs().max() > 0


def test_lora_adapts_the_experts_that_a_list_names(write: Callable[..., Path]) -> None:
    named = {"target_modules": ["gate_up_proj", "down_proj", "q_proj"]}
    planned = plan(write("mixtral", type="lora", **named))
    names = {name for group in planned.groups for name in [group.name]}
    only_q = plan(write("mixtral", type="lora", target_modules=["q_proj"]))
    assert planned.trainable_parameters > only_q.trainable_parameters, names
    assert not planned.omitted
    dora = plan(write("mixtral", type="dora", **named))
    [omission] = dora.omitted
    assert "model.layers.0.mlp.experts.down_proj" in omission.names
    assert "stacked experts" in str(omission)


@pytest.mark.parametrize("excluded", [["in_proj"], ".*in_proj"])
def test_idle_layers_are_excluded_beside_those_of_the_user(
    write: Callable[..., Path], excluded: Any
) -> None:
    recipe = load_recipe(
        write(
            "mamba",
            type="lora",
            target_modules=".*(x_proj|in_proj|dt_proj)",
            peft={"exclude_modules": excluded},
        )
    ).recipe
    skeleton = build_skeleton(recipe.model)[1]
    section = settle_targets(recipe, skeleton).section
    joined = section.peft["exclude_modules"]
    text = joined if isinstance(joined, str) else " ".join(joined)
    assert "in_proj" in text
    assert "dt_proj" in text
    assert isinstance(joined, type(excluded))


def test_named_layers_that_cannot_learn_are_a_fault(write: Callable[..., Path]) -> None:
    recipe = write("mamba", target_modules=["in_proj", "dt_proj"])
    with pytest.raises(UserError, match=r"'dt_proj' names layers that cannot learn") as caught:
        plan(recipe)
    assert caught.value.key == "adapter.target_modules"
    with pytest.raises(UserError, match="'dt_proj' names layers that cannot learn"):
        validate_recipe(recipe)
    recipe = write("mamba", groups={"a": ["in_proj"], "b": ["dt_proj"]})
    with pytest.raises(UserError, match="'dt_proj' names layers that cannot learn") as caught:
        plan(recipe)
    assert caught.value.key == "adapter.groups.b"


@pytest.mark.parametrize("method", ["wegeft", "lora"])
def test_a_name_of_which_some_layers_learn_adapts_these(
    write: Callable[..., Path], method: str
) -> None:
    said = Notes()
    recipe = write("gemma3", type=method, target_modules=["q_proj"])
    result = train(recipe, reporter=said)
    assert any("not adapted: layers that the task does not run" in text for text in said.warnings)
    tensors = load_file(result.run_dir / "adapter" / "adapter_model.safetensors")
    assert plan(recipe).trainable_parameters == sum(t.numel() for t in tensors.values())
    assert not any("vision" in name for name in tensors)
    if method == "wegeft":
        assert not any("vision" in name for name in adapted(result.run_dir))


def test_lora_adapts_the_layers_that_wegeft_adapts(write: Callable[..., Path]) -> None:
    """On a mixture PEFT's own `all-linear` would adapt the router and drop dense layers."""
    for kind in ("mixtral", "deepseek_v3"):
        recipe, said = write(kind, type="lora"), Notes()
        result = train(recipe, reporter=said)
        planned = plan(recipe)
        assert [omission.what for omission in planned.omitted] == ["routers"]
        assert any("`all-linear` omits routers" in note for note in said.notes)
        counted = planned.trainable_parameters
        assert counted == result.trainable_parameters == count_file(result.run_dir)
        tensors = load_file(result.run_dir / "adapter" / "adapter_model.safetensors")
        names = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}
        expected = {
            name.replace(".experts.gate_up_proj", ".experts.base_layer").replace(
                ".experts.down_proj", ".experts"
            )
            for name in adapted(train(write(kind)).run_dir)
        }
        assert names == expected
        merge([result.run_dir], output=result.run_dir.parent / f"{kind}-merged")


def test_a_method_that_cannot_adapt_experts_says_so(write: Callable[..., Path]) -> None:
    recipe, said = write("deepseek_v3", type="dora"), Notes()
    result = train(recipe, reporter=said)
    assert plan(recipe).trainable_parameters == count_file(result.run_dir)
    text = " ".join(said.notes)
    assert "experts, which PEFT's dora does not adapt (" in text
    assert "layers that PEFT takes for experts" in text
    recipe = write("mixtral", side="output")
    omitted = {omission.what: omission.num_parameters for omission in plan(recipe).omitted}
    assert omitted == {"routers": 128, "experts, which have no output side": 9216}


@pytest.mark.parametrize(
    ("method", "options", "takes_experts"),
    [
        ("lora", {}, True),
        ("rslora", {}, True),
        ("lora", {"lora_dropout": 0.1}, False),
        ("adalora", {}, False),
    ],
)
def test_lora_without_variants_takes_experts(
    write: Callable[..., Path], tmp_path: Path, method: str, options: dict[str, Any],
    takes_experts: bool,
) -> None:  # fmt: skip
    recipe = load_recipe(write("mixtral", type=method, peft=options)).recipe
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral").to("meta")
    setup = settle_targets(recipe, model)
    assert ("target_parameters" in setup.section.peft) == takes_experts
    assert any("experts" in omission.what for omission in setup.omitted) != takes_experts


def test_dense_models_keep_the_names_that_peft_finds(
    llama_dir: Path, write_recipe: Callable[..., Path]
) -> None:
    adapter = {"type": "lora", "r": 2, "target_modules": "all-linear"}
    recipe = load_recipe(write_recipe(adapter=adapter)).recipe
    model = AutoModelForCausalLM.from_pretrained(llama_dir).to("meta")
    assert settle_targets(recipe, model).section == recipe.adapter


def test_the_trace_leaves_the_model_as_it_was(write: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(write("mixtral")).recipe
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral").to("meta")
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    modes = [(module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    settle_targets(recipe, model)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before
    assert modes == [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_the_experts_of_a_mixture_on_the_command_line(
    write: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    def run(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    recipe = write(kind)
    steps = ["train.max_steps=3", "train.save_steps=1"]
    planned = json.loads(run("plan", recipe, *steps, "--json"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained = json.loads(run("train", recipe, *steps, f"output_dir={whole}", "--json"))
    assert planned["trainable_parameters"] == trained["trainable_parameters"] == count_file(whole)
    assert planned["omitted"][0]["what"] == "routers"

    asked = iter([False])
    train(recipe, [*steps, f"output_dir={parts}"], should_stop=lambda: next(asked, True))
    assert not (parts / "adapter").exists()
    run("train", recipe, *steps, f"output_dir={parts}", "--resume", "auto")
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()

    run("merge", whole, "--output", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    load_adapter(model, whole / "adapter")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        with disable_generators(model):
            assert (merged(ids).logits - model(ids).logits).abs().max() > 1e-4
    answers = []
    for name, place in (("adapter", whole), ("merged", tmp_path / "merged")):
        output = tmp_path / f"{name}.jsonl"
        run("generate", place, "-p", "Q1:", "--max-new-tokens", "4", "--output", output)
        answers.append(json.loads(output.read_text()))
    assert answers[0] == answers[1]


def test_a_checkpoint_of_other_layers_is_refused_with_the_difference(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of an earlier version is, whose `all-linear` chose other layers."""
    recipe = write("mamba")
    asked: list[int] = []
    stopped = train(
        recipe,
        ["train.max_steps=3", "adapter.target_modules=[in_proj, x_proj]"],
        should_stop=lambda: bool(asked) or asked.append(1) is not None,
    )
    assert stopped.status == "interrupted"
    kept = stopped.run_dir / "recipe.yaml"
    text = kept.read_text()
    begun = text.index("  target_modules:")
    end = text.index("  share:", begun)
    kept.write_text(f"{text[:begun]}  target_modules: all-linear\n{text[end:]}")
    [checkpoint] = (stopped.run_dir / "checkpoints").iterdir()
    for action in (
        lambda: train(kept, resume="auto"),
        lambda: merge(checkpoint, output=stopped.run_dir / "merged"),
    ):
        with pytest.raises(UserError, match=r"it lacks \S*out_proj") as caught:
            action()
        assert "adapter.target_modules" in caught.value.hint


def test_inside_peft_an_adapter_of_experts_is_refused_by_its_cause(
    write: Callable[..., Path],
) -> None:
    from peft import PeftModel

    import wegeft_cli.interop.peft  # noqa: F401

    recipe = write("mixtral")
    adapter = train(recipe).run_dir / "adapter"
    base = AutoModelForCausalLM.from_pretrained(load_recipe(recipe).recipe.model.name_or_path)
    with pytest.raises(ValueError, match="stacked weight of experts"):
        PeftModel.from_pretrained(base, str(adapter))
