"""What PEFT promises of any method, on every kind of model: the public matrix of its own tests.

`docs/peft.md` states how many of these there are; a test here counts them.
"""

import copy
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import yaml
from packaging.version import Version
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from tests.peft_suite.conftest import KINDS, PEFT_MARKS, draw_factors, factors_of
from wegeft_cli.artifacts.adapter_files import load_adapter_files

pytestmark = PEFT_MARKS
PEFT_VERSION = Version(peft.__version__)
# Before, some classes of PEFT lack the argument, and others lose it on the way.
CAN_ADD_IN_16_BITS = Version("0.21") <= PEFT_VERSION
CONVERTS = Version("0.19") <= PEFT_VERSION
# Float32 by another order of the same sums, relative to outputs of order 1 to 10.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
# bfloat16 keeps 8 bits of a number; a few dozen roundings on the way, relative to the whole output.
HALF = 0.05
HALVES = [torch.bfloat16, torch.float16]


def has_layers(model):
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def distance(output, expected):
    """How far an output is off, relative to how large it is."""
    return float((output.float() - expected).norm() / expected.norm())


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_new_adapter_changes_nothing(subject):
    base = subject.run(subject.base())
    assert subject.run(subject.adapted(seed=None)).equal(base)


def test_drawn_factors_change_the_output(subject):
    base = subject.run(subject.base())
    assert (subject.run(subject.adapted()) - base).abs().max() > 0.1


def test_both_factors_are_drawn_if_asked(subject, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(subject.base(), subject.kind.config(init_weights=False))
    assert (subject.run(model) - subject.run(subject.base())).abs().max() > 1e-4
    assert all(factor.any() for factor in factors_of(model).values())
    before = subject.run(model)
    model.save_pretrained(tmp_path)
    assert "init_weights" not in (tmp_path / "adapter_config.json").read_text()
    load_adapter_files(tmp_path)
    assert subject.run(PeftModel.from_pretrained(subject.base(), tmp_path)).equal(before)


def test_each_layer_states_its_widths(subject):
    layers = [m for m in subject.adapted().modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    for layer in layers:
        weight = layer.base_layer.weight
        widths = weight.shape if subject.kind.name == "gpt2" else weight.shape[::-1]
        assert (layer.in_features, layer.out_features) == tuple(widths)


def test_only_the_adapter_is_trainable(subject):
    model = subject.adapted()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    saved = {name for name in trainable if ".modules_to_save." in name}
    assert trainable - saved == set(factors_of(model))
    # A classifier is trained by PEFT's own rule; nothing else is.
    assert bool(saved) == (subject.kind.name == "bert")


def test_each_factor_is_one_parameter_of_one_group(subject):
    names = set(factors_of(subject.adapted()))
    expected = {
        f"base_model.wegeft_{kind}_{group}.default"
        for group in subject.kind.groups
        for kind in ("phi", "psi")
    }
    assert names == expected


def test_the_count_of_parameters_is_2_r_d_per_group(subject):
    model = subject.adapted()
    total = sum(p.numel() for p in factors_of(model).values())
    widths = {name: p.shape[0] for name, p in factors_of(model).items() if "_phi_" in name}
    assert total == sum(2 * 4 * width for width in widths.values())
    assert model.get_nb_trainable_parameters()[0] >= total


def test_save_and_load(subject, tmp_path):
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path)
    assert subject.run(loaded).equal(subject.run(model))


def test_the_folder_holds_the_adapter_alone(subject, tmp_path):
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    factors = {name.removesuffix(".default") for name in factors_of(model)}
    assert {name for name in tensors if "wegeft" in name} == factors
    assert all("classifier" in name for name in set(tensors) - factors)


def test_save_and_load_selected_adapters(subject, tmp_path):
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config(r=2))
    draw_factors(model, "other", 3)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert not (tmp_path / "adapter_config.json").exists()
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path / "other", adapter_name="mine")
    assert subject.run(loaded).equal(subject.run(model.eval()))
    with pytest.raises(ValueError, match="nobody"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])


