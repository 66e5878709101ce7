"""Token-clustering maps of a tiny ViT equal the formula on outputs that the test records itself."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from wegeft_cli.errors import UserError
from wegeft_cli.generators.inject import inject_generators
from wegeft_cli.workflows.adapters import load_adapter, save_adapter
from wegeft_cli.workflows.inspect import inspect
from wegeft_cli.workflows.token_maps import normalise

ROUNDED = 1e-4  # the maps are written with four digits


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
    assert Image.open(io.BytesIO(data)).size == (30, 40)


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
