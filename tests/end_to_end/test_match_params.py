"""A budget of trainable parameters chooses the rank once, for any method that has one."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest
import yaml
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from wegeft_cli.cli.commands.plan import show_groups
from wegeft_cli.errors import UserError
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.registry import find_method
from wegeft_cli.models.loading import build_skeleton
from wegeft_cli.planning import rank_match
from wegeft_cli.planning.plan import plan
from wegeft_cli.planning.preflight import check_targets
from wegeft_cli.planning.rank_search import try_ranks
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.sweep import load_sweep
from wegeft_cli.runs.bench.contestants import load_entries, read_contestants
from wegeft_cli.runs.children import RunQueue, check_recipes, list_outcomes
from wegeft_cli.runs.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

WITHOUT_RANK = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
TYPES = {str(getattr(kind, "value", kind)).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
WITH_SCALE = {**WITHOUT_RANK, "r": 4, "alpha": 2}


@pytest.fixture
def write_with(write_recipe):
    """A function: write a recipe with this whole `adapter` section and give its path."""

    def write(adapter, name="tiny"):
        path = write_recipe(name, data={"validation_fraction": 0.2}, train={"max_steps": 2})
        values = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**values, "adapter": adapter}))
        return path

    return write


def count_at(path, *overrides):
    return sum(group.num_parameters for group in check_targets(load_recipe(path, overrides)))


def match(path, overrides=()):
    """Return the rank that a recipe's budget chooses."""
    return plan(path, overrides).matched


@pytest.mark.parametrize("method", ["wegeft", "dora", "adalora", "vera", "gralora", "randlora"])
def test_the_rank_of_the_nearest_count_is_chosen(write_with, method):
    recipe = write_with({**WITHOUT_RANK, "type": method})
    matched = match(recipe, ["adapter.match_params=5000"])
    assert (matched.asked, matched.budget) == (5000, 5000)
    loaded = load_recipe(recipe).recipe
    _, skeleton = build_skeleton(loaded.model)
    counts = {}
    for rank in range(max(1, matched.r - 2), matched.r + 3):
        with suppress(UserError):
            groups = find_method(method).count(skeleton, replace(loaded.adapter, r=rank), None)
            counts[rank] = sum(group.num_parameters for group in groups)
    assert counts[matched.r] == matched.trainable_parameters
    assert len(counts) > 1
    assert min(counts, key=lambda rank: abs(counts[rank] - 5000)) == matched.r