def test_save_and_load_all_adapters(subject, tmp_path):
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config(r=2))
    draw_factors(model, "other", 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="second")
    assert subject.run(loaded).equal(subject.run(model))
    model.set_adapter("other")
    loaded.set_adapter("second")
    assert subject.run(loaded.eval()).equal(subject.run(model.eval()))


def test_load_without_memory_for_fresh_factors(subject, tmp_path):
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert "meta" not in {p.device.type for p in loaded.parameters()}
    assert subject.run(loaded).equal(subject.run(model))
    loaded.set_adapter("other")
    assert subject.run(loaded).equal(subject.run(model))


def test_load_without_memory_keeps_float32_over_a_16_bit_base(subject, tmp_path):
    model = subject.adapted(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    base = subject.base(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    for name, parameter in factors_of(loaded).items():
        assert parameter.equal(factors_of(model)[name])
    assert subject.run(loaded).equal(subject.run(model))


def test_a_loaded_adapter_is_frozen_unless_asked(subject, tmp_path):
    subject.adapted().save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(subject.base(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    trainable = PeftModel.from_pretrained(subject.base(), tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in factors_of(trainable).values())


def test_the_config_reads_back(subject, tmp_path):
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is type(subject.kind.config())
    own = model.peft_config["default"]
    for key in ("r", "alpha", "scale", "side", "init", "share", "dropout", "target_modules"):
        assert getattr(config, key) == getattr(own, key)
    assert config.inference_mode
    assert set(config.modules.values() if subject.kind.name != "gpt2" else ()) <= set(
        subject.kind.groups
    )


def test_state_dicts_go_in_and_out(subject):
    model, other = subject.adapted(), subject.adapted(seed=8)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert subject.run(other).equal(subject.run(model))


def test_switching_adapters(subject):
    model = subject.adapted()
    first = subject.run(model)
    model.add_adapter("other", subject.kind.config(r=2, alpha=1.0))
    draw_factors(model, "other", 3)
    assert subject.run(model).equal(first)
    model.set_adapter("other")
    other = subject.run(model.eval())
    assert not torch.allclose(other, first, **FLOAT32)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and ".wegeft_" in n}
    assert trainable == set(factors_of(model, "other"))
    model.set_adapter("default")
    assert subject.run(model.eval()).equal(first)


def test_adapters_of_different_layers_and_sharing(subject):
    model = subject.adapted()
    first = subject.run(model)
    config = subject.kind.config(target_modules=[subject.kind.excluded], share="none")
    model.add_adapter("other", config)
    draw_factors(model, "other", 3)
    assert subject.run(model).equal(first)
    model.set_adapter("other")
    alone = get_peft_model(subject.base(), copy.deepcopy(config)).eval()
    draw_factors(alone, "default", 3)
    assert subject.run(model.eval()).equal(subject.run(alone))


def test_loading_another_adapter_leaves_the_first_trainable(subject, tmp_path):
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="reference")
    assert all(p.requires_grad for p in factors_of(model).values())
    assert not any(p.requires_grad for p in factors_of(model, "reference").values())


def test_requires_grad_can_be_set_by_name(subject):
    model = subject.adapted()
    model.set_requires_grad("default", requires_grad=False)
    assert not any(p.requires_grad for p in factors_of(model).values())
    model.set_requires_grad("default")
    assert all(p.requires_grad for p in factors_of(model).values())


def test_disabling_gives_the_base(subject):
    model = subject.adapted()
    before, base = subject.run(model), subject.run(subject.base())
    with model.disable_adapter():
        assert subject.run(model).equal(base)
    assert subject.run(model).equal(before)
    assert all(p.requires_grad for p in factors_of(model).values())


def test_disabling_a_merged_adapter_gives_the_base(subject):
    model = subject.adapted()
    base = subject.run(subject.base())
    model.merge_adapter()
    with model.disable_adapter():
        assert subject.run(model).equal(base)


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload(subject, safe):
    model = subject.adapted()
    before = subject.run(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is type(subject.base())
    assert not has_layers(merged)
    torch.testing.assert_close(subject.run(merged), before, **FLOAT32)


def test_a_safe_merge_refuses_what_is_not_finite(subject):
    model = subject.adapted()
    with torch.no_grad():
        for parameter in factors_of(model).values():
            parameter.view(-1)[0] = torch.nan
    before = state(model.get_base_model())
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    after = model.get_base_model().state_dict()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_merge_and_unmerge(subject):
    model = subject.adapted()
    before, weights = subject.run(model), state(model.get_base_model())
    model.merge_adapter()
    changed = [n for n, t in model.get_base_model().state_dict().items() if not t.equal(weights[n])]
    assert changed
    torch.testing.assert_close(subject.run(model), before, **FLOAT32)
    model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert all(after[name].equal(tensor) for name, tensor in weights.items())
    assert subject.run(model).equal(before)


@pytest.mark.parametrize("dtype", HALVES)
def test_unmerge_is_exact_in_16_bits(subject, dtype):
    model = subject.adapted(dtype=dtype)
    before = subject.run(model)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert subject.run(model).equal(before)


def test_several_adapters_merge_to_the_sum_of_their_changes(subject):
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config(r=2))
    draw_factors(model, "other", 3)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    expected = [
        m.weight + m.get_delta_weight("default") + m.get_delta_weight("other") for m in layers
    ]
    model.merge_adapter(adapter_names=["default", "other"])
    for layer, weight in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.weight, weight, **FLOAT32)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["other"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(adapter_names=["default"])
    for layer, weight in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.weight, weight, **FLOAT32)


def test_several_active_adapters_add_up(subject):
    if subject.kind.name == "bert":
        pytest.skip("PEFT itself lets one adapter alone have a classifier")
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config(r=2))
    draw_factors(model, "other", 3)
    model.base_model.set_adapter(["default", "other"])
    together = subject.run(model.eval())
    assert all(p.requires_grad for p in factors_of(model, "other").values())
    torch.testing.assert_close(subject.run(model.merge_and_unload()), together, **FLOAT32)


