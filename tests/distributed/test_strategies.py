"""Two and four processes, under every strategy, are one process on the same global batch."""

import json
from pathlib import Path

import pytest
import torch
from preloaded import run_group
from safetensors.torch import load_file

from wegeft_cli.runs.train import train

pytestmark = pytest.mark.slow

# SGD's steps are the summed gradients themselves: float32 sums in another order, over three steps.
SAME_SUMS = 1e-6
# Of sums that are rounded to float32 once on one process and once on each of many.
SAME_FIGURES = 1e-5
TIMEOUT_SECONDS = 280
WORKER = Path(__file__).with_name("run_many.py")

# Name -> (training rows, sections). Every row has another number of learned tokens.
SETTINGS = {
    "plain": (8, {}),
    # The last micro-batch has one row: all processes but one are without any.
    "idle": (9, {"train": {"gradient_accumulation_steps": 2}}),
    "recomputed": (8, {"train": {"gradient_checkpointing": True}}),
    "dropout": (
        9,
        {
            "adapter": {"dropout": 0.2, "share": "none"},
            "train": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        },
    ),
    "by width": (8, {"adapter": {"share": "input_dim", "target_modules": "all-linear"}}),
    "groups": (
        8,
        {
            "adapter": {"groups": {"a": ["q_proj", "v_proj"], "b": ["down_proj"]}},
            "train": {"neftune_noise_alpha": 5},
        },
    ),
    "output side": (8, {"adapter": {"side": "output", "share": "none"}}),
    "tied": (8, {"model": "tied", "data": {"packing": "bfd", "max_length": 48}}),
}
# Four processes add another division and the copies of hsdp: three settings will do.
OF_FOUR = ("idle", "dropout", "groups")
# (processes, strategy, further keys)
GROUPS = {
    "replicated 2": (2, {"strategy": "replicated"}),
    "fsdp2 2": (2, {"strategy": "fsdp2"}),
    "replicated 4": (4, {"strategy": "replicated"}),
    "fsdp2 4": (4, {"strategy": "fsdp2"}),
    "hsdp 4": (4, {"strategy": "hsdp", "fsdp_size": 2}),
}


def settings_of(num_processes):
    return OF_FOUR if num_processes == 4 else tuple(SETTINGS)


def launch(num_processes, paths, *words):
    return run_group(num_processes, WORKER, json.dumps(paths), *words, timeout=TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_recipe_in, build_llama_dir, unequal_rows):
    """Every setting under every strategy: (strategy, setting) -> the run's folder."""
    folder = tmp_path_factory.mktemp("strategies")
    tied = str(build_llama_dir(tie_word_embeddings=True))
    held = write_recipe_in(folder, "held", rows=unequal_rows[:5]).with_suffix(".jsonl")

    def write(group, num_processes, strategy, name):
        num_rows, sections = SETTINGS[name]
        sections = dict(sections)
        if sections.get("model") == "tied":
            sections["model"] = {"name_or_path": tied}
        sections["data"] = {"validation": [{"path": str(held)}], **sections.get("data", {})}
        # Passes of one row, so that what is drawn for a pass falls on the same row everywhere.
        steps = {"per_device_train_batch_size": 1, "max_steps": 3, "optim": "sgd"}
        own = dict(sections.pop("train", {}))
        accumulation = own.pop("gradient_accumulation_steps", 1) * 4 // num_processes
        sections["train"] = {
            **steps, "learning_rate": 0.02, "eval_steps": 2, "check_steps": 1, **own,
            "gradient_accumulation_steps": accumulation, **strategy,
        }  # fmt: skip
        label = f"{group} {name}".replace(" ", "-")
        return write_recipe_in(folder, label, rows=unequal_rows[:num_rows], **sections)

    for name in SETTINGS:
        train(write("one", 1, {}, name))
    for num_processes in (2, 4):
        paths = [
            str(write(group, size, strategy, name))
            for group, (size, strategy) in GROUPS.items()
            if size == num_processes
            for name in settings_of(num_processes)
        ]
        done = launch(num_processes, paths)
        assert done.returncode == 0, done.stderr[-9000:]
    return lambda group, name: folder / "runs" / f"{group} {name}".replace(" ", "-")


def read_lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def load_factors(run_dir):
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("group", "name"), [(g, name) for g in GROUPS for name in settings_of(GROUPS[g][0])]
)
def test_many_processes_are_one(trained, group, name):
    one, many = trained("one", name), trained(group, name)
    expected, found = load_factors(one), load_factors(many)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).abs().max() < SAME_SUMS * max(1, tensor.abs().max()), key
    for a, b in zip(read_lines(one), read_lines(many), strict=True):
        assert a.get("num_tokens") == b.get("num_tokens")
        assert a.keys() == b.keys()
        for key in a.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=SAME_FIGURES)
    names = [sorted(p.name for p in run.rglob("*") if p.is_file()) for run in (one, many)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("num_processes", "name"), [(n, name) for n in (2, 4) for name in settings_of(n)]
)
def test_a_shared_base_gives_the_same_bits(trained, num_processes, name):
    replicated = load_factors(trained(f"replicated {num_processes}", name))
    sharded = [trained(g, name) for g in GROUPS if g[-1] == str(num_processes) and "sdp" in g]
    assert len(sharded) == num_processes // 2
    for run_dir in sharded:
        factors = load_factors(run_dir)
        assert all(torch.equal(factors[key], tensor) for key, tensor in replicated.items())


def test_settings_differ(trained):
    """None of them was silently another; only recomputing activations changes nothing."""
    norms = {
        sum(float(t.double().norm()) for t in load_factors(trained("one", name)).values())
        for name in SETTINGS
        if name != "recomputed"
    }
    assert len(norms) == len(SETTINGS) - 1


def test_processes_that_diverge_are_stopped(write_recipe):
    """At the next comparison, before anything wrong is saved."""
    steps = {"per_device_train_batch_size": 1, "max_steps": 12, "save_steps": 2, "check_steps": 1}
    recipe = write_recipe(train=steps)
    done = launch(2, [str(recipe)], "diverge")
    assert done.returncode != 0
    assert "the processes hold different factors at step 3" in done.stderr
    run_dir = recipe.parent / "runs" / recipe.stem
    assert json.loads((run_dir / "run.json").read_text())["status"] == "failed"
    assert [path.name for path in run_dir.glob("checkpoints/step-*")] == ["step-00000002"]
