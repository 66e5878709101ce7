"""The manifest reads back equal, and every fault in it is told."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from wegeft_cli.artifacts.manifest import AdapterManifest, Edit, ModuleEntry
from wegeft_cli.errors import UserError


def read(values):
    return AdapterManifest.from_json(json.dumps(values), file="adapter_config.json")


def messages(error):
    faults = error.exceptions if isinstance(error, ExceptionGroup) else [error]
    assert all(isinstance(fault, UserError) for fault in faults)
    return [str(fault) for fault in faults]


def test_it_reads_back_equal(manifest):
    assert AdapterManifest.from_json(manifest.to_json(), file="x") == manifest
    other = replace(manifest, target_modules="all-linear", revision="main", base_fingerprint=None)
    assert AdapterManifest.from_json(other.to_json(), file="x") == other
    third = replace(manifest, modules_to_save=("lm_head", "model.norm"), init_from="runs/a")
    assert AdapterManifest.from_json(third.to_json(), file="x") == third
    fourth = replace(manifest, edits=(Edit("layer:3", 0.0), Edit("group:q_proj", 0.5)))
    assert AdapterManifest.from_json(fourth.to_json(), file="x") == fourth


def test_what_an_adapter_has_not_is_not_in_its_file(manifest, saving_manifest):
    values = json.loads(manifest.to_json())
    assert not {"modules_to_save", "init_from", "edits"} & values.keys()
    values = json.loads(saving_manifest.to_json())
    assert (values["modules_to_save"], values["init_from"]) == (["score"], "runs/earlier")
    for key, wrong in (
        ("modules_to_save", "score"),
        ("modules_to_save", ["../x"]),
        ("init_from", 3),
        ("edits", ["layer:3"]),
        ("edits", [{"part": "layer:3", "factor": "0"}]),
        ("edits", [{"part": "layer:3"}]),
    ):
        with pytest.raises(UserError, match="must be") as caught:
            read({**values, key: wrong})
        assert caught.value.key == key


def test_the_contract_on_disk(manifest):
    values = json.loads(manifest.to_json())
    assert values["peft_type"] == "WEGEFT"
    assert values["format_version"] == 1
    assert values["modules"]["model.layers.0.self_attn.q_proj"] == "q_proj"
    assert values["modules"]["fused.qkv"] == [
        {"group": "q_proj", "rows": [[0, 8], [24, 32]]},
        {"group": "v_proj", "rows": [[16, 24]]},
    ]


def test_groups_list_their_modules(manifest):
    assert manifest.groups == {
        "q_proj": [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
            "fused.qkv",
        ],
        "v_proj": [
            "model.layers.0.self_attn.v_proj",
            "model.layers.1.self_attn.v_proj",
            "fused.qkv",
        ],
    }


def test_it_needs_no_torch():
    program = "import sys, wegeft_cli.artifacts.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", True),
        ("r", 2.0),
        ("alpha", "4"),
        ("alpha", 10**400),
        ("scale", 3.0),
        ("side", "left"),
        ("share", None),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("init", ["phi_zero"]),
        ("base_fingerprint", "sha256:12"),
        ("revision", 3),
        ("task_type", 1),
        ("base_model_name_or_path", ["a"]),
        ("target_modules", [1]),
        ("modules", {}),
        ("modules", ["q_proj"]),
        ("format_version", 2),
        ("format_version", True),
    ],
)
def test_a_wrong_value_is_told_with_its_key(manifest, key, value):
    values = json.loads(manifest.to_json()) | {key: value}
    with pytest.raises(UserError) as caught:
        read(values)
    assert caught.value.key == key
    assert caught.value.file == "adapter_config.json"


@pytest.mark.parametrize(
    "entry",
    [
        "with.dot",
        "",
        None,
        [],
        ["q_proj"],
        [{"group": "q_proj"}],
        [{"group": "q_proj", "rows": None}],
        [{"group": "q_proj", "rows": []}],
        [{"group": "q.proj", "rows": [[0, 1]]}],
        [{"group": "q_proj", "rows": [[1, 1]]}],
        [{"group": "q_proj", "rows": [[-1, 1]]}],
        [{"group": "q_proj", "rows": [[0, 1, 2]]}],
        [{"group": "q_proj", "rows": [[0, 4]]}, {"group": "v_proj", "rows": [[3, 5]]}],
    ],
)
def test_a_wrong_module_is_told_with_its_name(manifest, entry):
    values = json.loads(manifest.to_json())
    values["modules"]["some.layer"] = entry
    with pytest.raises(UserError) as caught:
        read(values)
    assert caught.value.key == "modules.some.layer"


def test_all_faults_come_at_once(manifest):
    values = json.loads(manifest.to_json()) | {"r": 0, "side": "left", "drop_out": 0.1}
    del values["dropout"]
    values["modules"]["../x"] = "q_proj"
    with pytest.raises(ExceptionGroup) as caught:
        read(values)
    told = messages(caught.value)
    assert len(told) == 5
    assert any("did you mean `dropout`" in text for text in told)


def test_other_adapters_are_told_what_they_are():
    with pytest.raises(UserError, match="PEFT adapter of type 'LORA'"):
        read({"peft_type": "LORA", "r": 8})
    with pytest.raises(UserError, match="no adapter's config"):
        read({"r": 8})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "NaN", '{"a": 1, "a": 2}', b"\xff\xfe", "[" * 100_000, '"\\ud800"']
)
def test_what_is_no_json_object_is_told(text):
    with pytest.raises(UserError) as caught:
        AdapterManifest.from_json(text, file="adapter_config.json")
    assert caught.value.file.startswith("adapter_config.json")


def test_text_that_nothing_can_print_is_told(manifest):
    values = json.loads(manifest.to_json()) | {"task_type": "\ud800"}
    with pytest.raises(UserError, match="no valid JSON"):
        read(values)


def test_broken_json_is_told_with_line_and_column():
    with pytest.raises(UserError) as caught:
        AdapterManifest.from_json('{\n "r": ,\n}', file="adapter_config.json")
    assert caught.value.file == "adapter_config.json:2:7"


def test_alpha_over_r_is_enough_precision_for_thirds(manifest):
    third = replace(manifest, r=3, alpha=1.0, scale=1 / 3, modules={"a": (ModuleEntry("g"),)})
    assert AdapterManifest.from_json(third.to_json(), file="x").scale == 1 / 3


def test_what_peft_writes_for_itself_is_read_past(manifest):
    extra = {"peft_version": "0.21.2", "inference_mode": True, "auto_mapping": {"a": "b"}}
    values = json.loads(manifest.to_json()) | extra
    assert read(values) == manifest
    untold = read(values | {"task_type": None, "base_model_name_or_path": None})
    assert (untold.task_type, untold.base_model_name_or_path) == (None, None)
