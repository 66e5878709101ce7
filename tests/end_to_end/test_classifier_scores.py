"""How a classifier is asked: parts switched off, beside its base, by many processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import preloaded
import pytest
from classifiers import write_images, write_recipe, write_vit

from wegeft_cli.analysis.ablate import ablate
from wegeft_cli.analysis.edit import edit
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.inference.loaded_model import ModelTarget
from wegeft_cli.runs.train import train

SPLITS = {
    "train": {"9": 6, "10": 6, "11": 6},
    "validation": {"9": 2, "11": 4},
    "test": {"9": 3, "10": 3, "11": 4},
}


@pytest.fixture(scope="session")
def class_run(tmp_path_factory) -> Path:
    """A trained run with a recipe beside it; two targets, so that there are two groups."""
    folder = tmp_path_factory.mktemp("class-run")
    images = write_images(folder / "images", SPLITS)
    data = {part: [{"path": str(images), "split": part}] for part in SPLITS}
    recipe = write_recipe(
        folder,
        model={"name_or_path": str(write_vit(folder / "vit"))},
        adapter={"target_modules": ["o_proj", "fc1"]},
        data={**data, "image_transform": "resize"},
    )
    return train(recipe).run_dir


@pytest.fixture
def images(class_run) -> Path:
    """The run's images."""
    return class_run.parent.parent / "images"


@pytest.fixture
def run_dir(class_run, tmp_path) -> Path:
    """A copy to write scores into."""
    return Path(shutil.copytree(class_run, tmp_path / "run"))


@pytest.fixture
def unloaded(monkeypatch) -> None:
    """No classifier may be loaded."""

    def load(*args, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(ModelTarget, "load", load)  # of the target and of the base alike


@pytest.mark.parametrize("by", ["group", "layer", "module", "direction"])
def test_an_ablation_scores_the_runs_split_as_the_edited_adapters(run_dir, tmp_path, images, by):
    found = ablate(run_dir, by=by, top=2)
    (whole,) = evaluate(run_dir)["results"]
    assert found["whole"]["task"] == "test"
    assert found["whole"]["score"] == whole["score"]
    assert len(found["parts"]) == {"group": 2, "layer": 2, "module": 4, "direction": 2}[by]
    row = found["parts"][0]
    part = edit(run_dir, drop=[row["part"]], output=tmp_path / "edited").output_dir
    (alone,) = evaluate(part, data_dir=images)["results"]
    assert (row["num_correct"], row["n"]) == (alone["num_correct"], alone["n"])
    assert row["gained"] - row["lost"] == row["num_correct"] - whole["num_correct"]


def test_the_ablations_base_is_the_base_with_the_learned_head(run_dir, tmp_path, images):
    found = ablate(run_dir, by="group", task="validation")
    assert found["whole"]["task"] == "validation"
    tiny = {"group:o_proj": 1e-12, "group:fc1": 1e-12}
    still = edit(run_dir, scale=tiny, output=tmp_path / "still").output_dir
    (alone,) = evaluate(still, tasks=["validation"], data_dir=images)["results"]
    assert found["base"]["num_correct"] == alone["num_correct"]
    # So it is a classifier of these classes, and not a head that was drawn anew.
    assert found["base"]["metrics"] == alone["metrics"]


def test_asking_for_an_ablation_of_a_head_or_of_words_is_refused(run_dir):
    with pytest.raises(UserError, match="only the head was trained whole"):
        ablate(run_dir, by="saved")
    with pytest.raises(UserError, match="is for language models"):
        ablate(run_dir, by="group", protocol="wegeft")
    with pytest.raises(UserError, match="'boolq' is no split"):
        ablate(run_dir, by="group", task="boolq")


def test_compare_base_is_refused_before_anything_is_loaded(run_dir, unloaded):
    with pytest.raises(UserError, match="no head for these classes"):
        evaluate(run_dir, compare_base=True)


def test_samples_of_a_classifier_are_refused_with_the_way_to_score_it(run_dir):
    path = Path(evaluate(run_dir)["samples_path"])
    with pytest.raises(UserError, match="not from a file") as caught:
        evaluate(samples=path, tasks=["boolq"])
    assert "wegeft eval RUN" in caught.value.hint
    with pytest.raises(UserError, match="not from a file"):
        evaluate(samples=run_dir / "nothing.jsonl", tasks=["test"])


@pytest.mark.slow
def test_two_processes_score_as_one(run_dir, tmp_path):
    alone = evaluate(run_dir, output=tmp_path / "alone.json")
    words = ["eval", run_dir, "--json", "--output", tmp_path / "both.json"]
    done = preloaded.run_group(2, "-m", "wegeft_cli", *words, timeout=240)
    assert done.returncode == 0, done.stderr
    both = json.loads(done.stdout)
    assert both["results"] == alone["results"]
    lines = [Path(each["samples_path"]).read_text().splitlines() for each in (alone, both)]
    picked = [
        [(row["input"], row["prediction"], row["answer"]) for row in map(json.loads, group)]
        for group in lines
    ]
    assert picked[0] == picked[1]
    assert len(picked[0]) == 10