def test_a_weighted_sum_of_adapters(subject):
    if subject.kind.name == "bert":
        pytest.skip("its adapters bring a classifier, which is refused: test_settings")
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config(r=2))
    draw_factors(model, "other", 3)
    before = subject.run(model)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", combination_type="cat")
    assert subject.run(model).equal(before)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    for layer in layers:
        torch.testing.assert_close(
            layer.get_delta_weight("sum"),
            0.5 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("other"),
            **FLOAT32,
        )
    model.set_adapter("sum")
    torch.testing.assert_close(subject.run(model.merge_and_unload()), subject.run(model), **FLOAT32)


def test_delete_the_active_adapter(subject):
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config(r=2))
    draw_factors(model, "other", 3)
    with pytest.warns(UserWarning, match="which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert not factors_of(model)
    assert factors_of(model, "other")
    alone = subject.adapted(seed=3, r=2)
    torch.testing.assert_close(subject.run(model.eval()), subject.run(alone), **FLOAT32)


def test_delete_another_adapter_and_add_it_anew(subject):
    model = subject.adapted()
    before = subject.run(model)
    model.add_adapter("other", subject.kind.config(r=2))
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert not factors_of(model, "other")
    model.add_adapter("other", subject.kind.config(r=3))
    assert factors_of(model, "other")
    assert subject.run(model.eval()).equal(before)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("nobody")


def test_unload_gives_the_base(subject):
    model = subject.adapted()
    base = model.unload()
    assert not has_layers(base)
    assert subject.run(base).equal(subject.run(subject.base()))


def test_an_unloaded_model_takes_a_new_adapter(subject):
    model = subject.adapted()
    again = get_peft_model(model.unload(), subject.kind.config()).eval()
    draw_factors(again, "default", 1)
    assert subject.run(again).equal(subject.run(subject.adapted()))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_16_bit_base_keeps_float32_factors(subject, dtype):
    model = subject.adapted(dtype=dtype)
    assert {p.dtype for p in factors_of(model).values()} == {torch.float32}
    output = subject.run(model)
    assert output.dtype == dtype
    assert distance(output, subject.run(subject.adapted())) < HALF


@pytest.mark.parametrize("dtype", HALVES)
def test_factors_follow_the_base_if_asked(subject, dtype):
    config = subject.kind.config()
    model = get_peft_model(subject.base(dtype), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in factors_of(model).values()} == {dtype}
    if CAN_ADD_IN_16_BITS:
        model.add_adapter("other", subject.kind.config(), autocast_adapter_dtype=False)
        assert {p.dtype for p in factors_of(model, "other").values()} == {dtype}
    assert subject.run(model.eval()).dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_a_cast_of_the_whole_model(subject, dtype, tmp_path):
    model = subject.adapted().to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    output = subject.run(model)
    assert output.dtype == dtype
    assert distance(output, subject.run(subject.adapted())) < HALF
    model.save_pretrained(tmp_path)
    factors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for n, t in factors.items() if "wegeft" in n} == {torch.float32}


