"""Finding targets, cutting rows of fused projections, sharing."""

import pytest
import torch
from families.checkpoints import build_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.targets import find_targets
from wegeft_cli.methods.wegeft.inject import select_targets
from wegeft_cli.methods.wegeft.sharing import assign_groups, group_widths


def faults_of(error: BaseException) -> list[UserError]:
    return list(getattr(error, "exceptions", [error]))


def test_names_match_last_parts_in_model_order(make_llama):
    targets = find_targets(make_llama(), ["v_proj", "q_proj"])
    assert [t.name for t in targets] == [
        f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")
    ]
    one = find_targets(make_llama(), ["layers.1.self_attn.q_proj"])
    assert [t.name for t in one] == ["model.layers.1.self_attn.q_proj"]
    twice = find_targets(make_llama(), ["q_proj", "q_proj"])
    assert twice == find_targets(make_llama(), ["q_proj"])


def test_all_linear_leaves_the_head_out(make_llama, make_gpt2):
    llama = find_targets(make_llama(), "all-linear")
    assert len(llama) == 14
    assert not any("lm_head" in t.name for t in llama)
    gpt2 = find_targets(make_gpt2(), "all-linear")
    assert len(gpt2) == 8
    assert all(t.transposed for t in gpt2)
    shapes = {t.kind: (t.d_in, t.d_out) for t in gpt2 if "attn" in t.name}
    assert shapes == {"c_attn": (32, 96), "c_proj": (32, 32)}


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_all_linear_leaves_tied_layers_out(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(family))
    kinds = {target.kind for target in find_targets(model, "all-linear")}
    assert "in_proj" in kinds
    assert kinds.isdisjoint({"q_proj", "gate_up_proj", "down_proj"})
    with pytest.raises(UserError, match="is tied to"):
        select_targets(model, ["q_proj"])


def test_one_string_is_a_regular_expression_over_whole_names(make_llama):
    targets = find_targets(make_llama(), r"model\.layers\.1\..*(q|k)_proj")
    assert [t.kind for t in targets] == ["q_proj", "k_proj"]
    with pytest.raises(UserError, match="matches no linear") as caught:
        find_targets(make_llama(), "q_proj")
    assert "[q_proj]" in caught.value.hint
    with pytest.raises(UserError, match="no regular expression"):
        find_targets(make_llama(), "(q_proj")


def test_every_misspelt_name_is_told_with_the_nearest(make_llama):
    with pytest.raises(ExceptionGroup) as caught:
        find_targets(make_llama(), ["q_prj", "v_proj", "dwn_proj"])
    hints = [fault.hint for fault in faults_of(caught.value)]
    assert len(hints) == 2
    assert "'q_proj'" in hints[0]
    assert "'down_proj'" in hints[1]


def test_gpt2_fused_rows_by_name_and_number(make_gpt2):
    q, v = find_targets(make_gpt2(), ["h.0.attn.c_attn:q", "h.0.attn.c_attn:v"])
    assert (q.rows, v.rows) == (((0, 32),), ((64, 96),))
    assert (q.d_in, q.d_out, q.kind) == (32, 32, "c_attn_q")
    (some,) = find_targets(make_gpt2(), ["h.1.attn.c_attn:10-20"])
    assert (some.rows, some.d_out) == (((10, 20),), 10)


def test_fused_rows_follow_each_family():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 16, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    with torch.device("meta"):
        phi3 = Phi3ForCausalLM(Phi3Config(**sizes, **heads))
        neox = GPTNeoXForCausalLM(
            GPTNeoXConfig(**sizes, num_attention_heads=2, intermediate_size=24)
        )
    rows = {t.label.rpartition(".")[2]: t.rows for t in find_targets(
        phi3, ["qkv_proj:q", "qkv_proj:k", "qkv_proj:v", "gate_up_proj:gate", "gate_up_proj:up"]
    )}  # fmt: skip
    assert rows == {
        "qkv_proj:q": ((0, 32),),
        "qkv_proj:k": ((32, 48),),
        "qkv_proj:v": ((48, 64),),
        "gate_up_proj:gate": ((0, 24),),
        "gate_up_proj:up": ((24, 48),),
    }
    (key,) = find_targets(neox, ["query_key_value:k"])
    assert key.rows == ((16, 32), (64, 80))  # interleaved: head 0 q k v, head 1 q k v


