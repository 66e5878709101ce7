"""`full` and `bitfit` on language models: trained, resumed, scored, merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wegeft_cli.analysis.ablate import ablate
from wegeft_cli.analysis.edit import edit
from wegeft_cli.analysis.inspect import inspect
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.exporting.export import export
from wegeft_cli.inference.generate import generate
from wegeft_cli.merging.merge import merge
from wegeft_cli.runs.train import train

CASES = ["full-llama", "full-gpt2", "bitfit-gpt2"]


@pytest.fixture(params=CASES)
def case(request, write_recipe, llama_dir, build_gpt2_dir):
    """A method, its base, and a function that writes its recipe."""
    method, family = request.param.split("-")
    base = llama_dir if family == "llama" else build_gpt2_dir()

    def write(name="tiny"):
        return write_recipe(
            name,
            model={"name_or_path": str(base)},
            train={"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2},
        )

    return method, base, write


def outputs_of(result):
    lines = Path(result["samples_path"]).read_text().splitlines()
    return [(row["model"], row["output"]) for row in map(json.loads, lines)]


def test_resumed_scored_and_merged(case, data_dir, stop_after, read_adapter, read_metrics):
    method, base, write = case
    own = [f"adapter.type={method}"]
    whole = train(write("whole"), own).run_dir
    stopped = train(write("cut"), own, should_stop=stop_after(3))
    assert stopped.status == "interrupted"
    run_dir = train(write("cut"), own, resume="auto").run_dir
    assert read_adapter(run_dir) == read_adapter(whole)
    assert read_metrics(run_dir) == read_metrics(whole)
    losses = [row["loss"] for row in read_metrics(run_dir) if "loss" in row]
    assert losses[-1] < losses[0]

    asked = {"tasks": ["boolq"], "data_dir": data_dir, "max_new_tokens": 8}
    found = evaluate(run_dir, compare_base=True, **asked)
    alone = evaluate(str(base), output=run_dir / "base.json", **asked)
    texts = outputs_of(found)
    assert [text for kind, text in texts if kind == "base"] == [t for _, t in outputs_of(alone)]
    tuned = [text for kind, text in texts if kind != "base"]
    assert tuned != [text for kind, text in texts if kind == "base"]
    merged = merge(run_dir).output_dir
    after = evaluate(merged, output=run_dir / "merged.json", **asked)
    assert [text for _, text in outputs_of(after)] == tuned
    (row,) = generate(run_dir, prompts=["ab"], max_new_tokens=4)["results"]
    assert (
        row["output"] == generate(merged, prompts=["ab"], max_new_tokens=4)["results"][0]["output"]
    )

    before, now = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == now.keys()
    changed = {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}
    if method == "bitfit":
        assert changed
        assert all(name.endswith("bias") for name in changed)
    else:
        assert len(changed) == len(now)


def test_a_base_without_biases_is_refused(write_recipe):
    with pytest.raises(UserError, match="no bias to train"):
        train(write_recipe(), ["adapter.type=bitfit"])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_commands_for_factors_name_the_method_and_the_way_on(write_recipe, tmp_path, method):
    run_dir = train(write_recipe(), [f"adapter.type={method}", "train.max_steps=1"]).run_dir
    asked = [
        lambda: export(run_dir, format="lora", output=tmp_path / "twin"),
        lambda: edit(run_dir, drop=["layer:0"], output=tmp_path / "edited"),
        lambda: ablate(run_dir, by="group", task="boolq"),
    ]
    if method == "full":
        asked.append(lambda: inspect(run_dir))
    for ask in asked:
        with pytest.raises(UserError, match=r"; only ") as caught:
            ask()
        assert "WEGEFT_INPLACE" not in str(caught.value)
        assert {"full": "full, bitfit", "lora": "a LORA adapter"}[method] in caught.value.message
        assert caught.value.hint
