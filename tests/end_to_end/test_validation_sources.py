"""The validation loss of each source, beside that of all rows."""

from __future__ import annotations

import json

import pytest

from wegeft_cli.analysis.report import report
from wegeft_cli.data.sources.paths import name_sources
from wegeft_cli.recipe.schema import DataSource
from wegeft_cli.runs.train import train


def test_loss_of_each_source(write_recipe, tmp_path, read_metrics, read_run):
    """The losses are those of runs with one source, and their mean by tokens is `eval_loss`."""
    files = {}
    for name, count in (("long", 3), ("short", 5)):
        rows = [{"prompt": f"{name}{n}?", "completion": " ab" * (n + count)} for n in range(count)]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))

    def validate(*names):
        recipe = write_recipe(
            "validates-" + "-".join(names),
            data={"validation": [{"path": str(files[name])} for name in names]},
            train={"max_steps": 2, "eval_steps": 1, "per_device_eval_batch_size": 2},
        )
        return train(recipe).run_dir

    run_dir = validate("long", "short")
    both = read_run(run_dir)["validation"]["1"]
    assert set(both) == {"eval_loss", "eval_loss_long", "eval_loss_short"}
    for name in files:
        alone = read_run(validate(name))["validation"]["1"]
        assert alone.keys() == {"eval_loss"}
        assert both[f"eval_loss_{name}"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    low, high = sorted(both[f"eval_loss_{name}"] for name in files)
    assert low < both["eval_loss"] < high
    lines = [line for line in read_metrics(run_dir) if "eval_loss_long" in line]
    assert lines[0]["eval_loss_short"] == both["eval_loss_short"]
    report([run_dir], output=tmp_path / "report.html", look_inside=False)
    assert "Validation: eval_loss_long" in (tmp_path / "report.html").read_text()


def test_names_are_unique():
    paths = ["a/train.jsonl", "b/train.jsonl.gz", "org/my set", "folder/"]
    names = name_sources([DataSource(path=path) for path in paths])
    assert names == ["train", "train_2", "my_set", "folder"]