def test_wrong_rows_are_told(make_gpt2):
    for bad, message in [
        ("c_attn:z", "no part 'z'"),
        ("c_attn:5-200", "not within"),
        ("c_attn:9-9", "not within"),
    ]:
        with pytest.raises((UserError, ExceptionGroup)) as caught:
            find_targets(make_gpt2(), [bad])
        assert message in faults_of(caught.value)[0].message
    with pytest.raises(UserError, match="same rows"):
        find_targets(make_gpt2(), ["c_attn:q", "c_attn:20-40"])
    with pytest.raises(UserError, match="same rows"):
        find_targets(make_gpt2(), ["c_attn", "c_attn:v"])


class TestSharing:
    def test_module_type_input_dim_none(self, make_llama):
        targets = find_targets(make_llama(), "all-linear")
        by_type = assign_groups(targets, share="module_type")
        assert {name: len(members) for name, members in by_type.items()} == dict.fromkeys(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 2
        )
        by_width = assign_groups(targets, share="input_dim")
        assert {name: len(members) for name, members in by_width.items()} == {"d32": 12, "d48": 2}
        alone = assign_groups(targets, share="none")
        assert len(alone) == 14
        assert all("." not in name for name in alone)

    def test_explicit_groups(self, make_llama):
        targets = find_targets(make_llama(), ["q_proj", "k_proj", "up_proj"])
        groups = {"attention": ["q_proj", "*.k_proj"], "early": [r".*layers\.0\.mlp\..*"],
                  "late": ["layers.1.mlp.up_proj"]}  # fmt: skip
        assigned = assign_groups(targets, groups=groups)
        assert {name: len(members) for name, members in assigned.items()} == {
            "attention": 4, "early": 1, "late": 1,
        }  # fmt: skip

    def test_faults_of_explicit_groups(self, make_llama):
        targets = find_targets(make_llama(), ["q_proj", "k_proj"])
        with pytest.raises(UserError, match="matches no target"):
            assign_groups(targets, groups={"a": ["q_proj", "k_proj", "x_proj"]})
        with pytest.raises(UserError, match="two groups"):
            assign_groups(targets, groups={"a": ["q_proj", "k_proj"], "b": ["*.q_proj"]})
        with pytest.raises(UserError, match="in no group"):
            assign_groups(targets, groups={"a": ["q_proj"]})
        with pytest.raises(UserError, match="letters, digits"):
            assign_groups(targets, groups={"a.b": ["q_proj", "k_proj"]})

    def test_a_group_has_one_width(self, make_llama):
        targets = find_targets(make_llama(), ["q_proj", "down_proj"])
        with pytest.raises(UserError, match=r"two sizes.*32.*48") as caught:
            assign_groups(targets, groups={"all": ["q_proj", "down_proj"]})
        assert "input_dim" in caught.value.hint
        narrow = find_targets(make_llama(), ["q_proj", "k_proj"])
        with pytest.raises(UserError, match="outputs of two sizes"):
            assign_groups(narrow, groups={"all": ["q_proj", "k_proj"]}, side="output")
        assert assign_groups(narrow, groups={"all": ["q_proj", "k_proj"]}, side="input")

    def test_groups_alone_choose_the_targets(self, make_llama, make_gpt2):
        groups = {"a": ["q_proj"], "b": ["down_proj"]}
        targets = select_targets(make_llama(), "all-linear", groups)
        assert {t.kind for t in targets} == {"q_proj", "down_proj"}
        parts = select_targets(make_gpt2(), "all-linear", {"a": ["c_attn:q"], "b": ["c_attn:v"]})
        assert {t.label.rpartition(".")[2] for t in parts} == {"c_attn:q", "c_attn:v"}


# Every line of method.md's table of exact counts, on models without weights.
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32,
              "vocab_size": 32000}  # fmt: skip
