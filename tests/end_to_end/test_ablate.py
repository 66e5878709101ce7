"""`ablate`: each part off is the adapter that `edit` writes without it."""

from __future__ import annotations

import json

import pytest

from wegeft_cli.analysis.ablate import ablate
from wegeft_cli.analysis.edit import edit
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate

TARGETS = ["q_proj", "down_proj"]


@pytest.mark.parametrize(
    ("by", "parts"),
    [
        ("group", {"group:q_proj", "group:down_proj"}),
        ("layer", {"layer:0", "layer:1"}),
        ("direction", 3),
    ],
)
def test_scores_are_those_of_the_edited_adapters(
    llama_dir, make_adapter, tmp_path, data_dir, by, parts
):
    folder, _ = make_adapter(llama_dir, target_modules=TARGETS)
    asked = {"data_dir": data_dir, "max_new_tokens": 6}
    output = tmp_path / "ablation.json"
    found = ablate(folder, by=by, task="boolq", top=3, output=output, **asked)
    names = {row["part"] for row in found["parts"]}
    assert names == parts if isinstance(parts, set) else len(names) == parts
    assert [row["change"] for row in found["parts"]] == sorted(r["change"] for r in found["parts"])
    assert json.loads(output.read_text())["parts"] == found["parts"]
    for row in found["parts"]:
        edited = edit(folder, drop=[row["part"]], output=tmp_path / row["part"].replace(":", "-"))
        (alone,) = evaluate(
            edited.output_dir, tasks=["boolq"], output=tmp_path / "scores.json", **asked
        )["results"]
        for key in ("score", "num_correct", "n", "n_invalid"):
            assert row[key] == alone[key], row["part"]
        assert row["gained"] - row["lost"] == row["num_correct"] - found["whole"]["num_correct"]


def test_the_last_group_off_is_the_base(llama_dir, make_adapter, data_dir):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    found = ablate(folder, by="group", task="boolq", data_dir=data_dir, max_new_tokens=4)
    assert [row["part"] for row in found["parts"]] == ["group:q_proj"]
    assert found["parts"][0]["score"] == found["base"]["score"]


def test_bad_asking_is_refused(llama_dir, make_adapter, data_dir):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    for arguments, told in (
        ({"by": "head"}, "one of group"),
        ({"by": "saved", "task": "boolq"}, "no saved"),
        ({"by": "group"}, "no task is named"),
    ):
        with pytest.raises(UserError, match=told):
            ablate(folder, data_dir=data_dir, **arguments)
