"""Every type of the installed PEFT is a method of a recipe, or is refused with its reason."""

from pathlib import Path

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.manifest import PEFT_TYPE
from wegeft_cli.errors import UserError
from wegeft_cli.methods.peft.loading import load_peft
from wegeft_cli.methods.peft.models import build_config, merge_peft, save_peft
from wegeft_cli.methods.peft.support import ADDED_IN, UNSUPPORTED, explain_name
from wegeft_cli.methods.registry import find_method
from wegeft_cli.recipe.schema import PEFT_TYPES, AdapterSection

FLOAT32 = 1e-5
PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
PRESETS = {"dora", "rslora", "pissa"}
TYPES = {str(getattr(kind, "value", kind)).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
METHODS = {
    "ia3": {}, "vblora": {"vector_length": 8}, "randlora": {}, "oft": {}, "hira": {},
    "ln_tuning": {}, "adamss": {}, "deft": {}, "frod": {}, "glora": {}, "gralora": {}, "osf": {},
    "peanut": {}, "psoft": {}, "pvera": {}, "shira": {}, "supertuning": {}, "tinylora": {},
    "unilora": {},
}  # fmt: skip


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_every_type_has_a_state():
    named = set(PEFT_TYPES) - PRESETS
    assert not named & set(UNSUPPORTED)
    assert TYPES - {PEFT_TYPE.lower()} <= named | set(UNSUPPORTED)
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for name in (*PEFT_TYPES, *UNSUPPORTED):
        (line,) = [line for line in lines if line.startswith("|") and f"`{name}`" in line[:200]][:1]
        assert ("refused" in line) == (name in UNSUPPORTED)
        assert ADDED_IN.get(name, "") in line


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # frod
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in TYPES, reason="a newer PEFT's"))
        for name in METHODS
    ],
)
def test_a_method_is_counted_saved_loaded_and_merged(llama_dir, tmp_path, name):
    method = find_method(name)
    section = AdapterSection(type=name, r=4, peft=METHODS[name])
    model = load(llama_dir)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    counted = sum(g.num_parameters for g in method.count(skeleton, section, "CAUSAL_LM"))
    torch.manual_seed(0)
    model = method.inject(model, section, task_type="CAUSAL_LM", seed=0)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning) == counted > 0
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.eval()
    save_peft(model, tmp_path, base_model_name_or_path=str(llama_dir))
    again = load_peft(load(llama_dir), Adapter.open(tmp_path))
    ids = torch.randint(4, 300, (2, 11), generator=torch.Generator().manual_seed(2))
    logits = model(ids).logits
    assert torch.equal(again(ids).logits, logits)
    merged, num_folded = merge_peft(again)
    assert num_folded >= 5
    assert (merged(ids).logits - logits).abs().max() < FLOAT32 * logits.abs().max()
    assert (logits - load(llama_dir)(ids).logits).abs().max() > 1e-4 * logits.abs().max()


def test_norms_are_chosen_by_name(llama_dir):
    method = find_method("ln_tuning")

    def learn(**settings):
        section = AdapterSection(type="ln_tuning", **settings)
        model = method.inject(load(llama_dir), section, task_type="CAUSAL_LM", seed=0)
        return sorted(n for n, p in model.named_parameters() if p.requires_grad)

    assert len(learn()) == 5
    assert len(learn(target_modules=["input_layernorm"])) == 2
    assert len(learn(modules_to_save=["model.norm"])) == 5
    with pytest.raises(UserError, match="'q_proj' names no norm") as caught:
        learn(target_modules=["q_proj"])
    assert "post_attention_layernorm" in caught.value.hint


@pytest.mark.skipif("beft" not in TYPES, reason="a newer PEFT's")
def test_layers_without_bias_are_refused_before_the_training(llama_dir):
    section = AdapterSection(type="beft")
    with pytest.raises(UserError, match="q_proj' has no bias, and 'beft' could not be merged"):
        find_method("beft").inject(load(llama_dir), section, task_type="CAUSAL_LM", seed=0)


def test_the_alpha_of_a_recipe_reaches_methods_that_call_it_alpha():
    given = {"rank": 4, "target_modules": ["q_proj"], "options": {}, "task_type": "CAUSAL_LM"}
    assert build_config("loha", alpha=3, **given).alpha == 3
    assert build_config("loha", alpha=None, **given).alpha == 8  # PEFT's own default


def test_a_type_of_a_newer_peft_names_the_version(monkeypatch):
    import peft.mapping

    older = {k: v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items() if "HIRA" not in str(k)}
    monkeypatch.setattr(peft.mapping, "PEFT_TYPE_TO_CONFIG_MAPPING", older)
    with pytest.raises(UserError, match="has no method 'hira'") as caught:
        build_config("hira", 4, None, ["q_proj"], {}, "CAUSAL_LM")
    assert caught.value.hint == "pip install 'peft>=0.20'"


def test_a_rank_above_the_layers_entries_is_refused(llama_dir):
    config = load(llama_dir).config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    section = AdapterSection(type="shira", r=512)
    with pytest.raises(UserError, match="more entries than a layer") as caught:
        find_method("shira").count(skeleton, section, "CAUSAL_LM")
    assert caught.value.key == "adapter.r"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_refused_type_names_an_alternative(name):
    reason, hint = explain_name(name.upper())
    assert reason
    assert hint.startswith("use `")
    assert hint.split("`")[1] in PEFT_TYPES