LLAMA_3_8B = {**LLAMA_2_7B, "intermediate_size": 14336, "num_key_value_heads": 8,
              "vocab_size": 128256}  # fmt: skip
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("config", "targets", "share", "expected", "share_of_base"),
    [
        (LLAMA_2_7B, FIVE, "module_type", 3_506_176, "0.052"),
        (LLAMA_3_8B, FIVE, "module_type", 3_932_160, "0.049"),
        (LLAMA_2_7B, "all-linear", "module_type", 4_554_752, "0.068"),
        (LLAMA_2_7B, ["q_proj", "v_proj"], "module_type", 1_048_576, "0.016"),
        (LLAMA_2_7B, FIVE, "none", 112_197_632, None),
    ],
)
def test_published_counts_of_llama(config, targets, share, expected, share_of_base):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    groups = assign_groups(find_targets(model, targets), share=share)
    counted = sum(2 * 64 * d for d in group_widths(groups, "input").values())
    assert counted == expected
    if share_of_base is not None:
        total = sum(parameter.numel() for parameter in model.parameters())
        assert f"{100 * counted / total:.3f}" == share_of_base


def test_published_counts_of_vit_and_roberta():
    from transformers import (
        RobertaConfig,
        RobertaForSequenceClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig())
        roberta = RobertaForSequenceClassification(RobertaConfig())
    output = [name for name, m in vit.named_modules()
              if isinstance(m, nn.Linear) and "attention" in name and ("output" in name or "o_proj" in name)]  # fmt: skip # noqa: E501
    assert len(output) == 12
    groups = assign_groups(find_targets(vit, output))
    assert [2 * 16 * d for d in group_widths(groups, "input").values()] == [24_576]
    groups = assign_groups(find_targets(roberta, ["query", "value"]))
    assert sum(2 * 32 * d for d in group_widths(groups, "input").values()) == 98_304


class TestKinds:
    """`share: module_type`: all layers of a kind have one width."""

    def test_a_name_of_two_widths_is_split_by_the_modules_around_it(self, make_gpt2):
        assigned = assign_groups(find_targets(make_gpt2(), "all-linear"))
        assert {name: len(members) for name, members in assigned.items()} == {
            "c_attn": 2, "attn-c_proj": 2, "c_fc": 2, "mlp-c_proj": 2,
        }  # fmt: skip
        assert group_widths(assigned, "input")["mlp-c_proj"] == 128

    def test_layers_that_differ_in_width_alone_are_split_by_width(self):
        model = nn.ModuleDict(
            {"stages": nn.ModuleList(nn.ModuleDict({"query": nn.Linear(d, d)}) for d in (4, 8, 8))}
        )
        assigned = assign_groups(find_targets(model, "all-linear"))
        assert {name: len(members) for name, members in assigned.items()} == {
            "query-d4": 1, "query-d8": 2,
        }  # fmt: skip

    def test_numbered_members_of_a_list_have_kinds_of_their_own(self):
        blocks = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))})
            for _ in range(3)
        )
        assigned = assign_groups(find_targets(nn.ModuleDict({"blocks": blocks}), "all-linear"))
        assert {name: len(members) for name, members in assigned.items()} == {
            "mlp_0": 3, "mlp_2": 3,
        }  # fmt: skip

    def test_what_is_trained_whole_is_no_target_of_all_linear(self, make_llama):
        targets = select_targets(make_llama(), "all-linear", None, ["layers.1.mlp", "lm_head"])
        assert len(targets) == 11
        assert not any("layers.1.mlp" in target.name for target in targets)


class TestOwnLinearClasses:
    """Linears of a model's own class are adapted only where they compute W x."""

    def test_a_product_written_otherwise_is_one(self):
        from transformers.models.falcon.modeling_falcon import FalconLinear

        model = nn.ModuleDict({"dense": FalconLinear(4, 6)})
        assert [target.name for target in find_targets(model, "all-linear")] == ["dense"]

    def test_a_router_is_none(self):
        from transformers import Llama4TextConfig
        from transformers.models.llama4.modeling_llama4 import Llama4Router

        config = Llama4TextConfig(hidden_size=4, num_local_experts=2)
        model = nn.ModuleDict({"router": Llama4Router(config), "q_proj": nn.Linear(4, 4)})
        assert [target.name for target in find_targets(model, "all-linear")] == ["q_proj"]
        for named in (["router"], "rout.*"):
            with pytest.raises(UserError, match="Llama4Router, which does not compute W x"):
                find_targets(model, named)