def test_mixed_types_in_one_model(subject):
    model = subject.adapted()
    before = subject.run(model)
    for parameter in factors_of(model).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert distance(subject.run(model), before) < HALF
    subject.loss(model).backward()
    assert {p.grad.dtype for p in factors_of(model).values()} == {torch.bfloat16}


def test_autocast(subject):
    model = subject.adapted()
    plain = subject.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        cast = subject.run(model)
        subject.loss(model).backward()
    assert distance(cast, plain) < HALF
    assert {p.grad.dtype for p in factors_of(model).values()} == {torch.float32}


def test_modules_to_save(subject, tmp_path):
    name = subject.kind.to_save
    model = subject.adapted(modules_to_save=[name])
    wrapped = [n for n, p in model.named_parameters() if f"{name}.modules_to_save.default" in n]
    assert wrapped
    with torch.no_grad():
        for parameter in wrapped:
            model.get_parameter(parameter).add_(0.5)
    assert all(model.get_parameter(n).requires_grad for n in wrapped)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path)
    assert subject.run(loaded).equal(subject.run(model))
    with loaded.disable_adapter():
        assert subject.run(loaded).equal(subject.run(subject.base()))
    torch.testing.assert_close(
        subject.run(loaded.merge_and_unload()), subject.run(model), **FLOAT32
    )


def test_training_moves_the_adapter_alone(subject):
    model = subject.adapted(seed=None)
    before = state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = subject.loss(model)
        loss.backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    saved = {name for name in moved if "modules_to_save" in name}
    assert moved - saved == set(factors_of(model))
    assert subject.loss(model) < loss


def test_training_some_layers(subject):
    if subject.kind.layers is None:
        pytest.skip("a model without a list of layers")
    config = {"layers_to_transform": [1], "layers_pattern": subject.kind.layers}
    model = subject.adapted(**config)
    names = list(model.peft_config["default"].modules)
    assert names
    assert all(f"{subject.kind.layers}.1." in name for name in names)
    again = subject.adapted(layers_to_transform=1)
    assert list(again.peft_config["default"].modules) == names
    with pytest.raises(ValueError, match="layers_to_transform"):
        subject.adapted(layers_to_transform=[7])


def test_excluded_modules(subject):
    model = subject.adapted(exclude_modules=[subject.kind.excluded])
    names = list(model.peft_config["default"].modules)
    assert names
    assert not any(name.endswith(subject.kind.excluded) for name in names)
    if subject.kind.name != "bert":  # its classifier is excluded by PEFT's own rule
        with pytest.warns(UserWarning, match="no modules were excluded"):
            subject.adapted(exclude_modules=["nothing_like_it"])


def test_targets_that_match_nothing_are_told(subject):
    with pytest.raises(ValueError, match=r"no_such_proj|No modules were targeted"):
        subject.adapted(target_modules=["no_such_proj"])


