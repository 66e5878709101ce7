"""A classifier's head is what its class adds; loaded weights are not drawn anew."""

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CvtConfig,
    CvtForImageClassification,
    HGNetV2Config,
    HGNetV2ForImageClassification,
    MetaClip2Config,
    MetaClip2ForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PPLCNetConfig,
    PPLCNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    Siglip2Config,
    Siglip2ForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwiftFormerConfig,
    SwiftFormerForImageClassification,
)

from wegeft_cli.methods.in_place import select_parameters
from wegeft_cli.models.heads import HeadSpec, find_head_modules, finish_head, pad_as_tokenizer
from wegeft_cli.models.loading import load_model

TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
SMALL_HGNET = {
    "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "stem_channels": [3, 4, 8],
    "stage_in_channels": [8, 8], "stage_mid_channels": [4, 4], "stage_out_channels": [8, 8],
    "stage_num_blocks": [1, 1], "stage_downsample": [False, True], "stage_light_block": [False] * 2,
    "stage_kernel_size": [3, 3], "stage_numb_of_layers": [1, 1],
}  # fmt: skip
CLASSES = {
    "clip": lambda: CLIPForImageClassification(CLIPConfig(vision_config=TOWER)),
    "siglip": lambda: SiglipForImageClassification(SiglipConfig(vision_config=TOWER)),
    "siglip2": lambda: Siglip2ForImageClassification(Siglip2Config(vision_config=TOWER)),
    "metaclip_2": lambda: MetaClip2ForImageClassification(MetaClip2Config(vision_config=TOWER)),
    "hgnet_v2": lambda: HGNetV2ForImageClassification(HGNetV2Config(**SMALL_HGNET)),
    "pp_lcnet": lambda: PPLCNetForImageClassification(PPLCNetConfig(scale=0.25)),
}
HEADS = {"hgnet_v2": ["fc"], "pp_lcnet": ["head"]}


@pytest.mark.parametrize("family", CLASSES)
def test_a_pretrained_tower_is_no_head(family, tmp_path):
    torch.manual_seed(0)
    base = CLASSES[family]()
    base.save_pretrained(tmp_path)
    heads = HEADS.get(family, ["classifier"])
    head = HeadSpec("image_classification", ("a", "b", "c"))
    model = load_model(str(tmp_path), head=head)
    assert find_head_modules(model) == heads
    finish_head(model, head, (), seed=1)
    before = base.state_dict()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert {name.rpartition(".")[0] for name in changed} <= set(heads)
    # A linear probe trains the output layer alone.
    learned = select_parameters(model, "linear_probe", heads)["modules_to_save"]
    assert {name.rpartition(".")[0] for name in learned} == set(heads)


def test_a_layer_before_the_output_keeps_its_loaded_weights(tmp_path):
    """A classifier of three other classes: the dense layer is of use, the output layer is not."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    base = RobertaForSequenceClassification(config)
    base.save_pretrained(tmp_path)
    for labels in (("a", "b"), ("a", "b", "c")):
        head = HeadSpec("sequence_classification", labels)
        model = load_model(str(tmp_path), head=head)
        finish_head(model, head, (), seed=1)
        assert torch.equal(model.classifier.dense.weight, base.classifier.dense.weight)
        new = model.classifier.out_proj.weight
        assert not torch.equal(new[:2], base.classifier.out_proj.weight[:2])
    # A base whose classes are these keeps all.
    head = HeadSpec("sequence_classification", ("a", "b", "c"), keeps_base_head=True)
    model = load_model(str(tmp_path), head=head)
    finish_head(model, head, (), seed=1)
    assert torch.equal(model.classifier.out_proj.weight, base.classifier.out_proj.weight)


def test_missing_norms_of_a_head_start_at_one(tmp_path):
    torch.manual_seed(0)
    config = PoolFormerConfig(
        hidden_sizes=[8, 8], depths=[1, 1], patch_sizes=[3, 3], strides=[2, 2], padding=[1, 1],
        num_encoder_blocks=2, image_size=8,
    )  # fmt: skip
    base = PoolFormerForImageClassification(config)
    base.poolformer.save_pretrained(tmp_path)
    head = HeadSpec("image_classification", ("a", "b"))
    model = load_model(str(tmp_path), head=head)
    finish_head(model, head, (), seed=1)
    assert find_head_modules(model) == ["norm", "classifier"]
    assert torch.equal(model.norm.weight, torch.ones(8))


def test_a_norm_beside_the_backbone_keeps_its_loaded_weights(tmp_path):
    torch.manual_seed(0)
    config = CvtConfig(
        embed_dim=[8, 8, 8], num_heads=[1, 1, 1], depth=[1, 2, 3], patch_sizes=[3, 3, 3],
        patch_stride=[2, 2, 2],
    )  # fmt: skip
    base = CvtForImageClassification(config)
    torch.nn.init.normal_(base.layernorm.weight)
    base.save_pretrained(tmp_path)
    head = HeadSpec("image_classification", ("a", "b", "c"))
    model = load_model(str(tmp_path), head=head)
    finish_head(model, head, (), seed=1)
    assert torch.equal(model.layernorm.weight, base.layernorm.weight)


def test_a_batch_norm_beside_the_backbone_is_no_head():
    config = SwiftFormerConfig(depths=[1, 1], embed_dims=[8, 8], image_size=32)
    model = SwiftFormerForImageClassification(config)
    assert find_head_modules(model) == ["head", "dist_head"]


def test_the_padding_id_is_set_where_transformers_reads_it():
    from transformers import Gemma3Config, Gemma3ForSequenceClassification

    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=TOWER, mm_tokens_per_image=4)
    model = Gemma3ForSequenceClassification(config).eval()

    class Tokenizer:
        pad_token_id = 7

    pad_as_tokenizer(model, Tokenizer())
    assert model.config.get_text_config().pad_token_id == 7
    row = torch.tensor([[5, 9, 11]])
    padded = torch.tensor([[5, 9, 11, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        alone = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
        batched = model(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(alone, batched)