@pytest.mark.parametrize(
    ("count", "budget", "rank"),
    [
        (lambda r: 7 * r, 700, 100),
        (lambda r: 7 * r + 3, 699, 99),
        (lambda r: r * r, 5000, 71),
        (lambda r: 100_000 // r, 1000, 100),
        (lambda r: 100 * (r // 8) + 1, 500, 40),
        (lambda r: 9, 500, 8),
        (lambda r: 5, 5, 8),
        (lambda r: 1000 + 3 * r, 5000, 1333),
        (lambda r: 64_000_000 // r + 500, 20_000, 3282),
        (lambda r: 7000 * r, 123_456_789, 2**14),
        (lambda r: 7 * r, 3, 1),
    ],
)
def test_counts_grow_or_shrink_with_the_rank(count, budget, rank):
    asked = []
    counts = try_ranks(lambda r: asked.append(r) or count(r), budget)
    assert min(counts, key=lambda r: (abs(counts[r] - budget), r)) == rank
    assert len(asked) == len(set(asked)) <= 12


@pytest.mark.parametrize("rank", [3, 16, 61, 1000])
def test_a_line_through_the_origin_takes_a_few_counts(rank):
    """A count of a large model takes seconds."""
    asked = []
    counts = try_ranks(lambda r: asked.append(r) or 2_498_560 * r, 2_498_560 * rank + 1)
    assert min(counts, key=lambda r: abs(counts[r] - 2_498_560 * rank)) == rank
    assert len(asked) <= 4


@pytest.mark.parametrize(
    ("is_taken", "budget", "rank"),
    [
        (lambda r: r <= 13, 1000, 13),
        (lambda r: r <= 13, 120, 12),
        (lambda r: r % 2 == 0, 150, 14),
        (lambda r: r % 4 == 0, 100, 8),
        (lambda r: r % 4 == 0 and r <= 24, 5000, 24),
    ],
)
def test_ranks_that_a_method_refuses_are_passed_over(is_taken, budget, rank):
    asked = []

    def count(r):
        asked.append(r)
        if not is_taken(r):
            raise UserError("is refused")
        return 10 * r

    counts = try_ranks(count, budget)
    assert len(asked) == len(set(asked)) < 50
    assert min(counts, key=lambda r: (abs(counts[r] - budget), r)) == rank


def test_a_method_that_refuses_every_rank_tells_why():
    def refuse(r):
        raise UserError(f"{r} is refused")

    with pytest.raises(UserError, match="1 is refused"):
        try_ranks(refuse, 100)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.match_params=10"], "rank 1 has 224 and rank 2 has 448"),
        (["adapter.match_params=1000"], "rank 4 has 896 and rank 5 has 1,120"),
        (["adapter.match_params=5000", "adapter.type=lokr"], "'lokr'"),
        (["adapter.match_params=5000", "adapter.type=ia3"], "'ia3' has none"),
        (["adapter.match_params=5000", "adapter.type=full"], "'full' has none"),
        (["adapter.match_params=5000", "adapter.type=bitfit"], "'bitfit' has none"),
        (
            ["adapter.match_params=5000", "adapter.type=oft", "adapter.peft={oft_block_size: 4}"],
            "with these options has none",
        ),
        (
            ["adapter.match_params=5000", "adapter.type=adalora", "adapter.peft={init_r: 9}"],
            "fixes the number of parameters",
        ),
        (["adapter.match_params=5000", "adapter.r=8"], "contradicts `adapter.r` 8"),
        (["adapter.match_params=5000", "adapter.init_from=."], "keeps the rank of its adapter"),
        (["adapter.match_params=0"], "at least 1"),
        (["adapter.match_params=-5"], "at least 1"),
        (["adapter.match_params=true"], "whole number"),
        (["adapter.match_params=1e6"], "write 1000000"),
        (["adapter.match_params=2.5"], "whole number"),
        (["adapter.match_params='5000'"], "write 5000 without quotes"),
        (["adapter.match_params=''"], "whole number"),
        (["adapter.match_params=[1]"], "whole number"),
        (["adapter.match_params={}"], "`params` and `scale`"),
        (["adapter.match_params={params: 5, size: 1}"], "`params` and `scale`"),
        (["adapter.match_params={params: 5000, scale: 0}"], "must be above 0"),
        (["adapter.alpha=3", "adapter.match_params={params: 5000, scale: 1}"], "keep one of the"),
        (["adapter.scale_rule=rank_width", "adapter.match_params={params: 5, scale: 1}"], "rule"),
        (["adapter.match_params=nowhere.yaml"], "no such file"),
        pytest.param(
            ["adapter.type=tinylora", "adapter.match_params=20000"],
            "other options of the method change the number",
            marks=pytest.mark.skipif("tinylora" not in TYPES, reason="a newer PEFT's"),
        ),
    ],
)
def test_a_budget_that_cannot_be_met_is_told(write_with, overrides, words):
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        match(write_with(WITHOUT_RANK), overrides)
    found = caught.value.exceptions if isinstance(caught.value, ExceptionGroup) else [caught.value]
    assert words in "; ".join(f"{fault} {fault.hint}" for fault in found)


@pytest.mark.parametrize(
    ("adapter", "overrides", "alpha"),
    [
        (WITHOUT_RANK, [], None),
        ({**WITHOUT_RANK, "alpha": 3}, [], 3),
        (WITHOUT_RANK, ["adapter.alpha=3"], 3),
        (WITH_SCALE, [], 2.5),
        ({**WITHOUT_RANK, "r": 4}, [], None),
        (WITH_SCALE, ["adapter.alpha=3"], 3),
        (WITH_SCALE, ["adapter.match_params={params: 1120, scale: 0.2}"], 1),
    ],
)
def test_the_scale_stays_unless_alpha_is_named(write_with, adapter, overrides, alpha):
    recipe = write_with(adapter)
    for order in (1, -1):
        texts = ["adapter.match_params=1120", *overrides]
        if any("scale" in text for text in overrides):
            texts = overrides
        matched = match(recipe, texts[::order])
        assert (matched.r, matched.alpha) == (5, alpha)
    swept = load_sweep(recipe, ["sweep.adapter.match_params=[1120]", *overrides[:0]])
    assert swept.runs[0].loaded.recipe.adapter.match_params is not None


def test_a_later_file_or_override_chooses_in_its_own_way(write_with):
    recipe = write_with({**WITHOUT_RANK, "match_params": 1120})
    child = recipe.with_name("child.yaml")
    child.write_text("extends: tiny.yaml\nadapter: {r: 3}\n")
    for loaded in (load_recipe(child), load_recipe(recipe, ["adapter.r=3"])):
        assert (loaded.recipe.adapter.r, loaded.recipe.adapter.match_params) == (3, None)
    child.write_text("extends: ranked.yaml\nadapter: {match_params: 1120}\n")
    write_with(WITH_SCALE, "ranked")
    assert load_recipe(child).recipe.adapter.match_params == {"params": 1120, "scale": 0.5}
    child.write_text("extends: tiny.yaml\nadapter: {match_params: 1120, r: 3}\n")
    with pytest.raises(UserError, match="contradicts"):
        load_recipe(child)
    # Another method of a bench or a sweep may have no rank.
    bitfit = load_recipe(recipe, ["adapter.type=bitfit"])
    assert bitfit.recipe.adapter.match_params is None
    assert any("adapter.match_params" in note for note in bitfit.notes)


def test_the_parameters_of_another_recipe_are_counted_on_this_base(write_with, monkeypatch):
    recipe = write_with({**WITHOUT_RANK, "match_params": "other.yaml"})
    other = write_with({**WITHOUT_RANK, "type": "lora", "r": 3}, "other")
    monkeypatch.chdir(recipe.parent.parent)
    matched = match(recipe)
    assert (matched.budget, matched.r) == (1152, 5)
    assert matched.budget == count_at(other)
    with pytest.raises(UserError, match="has a budget itself"):
        match(recipe, [f"adapter.match_params={recipe}"])
    write_with({"type": "lora", "target_modules": ["no_such"]}, "other")
    with pytest.raises(UserError, match=r"other\.yaml' cannot be counted: .*no_such"):
        match(recipe)


def test_a_plan_holds_budget_rank_and_count(write_with, capsys):
    recipe = write_with(WITH_SCALE)
    found = plan(recipe, ["adapter.match_params=1150"])
    assert found.trainable_parameters == found.matched.trainable_parameters == 1120
    assert found.to_json()["matched"]["r"] == 5
    show_groups(found)
    assert "rank 5: 1,120 parameters for a budget of 1,150 (-2.6%)" in capsys.readouterr().out


def test_a_run_records_its_rank_and_never_chooses_it_again(write_with, monkeypatch):
    recipe = write_with(WITH_SCALE)
    options = ["adapter.match_params=1150", "train.save_steps=1"]
    result = train(recipe, options)
    saved = yaml.safe_load((result.run_dir / "recipe.yaml").read_text())["adapter"]
    assert (saved["r"], saved["alpha"], saved["match_params"]) == (5, 2.5, None)
    record = json.loads((result.run_dir / "run.json").read_text())
    assert record["match_params"] == {
        "asked": {"params": 1150, "scale": 0.5},
        "budget": 1150,
        "r": 5,
        "alpha": 2.5,
        "trainable_parameters": 1120,
    }
    assert record["trainable_parameters"] == 1120
    config = json.loads((result.run_dir / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["alpha"]) == (5, 2.5)
    monkeypatch.setattr(rank_match, "try_ranks", lambda *args: pytest.fail("chosen again"))
    assert train(recipe, options, resume="auto").status == "finished"
    step = result.run_dir / "checkpoints" / "step-00000001"
    merge(step, output=recipe.parent / "merged")
    longer = [*options, "train.max_steps=3", f"output_dir={recipe.parent / 'longer'}"]
    fork = train(recipe, longer, resume=str(step))
    assert fork.status == "finished"
    assert train(recipe, longer, resume="auto").num_steps == 3
    with pytest.raises(UserError, match="params: 1150 then, 1140 now"):
        train(recipe, ["adapter.match_params=1140", *options[1:]], resume="auto")


def test_a_queue_writes_the_budget_first_and_the_rank_once_it_is_chosen(write_with, listener):
    runs = load_sweep(write_with(WITH_SCALE), ["sweep.adapter.match_params=[1150]"]).runs
    queue = RunQueue(runs, list_outcomes(runs), lambda: None, listener)
    queue.prepare()
    (outcome,) = queue.outcomes
    file = outcome.run_dir / "recipe.yaml"
    adapter = yaml.safe_load(file.read_text())["adapter"]
    assert adapter["match_params"] == {"params": 1150, "scale": 0.5}
    assert "r" not in adapter
    looks = iter([False, True])
    train(file, resume="auto", should_stop=lambda: next(looks, True))
    queue.prepare()
    adapter = yaml.safe_load(file.read_text())["adapter"]
    assert (adapter["r"], adapter["alpha"], adapter["match_params"]) == (5, 2.5, None)
    # A run that resumes from that file keeps its budget: the queue finds it again.
    assert train(file, resume="auto").status == "finished"
    record = json.loads((outcome.run_dir / "run.json").read_text())
    assert record["match_params"]["asked"] == {"params": 1150, "scale": 0.5}
    check_recipes(runs)


def test_a_scale_that_is_interpolated_must_be_named(write_with):
    recipe = write_with({**WITHOUT_RANK, "r": 16, "alpha": "${adapter.r}"})
    with pytest.raises(UserError, match="is not known before they are interpolated"):
        load_recipe(recipe, ["adapter.match_params=1150"])
    asked = load_recipe(recipe, ["adapter.match_params={params: 1150, scale: 3}"]).recipe.adapter
    assert (asked.match_params, asked.alpha) == ({"params": 1150, "scale": 3}, None)


def test_a_method_of_a_bench_has_a_budget_of_its_own(write_with):
    search = ["train.learning_rate=0.01,0.02"]
    settings = ["lora:adapter.match_params=768"]
    found = read_contestants(["wegeft", "lora"], settings, search)
    mine, lora = load_entries(write_with(WITH_SCALE), ["adapter.r=3"], found, [6])
    assert (mine.recipe.adapter.r, mine.recipe.adapter.match_params) == (3, None)
    assert lora.recipe.adapter.match_params == {"params": 768, "scale": 0.5}