def test_all_linear(subject):
    model = subject.adapted(target_modules="all-linear", share="none")
    names = list(model.peft_config["default"].modules)
    linears = {
        name
        for name, module in subject.base().named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    heads = {"lm_head", "classifier"} & linears
    assert set(names) == linears - heads
    # A second adapter finds the same layers in the model that has one already.
    model.add_adapter("other", subject.kind.config(target_modules="all-linear", share="none"))
    assert list(model.peft_config["other"].modules) == names


def test_a_regular_expression(subject):
    pattern = rf".*{re.escape(subject.kind.excluded)}"
    model = subject.adapted(target_modules=pattern)
    names = list(model.peft_config["default"].modules)
    assert names
    assert all(name.endswith(subject.kind.excluded) for name in names)


def test_the_change_of_a_weight(subject):
    model = subject.adapted()
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    before = [layer.weight.clone() for layer in layers]
    changes = [layer.get_delta_weight("default") for layer in layers]
    model.merge_adapter()
    assert layers
    for layer, weight, change in zip(layers, before, changes, strict=True):
        torch.testing.assert_close(layer.weight, weight + change, **FLOAT32)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.skipif(not CONVERTS, reason="PEFT converts to LoRA from 0.19 on")
def test_conversion_to_lora(subject, tmp_path):
    from peft.tuners.lora.conversion import save_as_lora

    model = subject.adapted()
    if subject.kind.name == "opt":
        assert not model.supports_lora_conversion()
        with pytest.raises(TypeError, match="do not support LoRA"):
            save_as_lora(tmp_path, model, rank=4)
        return
    assert model.supports_lora_conversion()
    rank = 4 if subject.kind.name != "mlp" else 3
    model = subject.adapted(r=rank)
    save_as_lora(tmp_path, model, rank=rank)
    lora = PeftModel.from_pretrained(subject.base(), tmp_path)
    if subject.kind.name != "bert":
        assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(subject.run(lora), subject.run(model), **FLOAT32)


def test_the_status_of_a_model(subject):
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config())
    status = model.get_model_status()
    assert status.peft_types == {"default": "WEGEFT", "other": "WEGEFT"}
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    layers = model.get_layer_status()
    assert {s.module_type for s in layers} <= {"wegeft.WegeftLinear", "ModulesToSaveWrapper"}
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"] or subject.kind.name == "bert"


def test_a_copy_is_a_copy(subject):
    model = subject.adapted()
    before = subject.run(model)
    twin = copy.deepcopy(model)
    assert subject.run(twin).equal(before)
    draw_factors(twin, "default", 9)
    assert subject.run(model).equal(before)
    assert not subject.run(twin).equal(before)


def test_a_model_prints(subject):
    assert "wegeft.WegeftLinear" in repr(subject.adapted())


def test_rows_of_a_batch_cannot_have_their_own_adapters(subject):
    model = subject.adapted()
    with pytest.raises(ValueError, match="one batch, one adapter"):
        model(**subject.inputs(), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_generation(subject, dtype):
    if not hasattr(subject.base(), "generate") or subject.kind.name == "bert":
        pytest.skip("a model that does not generate")
    model = subject.adapted(dtype=dtype)
    ids = subject.inputs()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert tokens.shape[1] > ids.shape[1]
    # Positional arguments, and without an attention mask.
    assert model.generate(ids, **options).equal(tokens)
    merged = model.merge_and_unload().generate(ids, **options)
    if dtype == torch.float32:
        assert merged.equal(tokens)


def test_an_adapter_of_any_name(subject):
    model = get_peft_model(subject.base(), subject.kind.config(), adapter_name="my-own").eval()
    assert factors_of(model, "my-own")
    assert not factors_of(model)
    assert model.active_adapters == ["my-own"]
    draw_factors(model, "my-own", 1)
    assert subject.run(model).equal(subject.run(subject.adapted()))


def test_names_that_hold_other_names_are_told_apart(subject, tmp_path):
    model = subject.adapted()
    names = set(get_peft_model_state_dict(model))
    for number, name in enumerate(["default2", "other_default", "foodefault_bar", "efaul"]):
        model.add_adapter(name, subject.kind.config())
        draw_factors(model, name, 10 + number)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    saved = set(load_file(tmp_path / "adapter_model.safetensors"))
    if Version("0.19") > PEFT_VERSION:
        # It saves every adapter's tensors with each, of any method but LoRA; the others' keep
        # their adapters' names, and both roads read past them.
        saved = {name for name in saved if "." not in name.partition("wegeft_")[2]}
        saved |= {name for name in names if "wegeft_" not in name}
    assert saved == names
    assert set(load_adapter_files(tmp_path).factors) == {
        name.partition("wegeft_phi_")[2] for name in names if "wegeft_phi_" in name
    }
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path)
    assert subject.run(loaded).equal(subject.run(subject.adapted()))


