"""`wegeft eval --task glue RUN RUN ...`: one run of each set, each by the set's own metric."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from classifiers import write_bert, write_recipe, write_texts
from typer.testing import CliRunner

from wegeft_cli.cli.app import app
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.dataset_groups import CLASS_GROUPS
from wegeft_cli.evaluation.benchmarks.registry import check_benchmark
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.evaluation.model_groups import find_members
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import DataSection, DataSource, Recipe
from wegeft_cli.runs.train import train

NAMES = [member.name for member in CLASS_GROUPS["glue"].members]


def write_rows(name):
    """Rows of a set: numbers for STS-B, else two classes; some are answered wrongly at first."""
    labels = [0.0, 1.5, 3.0, 5.0] if name == "stsb" else ["no", "yes", "yes", "no"]
    return [{"text": f"{name} {n}", "label": label} for n, label in enumerate(labels * 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, build_tokenizer):
    """A run of one step of each set of GLUE. Only to be read."""
    folder = tmp_path_factory.mktemp("glue")
    base = write_bert(folder / "bert", build_tokenizer(pad="<pad>"))
    told = {}
    for name in NAMES:
        (folder / name).mkdir()
        path = write_texts(folder / name / "rows.jsonl", write_rows(name))
        problem = {"problem_type": "regression"} if name == "stsb" else {}
        recipe = write_recipe(
            folder,
            f"run-{name}",
            task="sequence_classification",
            model={"name_or_path": str(base)},
            adapter={"target_modules": ["query", "value"]},
            data={
                **{part: [{"path": str(path)}] for part in ("train", "validation")},
                "max_length": 64,
                **problem,
            },
        )
        told[name] = train(recipe, ["train.max_steps=1"]).run_dir
    return told


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_mean_of_glue_is_over_each_sets_own_metric(runs):
    given = [str(path) for path in reversed(runs.values())]
    done = CliRunner().invoke(app, ["eval", "--task", "glue", *given, "--output", "glue.json"])
    assert done.exit_code == 0, done.output
    result = json.loads(Path("glue.json").read_text())
    rows = {row["task"]: row for row in result["results"]}
    assert list(rows) == NAMES
    for member in CLASS_GROUPS["glue"].members:
        (alone,) = evaluate(runs[member.name])["results"]
        row = rows[member.name]
        assert (row["split"], row["metric"]) == ("validation", member.metric)
        assert row["score"] == alone["metrics"][member.metric]
        assert (row["ci95"] is None) == (member.metric != "accuracy")
    (mean,) = result["groups"]
    assert mean["score"] == pytest.approx(sum(row["score"] for row in rows.values()) / 8)
    assert f"glue: {mean['score']:.1%}" in done.output
    lines = [json.loads(line) for line in Path(result["samples_path"]).read_text().splitlines()]
    assert {line["task"] for line in lines} == set(NAMES)
    compared = CliRunner().invoke(app, ["compare", "glue.json", "glue.json"])
    assert compared.exit_code == 0
    assert "stsb (classification)" in compared.output  # neither right nor wrong: told


def test_what_is_missing_doubled_or_foreign_is_told_before_anything_is_loaded(runs, llama_dir):
    def refuse(targets, *names, **options):
        with pytest.raises((UserError, ExceptionGroup)) as caught:
            evaluate(targets, tasks=names, **options)
        fault = caught.value
        return " ".join(map(str, getattr(fault, "exceptions", [fault])))

    paths = list(runs.values())
    assert "no run was given of cola, rte" in refuse(paths[1:-1], "glue")
    assert "no run was given of cola" in refuse(None, "glue")
    assert "a second run of mrpc" in refuse([*paths, runs["mrpc"]], "glue")
    assert "this is no classifier" in refuse([*paths[1:], llama_dir], "glue")
    assert "names none of the sets of `vtab`" in refuse(paths, "vtab")
    assert "not beside boolq" in refuse(paths, "glue", "boolq")
    assert "for language models" in refuse(paths, "glue", protocol="gift")
    assert "one is scored at a time" in refuse(paths)


@pytest.mark.parametrize(
    ("recipe", "group", "expected"),
    [
        ("roberta_glue", "glue", "mrpc"),
        ("vit_fgvc", "fgvc", "cub"),
        ("vit_vtab", "vtab", "cifar100"),
    ],
)
def test_the_shipped_recipes_tell_their_set(recipe, group, expected):
    loaded = load_recipe(recipe, need_data=False).recipe
    assert [m.name for m in find_members(CLASS_GROUPS[group], loaded, ())] == [expected]


def name_members(group, recipe, splits=()):
    found = find_members(CLASS_GROUPS[group], recipe, splits)
    return [None if member is None else member.name for member in found]


def test_rows_of_another_set_beside_a_sets_own_are_seen():
    sources = [DataSource(path=f"/d/{name}/test.jsonl") for name in ("rte", "my_own")]
    recipe = Recipe(data=DataSection(test=sources))
    assert name_members("glue", recipe) == ["rte", None]


@pytest.mark.parametrize(
    ("group", "data", "expected"),
    [
        # What is scored decides, and of that the word nearest to the rows.
        ("glue", {"train": "/d/mnli/train.jsonl", "test": "/d/my_own/test.jsonl"}, [None]),
        ("glue", {"train": "/d/mnli/a.jsonl", "validation": "/d/rte/b.jsonl"}, ["rte"]),
        ("fgvc", {"test": "/home/ann/dogs/fgvc/cars/test.json"}, ["cars"]),
        ("fgvc", {"test": "/data/dogs.json", "validation": "/data/cars.json"}, ["dogs"]),
        ("vtab", {"test": "/data/vtab/flowers/test.json"}, ["flowers102"]),
    ],
)
def test_the_scored_rows_tell_the_set(group, data, expected):
    sources = {split: [DataSource(path=path)] for split, path in data.items()}
    recipe = Recipe(data=DataSection(**sources))
    assert name_members(group, recipe) == expected
    splits = ["validation"] if "validation" in data else ()
    named = name_members(group, recipe, splits)
    assert named == (["cars"] if group == "fgvc" and splits else expected)


def test_a_recipe_that_names_the_group_is_told_what_it_is(llama_dir):
    with pytest.raises(UserError, match="one fine-tuned on each of its sets") as caught:
        check_benchmark("glue", "wegeft", must_fit=False)
    assert "wegeft eval --task glue RUN" in str(caught.value.hint)
