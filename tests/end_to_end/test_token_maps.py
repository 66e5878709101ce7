"""Token-clustering maps of a tiny ViT equal the formula on outputs that the test records itself."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from classifiers import write_images, write_processor, write_recipe, write_vit
from PIL import Image
from transformers import (
    HieraConfig,
    HieraForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from wegeft_cli.analysis.inspect import inspect
from wegeft_cli.analysis.token_maps import normalise
from wegeft_cli.errors import UserError
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import load_adapter, save_adapter
from wegeft_cli.models.image_processor import ImageTransform
from wegeft_cli.runs.train import train

ROUNDED = 1e-4  # the maps are written with four digits
CLEAR = 1e-3  # float32 along another order of sums, beside the four digits
HALF_A_STEP = 0.51 / 255  # a picture's values are whole


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A two-layer ViT's folder and an adapter of its attention outputs."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=24,
        patch_size=6,
        num_labels=3,
        initializer_range=0.3,
    )
    ViTForImageClassification(config).save_pretrained(folder / "base")
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder / "base")
    model = ViTForImageClassification.from_pretrained(folder / "base")
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    kind = "attention.output.dense" if any("output.dense" in n for n in names) else "o_proj"
    generators = inject_generators(model, rank=3, target_modules=[kind])
    with torch.no_grad():
        for parameter in generators.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    save_adapter(
        model,
        folder / "adapter",
        base_model_name_or_path=str(folder / "base"),
        task_type="IMAGE_CLASSIFICATION",
    )
    random = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        pixels = random.integers(0, 255, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_maps_are_the_projections_on_the_directions(vit):
    result = inspect(vit / "adapter", images=[vit / "one.png", vit / "two.png"])
    assert result["tokens"]["reason"] == "the base is no causal language model"
    assert [each["image"] for each in result["maps"]] == [
        str(vit / "one.png"),
        str(vit / "two.png"),
    ]
    model = ViTForImageClassification.from_pretrained(vit / "base").eval()
    owner = load_adapter(model, vit / "adapter")
    (group,) = owner["default"].groups
    phi = owner["default"][group].phi.detach()
    processor = ViTImageProcessor.from_pretrained(vit / "base")
    pixels = processor(images=Image.open(vit / "one.png"), return_tensors="pt")["pixel_values"]
    outputs = {}
    for target in owner["default"].groups[group]:
        model.get_submodule(target.name).register_forward_hook(
            lambda module, args, output, name=target.name: outputs.setdefault(name, output)
        )
    with torch.no_grad():
        model(pixel_values=pixels)
    found = result["maps"][0]["modules"]
    assert len(found) == len(outputs) == 2
    for maps, (name, output) in zip(found, outputs.items(), strict=True):
        assert maps["grid"] == [4, 4]
        C = model.get_submodule(name).weight.detach() @ phi
        projected = output[0, 1:] @ C  # without the class token
        low, high = projected.min(0).values, projected.max(0).values
        scaled = (projected - low) / (high - low)
        scaled[scaled < 0.5] = 0
        wanted = scaled.T.reshape(3, 4, 4)
        assert torch.allclose(torch.tensor(maps["maps"]), wanted, atol=ROUNDED)


def test_pictures_hold_every_image(vit, tmp_path):
    result = inspect(vit / "adapter", images=[vit / "one.png"], plots=tmp_path)
    assert (tmp_path / "maps-0.png").read_bytes().startswith(b"\x89PNG")
    data = base64.b64decode(result["maps"][0]["thumbnail"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (24, 24)  # what the model sees


def test_flat_maps_are_nothing():
    scores = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 1.0]])
    assert normalise(scores).tolist() == [[0, 0], [0, 1], [0, 0.5]]


def test_bad_images_and_bases_are_told(vit, tmp_path, llama_dir, make_adapter):
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot read this image"):
        inspect(vit / "adapter", images=[tmp_path / "no.png"])
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    with pytest.raises(UserError, match="no model of images"):
        inspect(folder, images=[vit / "one.png"])


def test_a_classifiers_images_are_cut_as_it_was_trained(tmp_path):
    base = write_vit(tmp_path / "vit")  # grey images
    images = write_images(tmp_path / "images", {"train": {"a": 3, "b": 3}})
    recipe = write_recipe(
        tmp_path,
        model={"name_or_path": str(base)},
        data={"train": [{"path": str(images)}], "image_transform": "crop_flip"},
    )
    run_dir = train(recipe, ["train.max_steps=3"]).run_dir
    random = np.random.default_rng(1)
    pixels = random.integers(0, 255, (24, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "tall.png")
    (found,) = inspect(run_dir, images=[tmp_path / "tall.png"])["maps"]
    assert [module["grid"] for module in found["modules"]] == [[2, 2], [2, 2]]
    data = base64.b64decode(found["thumbnail"].partition(",")[2])
    seen = np.asarray(Image.open(io.BytesIO(data)), dtype=np.float32)
    half = (0.5,)
    wanted = ImageTransform(8, "crop_flip", half, half).load(tmp_path / "tall.png")
    assert seen.shape == (8, 8)
    assert np.abs(seen / 255 - (wanted[0].numpy() * 0.5 + 0.5)).max() < HALF_A_STEP


def test_windows_of_swin_are_laid_where_the_block_lays_them(tmp_path):
    torch.manual_seed(0)
    # Five rows of patches in windows of two: padded, and every second block is shifted.
    config = SwinConfig(
        image_size=20,
        patch_size=4,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
        window_size=2,
        initializer_range=0.3,
    )
    SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    write_processor(tmp_path / "swin", edge=20)
    model = SwinForImageClassification.from_pretrained(tmp_path / "swin").eval()
    owner = inject_generators(model, rank=3, target_modules=["o_proj", "fc1"], share="input_dim")
    with torch.no_grad():
        for parameter in owner.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "swin"))
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (found,) = inspect(tmp_path / "adapter", images=[tmp_path / "a.png"])["maps"]

    blocks = {n: m for n, m in model.named_modules() if hasattr(m, "shift_size")}
    given, added = {}, {}

    def keep(values, name):
        def hook(module, args):
            values[name] = args[0]

        return hook

    for name, block in blocks.items():
        block.register_forward_pre_hook(keep(given, name))
        block.layernorm_after.register_forward_pre_hook(keep(added, name))
    pixels = np.asarray(Image.open(tmp_path / "a.png"), dtype=np.float32) / 255 * 2 - 1
    with torch.no_grad():
        model(pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert any(block.shift_size for block in blocks.values())
    grids = []
    for module in found["modules"]:
        assert module["reason"] is None
        grids.append(tuple(module["grid"]))
        (name,) = [n for n in blocks if module["label"].startswith(f"{n}.")]
        if not module["label"].endswith("o_proj"):
            continue
        # The residual stream gets the attention's output: their difference is that output.
        output = (added[name] - given[name])[0]
        linear = model.get_submodule(module["label"])
        phi = owner["default"][f"d{linear.in_features}"].phi.detach()
        wanted = normalise(output @ (linear.weight.detach() @ phi))
        maps = torch.tensor(module["maps"]).reshape(3, -1).T
        # At one half a rounding decides between 0 and 0.5.
        is_clear = (wanted - 0.5).abs() > CLEAR
        assert is_clear.float().mean() > 0.9
        assert torch.allclose(maps[is_clear], wanted.float()[is_clear], atol=CLEAR)
    assert set(grids) == {(5, 5), (3, 3)}


def test_tokens_in_another_order_have_no_map(tmp_path):
    torch.manual_seed(0)
    config = HieraConfig(
        image_size=[64, 64],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        num_query_pool=1,
        masked_unit_size=[8, 8],
    )
    HieraForImageClassification(config).save_pretrained(tmp_path / "hiera")
    write_processor(tmp_path / "hiera", edge=64)
    model = HieraForImageClassification.from_pretrained(tmp_path / "hiera")
    inject_generators(model, rank=2, target_modules=["fc1"], share="input_dim")
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "hiera"))
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (found,) = inspect(tmp_path / "adapter", images=[tmp_path / "a.png"])["maps"]
    assert len(found["modules"]) == 2
    assert {module["reason"] for module in found["modules"]} == {
        "the tokens of hiera are not in the image's order"
    }
