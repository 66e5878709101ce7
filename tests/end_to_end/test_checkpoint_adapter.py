"""`wegeft merge RUN/checkpoints/step-N` makes an adapter of a checkpoint and merges it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from classifiers import write_bert, write_texts
from classifiers import write_recipe as write_classifier_recipe
from safetensors.torch import load_file

from wegeft_cli.errors import UserError
from wegeft_cli.merging.merge import merge
from wegeft_cli.runs.train import train

WEIGHTS = "adapter_model.safetensors"
PAIRS = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
METHODS: dict[str, dict[str, Any]] = {
    "wegeft": PAIRS,
    "lora": {"type": "lora", **PAIRS},
    "full": {"type": "full"},
}


def same_tensors(one: Path, two: Path) -> bool:
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", METHODS)
def test_the_last_checkpoint_gives_the_runs_own_adapter(
    write_recipe: Callable[..., Path], method: str, listener: Any
) -> None:
    recipe = write_recipe(train={"save_steps": 3})
    values = yaml.safe_load(recipe.read_text())
    values["adapter"] = METHODS[method]
    recipe.write_text(yaml.safe_dump(values))
    run = train(recipe).run_dir
    last = run / "checkpoints" / "step-00000006"
    merged = merge(last, reporter=listener)
    folder = run / "adapter-step-00000006"
    assert merged.output_dir == run / "adapter-step-00000006-merged"
    assert any(str(folder) in note for note in listener.notes)
    assert same_tensors(folder / WEIGHTS, run / "adapter" / WEIGHTS)
    ours, theirs = (
        json.loads((each / "adapter_config.json").read_text()) for each in (folder, run / "adapter")
    )
    assert ours == theirs
    first = merge(run / "checkpoints" / "step-00000003")
    weights = first.output_dir / "model.safetensors"
    assert not same_tensors(weights, merged.output_dir / "model.safetensors")
    assert "The adapter is that of step" not in (folder / "README.md").read_text()
    # Once more, in place of the earlier one.
    merge(last, output=run / "again")
    assert same_tensors(folder / WEIGHTS, run / "adapter" / WEIGHTS)


def test_an_interrupted_run_says_what_to_do_and_its_checkpoint_merges(
    write_recipe: Callable[..., Path], stop_after: Any, ids: torch.Tensor
) -> None:
    recipe = write_recipe(train={"save_steps": 2})
    run = train(recipe, should_stop=stop_after(4)).run_dir
    with pytest.raises(UserError, match="its status is 'interrupted'") as caught:
        merge(run)
    hint = caught.value.hint
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert f"wegeft train {run / 'recipe.yaml'} --resume auto" in hint
    assert f"wegeft merge {newest}" in hint
    assert merge(newest).num_folded == 6


def test_a_classifier_keeps_its_head(build_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    base = write_bert(tmp_path / "bert", build_tokenizer(pad="<pad>"))
    rows = [{"text": f"the answer is {n}", "label": n % 3} for n in range(12)]
    path = write_texts(tmp_path / "rows.jsonl", rows)
    recipe = write_classifier_recipe(
        tmp_path,
        task="sequence_classification",
        model={"name_or_path": str(base)},
        adapter={"target_modules": ["query", "value"]},
        data={"train": [{"path": str(path)}], "max_length": 64},
        train={"num_train_epochs": 2, "save_steps": 3},
    )
    run = train(recipe).run_dir
    merge(run / "checkpoints" / "step-00000006")
    folder = run / "adapter-step-00000006"
    assert same_tensors(folder / WEIGHTS, run / "adapter" / WEIGHTS)
    assert (folder / "head.json").read_text() == (run / "adapter" / "head.json").read_text()


def test_a_checkpoint_without_its_run_is_refused(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = train(write_recipe(train={"save_steps": 3})).run_dir
    copy = tmp_path / "elsewhere" / "checkpoints" / "step-00000003"
    shutil.copytree(run / "checkpoints" / "step-00000003", copy)
    with pytest.raises(UserError, match="outside of its run"):
        merge(copy)
    damaged = next((run / "checkpoints" / "step-00000003").glob("parameters*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="content has changed"):
        merge(run / "checkpoints" / "step-00000003")
    assert not (run / "adapter-step-00000003").exists()