def test_a_config_given_at_loading_is_the_one_in_use(subject, tmp_path):
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    config = subject.kind.config()
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode
    assert subject.run(loaded).equal(subject.run(model))


def test_loading_several_adapters_misses_no_key(subject, tmp_path):
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path)
    for name in ("other", "yet-another"):
        result = loaded.load_adapter(tmp_path, adapter_name=name)
        assert not [key for key in result.missing_keys if "wegeft" in key or "classifier" in key]
        assert not result.unexpected_keys
        loaded.set_adapter(name)
        assert subject.run(loaded).equal(subject.run(model))


def test_the_older_kind_of_file_goes_out_and_in(subject, tmp_path):
    """PEFT's `safe_serialization=False`; this package's own commands refuse such a file."""
    model = subject.adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path)
    assert subject.run(loaded).equal(subject.run(model))


def test_the_card_names_the_library_and_the_base_and_keeps_what_somebody_wrote(subject, tmp_path):
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    _, front, body = card.read_text(encoding="utf-8").split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "peft"
    name = model.config.to_dict()["_name_or_path"] if subject.is_transformers else None
    assert values.get("base_model") == name
    card.write_text(f"---\n{front}---\n{body}\nMine.\n", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert "Mine." in card.read_text(encoding="utf-8")


def test_loading_with_a_device_map(subject, tmp_path):
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path, device_map={"": "cpu"})
    assert subject.run(loaded).equal(subject.run(model))


def test_merging_again_changes_nothing(subject):
    model = subject.adapted()
    model.merge_adapter()
    merged = state(model.get_base_model())
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    after = model.get_base_model().state_dict()
    assert all(after[name].equal(tensor) for name, tensor in merged.items())


def test_merging_named_adapters_of_copies(subject):
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config(r=2))
    draw_factors(model, "other", 3)
    first = subject.run(model)
    model.set_adapter("other")
    second = subject.run(model.eval())
    model.set_adapter("default")
    for names, expected in ((["default"], first), (["other"], second)):
        # Of the classifier that each of BERT's adapters has, the active one is kept.
        copied = copy.deepcopy(model)
        copied.set_adapter(names[0])
        merged = copied.merge_and_unload(adapter_names=names)
        torch.testing.assert_close(subject.run(merged.eval()), expected, **FLOAT32)
    both = subject.run(model.merge_and_unload(adapter_names=["other", "default"]))
    assert (both - first).abs().max() > 0.01
    assert (both - second).abs().max() > 0.01


def test_a_merged_model_saves_and_loads(subject, tmp_path):
    model = subject.adapted()
    merged = model.merge_and_unload(safe_merge=True)
    expected = subject.run(merged)
    if subject.is_transformers:
        merged.save_pretrained(tmp_path)
        again = subject.kind.loader.from_pretrained(tmp_path)
    else:
        save_file(merged.state_dict(), tmp_path / "model.safetensors")
        again = subject.base()
        again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert subject.run(again.eval()).equal(expected)
    assert all(tensor.is_contiguous() for tensor in merged.state_dict().values())


@pytest.mark.parametrize("dtype", HALVES)
def test_merging_a_cast_model(subject, dtype):
    model = subject.adapted()
    before = subject.run(model)
    merged = model.to(dtype).merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert distance(subject.run(merged), before) < HALF


def test_a_safe_merge_refuses_a_bias_that_is_not_finite(subject):
    model = subject.adapted()
    layers = [
        m
        for m in model.modules()
        if isinstance(m, BaseTunerLayer) and m.base_layer.bias is not None
    ]
    if not layers:
        pytest.skip("a model without biases")
    for layer in layers:
        with torch.no_grad():
            layer.base_layer.bias[0] = torch.inf
        before = state(layer.base_layer)
        # What a bias becomes is checked with the weight, though the input side leaves it alone.
        with pytest.raises(ValueError, match="NaNs detected"):
            layer.merge(safe_merge=True)
        assert not layer.merged
        after = layer.base_layer.state_dict()
        assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_delete_the_last_adapter(subject):
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config(r=2))
    with pytest.warns(UserWarning, match="which is now deleted"):
        model.delete_adapter("default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some versions tell that none is left
        model.delete_adapter("other")
    assert model.active_adapters == []
    assert not model.peft_config
    assert not [name for name, _ in model.named_parameters() if "wegeft" in name]
    assert subject.run(model.base_model).equal(subject.run(subject.base()))


def test_one_adapter_reweighted(subject):
    if subject.kind.name == "bert":
        pytest.skip("its adapters bring a classifier, which is refused: test_settings")
    model = subject.adapted()
    for weight in (0.5, -0.5):
        name = f"times {weight}".replace(".", "_")
        model.add_weighted_adapter(["default"], [weight], name)
        for layer in (m for m in model.modules() if isinstance(m, BaseTunerLayer)):
            torch.testing.assert_close(
                layer.get_delta_weight(name), weight * layer.get_delta_weight("default"), **FLOAT32
            )
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert (subject.run(model.eval()) - subject.run(subject.base())).abs().max() > 0.01


def test_prepared_for_training_as_quantised_models_are(subject):
    if not subject.is_transformers:
        pytest.skip("a model without token embeddings")
    ids = subject.inputs()["input_ids"]
    model = subject.adapted()
    assert not model.get_input_embeddings()(ids).requires_grad
    base = prepare_model_for_kbit_training(subject.base(), use_gradient_checkpointing=False)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    model = get_peft_model(base, subject.kind.config())
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(ids).requires_grad
    subject.loss(model).backward()
    assert all(parameter.grad is not None for parameter in factors_of(model).values())


def test_embeddings_in_the_place_of_tokens(subject):
    if not subject.is_transformers:
        pytest.skip("a model without token embeddings")
    model = subject.adapted()
    embedded = model.get_input_embeddings()(subject.inputs()["input_ids"])
    with torch.no_grad():
        assert model(inputs_embeds=embedded).logits.equal(subject.run(model))


def test_the_base_s_own_state_goes_out_and_in(subject):
    if not hasattr(peft, "get_base_model_state_dict"):
        pytest.skip(f"PEFT {peft.__version__} has no get_base_model_state_dict")
    base, model = state(subject.base()), subject.adapted()
    told = peft.get_base_model_state_dict(model)
    assert set(told) == set(base)
    assert all(told[name].equal(tensor) for name, tensor in base.items())
    before = subject.run(model)
    with torch.no_grad():
        for name, parameter in model.get_base_model().named_parameters():
            if ".modules_to_save." not in name:
                parameter.add_(0.1)
    result = peft.set_base_model_state_dict(model, base, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert subject.run(model).equal(before)


def test_the_docs_state_this_count():
    text = Path(__file__).read_text(encoding="utf-8")
    count = len(re.findall(r"^def test_\w+\(subject", text, re.MULTILINE))
    docs = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")
    assert f"{count} properties" in docs
    assert f"{len(KINDS)} kinds of models" in docs
