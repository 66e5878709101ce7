"""Bad input: one clear message, exit code 2 (1 where the machine failed), and nothing changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Regex, normalizers

from wegeft_cli.cli.app import guard
from wegeft_cli.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER

ROOMS = ["train", "plan", "preview", "validate"]
WEIGHTS = Path("adapter/adapter_model.safetensors")
CONFIG = Path("adapter/adapter_config.json")


@pytest.fixture
def refuse(wegeft, place) -> Callable[..., str]:
    """Run words that are at fault; give the message, having seen that nothing else happened."""

    def run(*words: object, code: int = EXIT_USER) -> str:
        before = place.read_files()
        result = wegeft(*words)
        assert result.exit_code == code, result.output
        assert isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        assert "error: " in result.stderr
        assert place.read_files() == before
        return result.stderr

    return run


@pytest.fixture
def rewrite(place) -> Callable[..., None]:
    """Put another text in the place of one that the recipe holds."""

    def replace(old: str, new: str) -> None:
        text = place.recipe.read_text()
        assert text.count(old) == 1
        place.recipe.write_text(text.replace(old, new))

    return replace


# --- the recipe


@pytest.mark.parametrize("command", ROOMS)
def test_every_fault_of_a_recipe_at_once_with_its_place(refuse, place, command):
    lines = place.recipe.read_text().splitlines()
    lines += ["sede: 3", "seed: 4", "eval: {limit: many}"]
    place.recipe.write_text("\n".join(lines) + "\n")
    told = refuse(command, place.recipe, "adapter.dropout=0.1", "adapter.view=activation")
    end = len(lines)
    for part in [
        f"{place.recipe}:{end - 2}:1: sede", "did you mean `seed`?",
        f"{place.recipe}:{end - 1}:1: seed", "set twice",
        f"{place.recipe}:{end}:", "eval.limit", "'many'",
        "adapter.view", "contradicts", "adapter.dropout",
    ]:  # fmt: skip
        assert part in told


@pytest.mark.parametrize("command", ROOMS)
@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("missing.yaml", ["missing.yaml", "no such file"]),
        ("quikstart", ["did you mean `quickstart`?"]),
        (".", ["folder"]),
        ("tiny.jsonl", ["tiny.jsonl"]),
    ],
)
def test_what_is_no_recipe(refuse, place, command, recipe, parts):
    told = refuse(command, recipe)
    assert all(part in told for part in parts)


@pytest.mark.parametrize("command", ROOMS)
@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "nothing"), (b"a: [1,\n", "YAML"), (b"\xff\xfe\x00", "UTF-8"), (b"[1, 2]", "map")],
)
def test_damaged_recipes(refuse, place, command, content, part):
    place.recipe.write_bytes(content)
    told = refuse(command, place.recipe)
    assert str(place.recipe) in told
    assert part in told


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.lerning_rate=1"], ["train.lerning_rate", "did you mean `train.learning_rate`?"]),
        (["oops"], ["override `oops`", "key=value"]),
        (["seed=x"], ["override `seed=x`", "whole number"]),
        (["train.warmup_ratio=0.1", "train.warmup_steps=3"], ["contradicts", "keep one"]),
        (["adapter.r=0"], ["adapter.r", "at least 1"]),
        (["adapter.type=lorra"], ["adapter.type", "did you mean `lora`, `glora` or `1lora`?"]),
        (["task=image_clasification"], ["task", "did you mean `image_classification`?"]),
        (["adapter.type=adalora", "train.ema_decay=0.9"], ["train.ema_decay", "adalora"]),
        (["train.strategy=fsdp_2"], ["train.strategy", "did you mean `fsdp2`?"]),
        (["train.strategy=fsdp"], ["train.strategy", "shards the factors", "use one of"]),
        (["train.static_graph=true"], ["train.static_graph", "fails with accumulation"]),
        (
            ["train.gradient_checkpointing_kwargs.use_reentrant=true"],
            ["train.gradient_checkpointing_kwargs", "wrong gradients"],
        ),
    ],
)
@pytest.mark.parametrize("command", ROOMS)
def test_overrides_at_fault(refuse, place, command, overrides, parts):
    told = refuse(command, place.recipe, *overrides)
    assert all(part in told for part in parts)


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("adapter.target_modules=[q_prj]", ["'q_prj'", "did you mean 'q_proj'?"]),
        ("adapter.target_modules='.*nowhere'", ["'.*nowhere'", "regular expression"]),
        (
            "adapter.groups={both: [q_proj, v_proj, down_proj]}",
            ["adapter.groups.both", "two sizes", "has 32", "has 48"],
        ),
        (
            "adapter.groups={a: [q_proj, v_proj, down_proj], b: [q_proj]}",
            ["adapter.groups", "in two groups"],
        ),
        ("model.name_or_path=./nowhere", ["model.name_or_path", "no folder './nowhere'"]),
        ("model.name_or_path=tiny.jsonl", ["model.name_or_path", "is a file"]),
        ("model.name_or_path=.", ["model.name_or_path", "no config.json"]),
        ("model.name_or_path=nowhere/model", ["model.name_or_path", "cannot load", "network"]),
    ],
)
def test_what_does_not_fit_the_model_is_told_with_its_place(
    refuse, place, command, override, parts
):
    told = refuse(command, place.recipe, override)
    assert f"override `{override}`" in told
    assert all(part in told for part in parts)


def test_a_fault_found_in_the_model_names_the_recipes_line(refuse, place, rewrite):
    rewrite("- q_proj", "- q_prj")
    told = refuse("train", place.recipe)
    line = 1 + next(
        n
        for n, text in enumerate(place.recipe.read_text().splitlines())
        if "target_modules" in text
    )
    assert f"{place.recipe}:{line}:" in told
    assert "adapter.target_modules" in told


def test_a_peft_option_is_misspelt(refuse, place):
    pytest.importorskip("peft")
    told = refuse("train", place.recipe, "adapter.type=lora", "adapter.peft={lora_dropot: 0.1}")
    assert "adapter.peft.lora_dropot" in told
    assert "did you mean `lora_dropout`?" in told


def test_foreign_spellings_are_announced(wegeft, place, rewrite):
    rewrite("max_length: 64", "sequence_len: 64")
    for command in ROOMS:
        words = ["--dry-run"] if command == "train" else []
        result = wegeft(command, place.recipe, *words)
        assert result.exit_code == EXIT_DONE
        assert "`data.sequence_len` is read as `data.max_length`" in result.stderr


# --- the data


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["no rows"]),
        (b"broken\n", ["tiny.jsonl:1", "not JSON"]),
        (
            b'{"prompt": "a", "completion": "b"}\n[1]\n',
            ["tiny.jsonl:2", "not an object", "name the file .json"],
        ),
        (
            b'{"prompt": "a", "completion": "b"}\n'
            b'{"prompt": "a", "completion": "b", "prompt": "c"}\n',
            ["tiny.jsonl:2", "has the key 'prompt' twice"],
        ),
        (b"\xff\n", ["tiny.jsonl:1", "UTF-8"]),
        (b'{"foo": 1}\n', ["columns found: foo"]),
        (b'{"prompt": "a", "completion": ""}\n', ["has anything to learn", "empty completion"]),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n', ["tiny.jsonl:2"]),
        (
            b'{"prompt": "' + b"word " * 100 + b'", "completion": "b"}\n',
            ["has anything to learn", "data.max_length 64"],
        ),
    ],
)
def test_rows_that_cannot_be_learned_from(refuse, place, content, parts):
    (place.path / "tiny.jsonl").write_bytes(content)
    told = refuse("train", place.recipe)
    assert all(part in told for part in [*parts, "data.train[0]"])


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("missing.jsonl", ["data.train[0].path", "no such file or folder"]),
        ("runs", ["no file for the split"]),
        ("owner/missing", ["data.train[0].path", "hub"]),
    ],
)
def test_missing_data(refuse, place, path, parts):
    (place.path / "runs").mkdir()
    told = refuse("train", place.recipe, f"data.train[0].path={path}")
    assert all(part in told for part in parts)


def test_rows_longer_than_max_length_are_counted_and_told(wegeft, place):
    result = wegeft("train", place.recipe, "data.max_length=16", "--dry-run")
    assert result.exit_code == EXIT_DONE
    assert "rows were cut" in result.stderr
    assert "data.max_length 16" in result.stderr


def test_max_length_beyond_the_models_context(refuse, place):
    told = refuse("train", place.recipe, "data.max_length=257")
    assert all(part in told for part in ["data.max_length", "257", "256"])


def test_a_plan_tells_what_it_cannot_know(wegeft, place):
    (place.path / "tiny.jsonl").unlink()
    for overrides in ([], ["train.max_steps=7"]):
        result = wegeft("plan", place.recipe, *overrides)
        assert result.exit_code == EXIT_DONE
        assert "unknown: rows and steps" in result.stdout
        assert "tiny.jsonl" in result.stdout
    assert "7 optimizer steps" in result.stdout


# --- the output folder


def test_a_folder_with_a_run_is_not_trained_into(refuse, place_with_run):
    told = refuse("train", place_with_run.recipe)
    assert all(part in told for part in ["already holds a run", "finished", "output_dir="])


@pytest.mark.parametrize("name", ["adapter/x", "metrics.jsonl", "checkpoints/step-00000001/x"])
def test_a_folder_with_a_runs_files_is_not_trained_into(refuse, place, name):
    (place.run / name).parent.mkdir(parents=True)
    (place.run / name).write_text("mine")
    assert "already holds a run" in refuse("train", place.recipe)


def test_somebodys_own_recipe_is_not_replaced(refuse, place):
    own = place.path / "recipe.yaml"
    shutil.copy(place.recipe, own)
    told = refuse("train", own, f"output_dir={place.path}")
    assert f"{own}: output_dir" in told


@pytest.mark.parametrize("folder", ["tiny.jsonl", "tiny.jsonl/deep/run"])
def test_a_file_stands_where_the_folder_should_go(refuse, place, folder):
    told = refuse("train", place.recipe, f"output_dir={folder}")
    assert all(part in told for part in ["output_dir", "'tiny.jsonl' is a file"])


def test_a_run_that_failed_before_its_first_step_leaves_the_way_free(wegeft, place):
    wrong = wegeft("train", place.recipe, "model.attn_implementation=nonsense")
    assert wrong.exit_code == EXIT_USER
    assert "model.attn_implementation" in wrong.stderr
    assert json.loads((place.run / "run.json").read_text())["status"] == "failed"
    assert wegeft("train", place.recipe, "train.max_steps=1").exit_code == EXIT_DONE


def test_resuming_what_is_no_checkpoint_leaves_the_run_as_it_is(refuse, place_with_run):
    for path in ("nowhere", place_with_run.run / "adapter", place_with_run.recipe):
        told = refuse("train", place_with_run.run / "recipe.yaml", "--resume", path)
        assert str(path) in told


def test_resuming_under_another_recipe(refuse, place_with_run):
    words = ["train", place_with_run.run / "recipe.yaml", "adapter.r=2"]
    told = refuse(*words, "--resume", "auto")
    assert "adapter.r: 4 then, 2 now" in told
    checkpoint = next((place_with_run.run / "checkpoints").iterdir())
    told = refuse(*words, "output_dir=two", "--resume", checkpoint)
    assert "adapter.r: 4 then, 2 now" in told


def test_a_finished_adapter_outlives_the_loss_of_its_checkpoints(refuse, place_with_run):
    shutil.rmtree(place_with_run.run / "checkpoints")
    told = refuse("train", place_with_run.run / "recipe.yaml", "--resume", "auto")
    assert "already holds a run" in told


# --- adapters and bases


def cut(path: Path, keep: int = 60) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def cut_weights(run: Path) -> None:
    cut(run / WEIGHTS)


def cut_weights_end(run: Path) -> None:
    cut(run / WEIGHTS, -4)


def put_nan(run: Path) -> None:
    tensors = load_file(run / WEIGHTS)
    tensors["base_model.wegeft_phi_q_proj"][0, 0] = torch.nan
    save_file(tensors, run / WEIGHTS)


def remove_weights(run: Path) -> None:
    (run / WEIGHTS).unlink()


def remove_config(run: Path) -> None:
    (run / CONFIG).unlink()


def cut_config(run: Path) -> None:
    cut(run / CONFIG)


def write_foreign_json(run: Path) -> None:
    (run / CONFIG).write_text('{"a": 1}')


def write_foreign_weights(run: Path) -> None:
    save_file({"other": torch.ones(2)}, run / WEIGHTS)


def write_lora_config(run: Path) -> None:
    base = json.loads((run / CONFIG).read_text())["base_model_name_or_path"]
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2}
    (run / CONFIG).write_text(json.dumps({**config, "target_modules": ["q_proj"]}))


def forget_base(run: Path) -> None:
    values = json.loads((run / CONFIG).read_text())
    values["base_model_name_or_path"] = str(run / "gone")
    (run / CONFIG).write_text(json.dumps(values))


DAMAGES = [
    (cut_weights, ["adapter_model.safetensors", "damaged"]),
    (cut_weights_end, ["adapter_model.safetensors", "damaged"]),
    (put_nan, ["adapter_model.safetensors", "wegeft_phi_q_proj", "NaN"]),
    (remove_weights, ["adapter_model.safetensors", "missing"]),
    (remove_config, ["adapter", "lacks its adapter_config.json"]),
    (cut_config, ["adapter_config.json", "JSON"]),
    (write_foreign_json, ["adapter_config.json", "peft_type", "no adapter's config"]),
    (write_foreign_weights, ["adapter_model.safetensors", "missing"]),
    (write_lora_config, ["adapter_model.safetensors", "q_proj.lora_A.weight", "copy both"]),
    (forget_base, ["adapter_config.json", "base_model_name_or_path", "--base"]),
]


@pytest.mark.parametrize("command", ["merge", "eval"])
@pytest.mark.parametrize(
    ("damage", "parts"), DAMAGES, ids=lambda value: getattr(value, "__name__", "")
)
def test_damaged_and_foreign_adapters(refuse, place_with_run, data_dir, command, damage, parts):
    if damage is write_lora_config:
        pytest.importorskip("peft")
    damage(place_with_run.run)
    words = ["--task", "boolq", "--data-dir", data_dir] if command == "eval" else []
    told = refuse(command, *words)
    assert all(part in told for part in parts)


@pytest.mark.parametrize("command", ["merge", "eval"])
def test_another_base_is_refused(refuse, place_with_run, build_llama_dir, data_dir, command):
    words = ["--task", "boolq", "--data-dir", data_dir] if command == "eval" else []
    for other in (build_llama_dir(seed=5), build_llama_dir(hidden_size=64)):
        told = refuse(command, *words, "--base", other)
        assert all(part in told for part in ["base_fingerprint", str(other), "--base"])


@pytest.mark.parametrize("command", ["merge", "eval"])
@pytest.mark.parametrize(
    ("base", "parts"),
    [("./nowhere", ["--base", "no folder './nowhere'"]), ("runs", ["--base", "folder 'runs'"])],
)
def test_bases_that_are_not_there(refuse, place_with_run, data_dir, command, base, parts):
    words = ["--task", "boolq", "--data-dir", data_dir] if command == "eval" else []
    told = refuse(command, *words, "--base", base)
    assert all(part in told for part in parts)


def test_a_damaged_base(refuse, place_with_run, llama_dir, data_dir):
    base = shutil.copytree(llama_dir, place_with_run.path / "base")
    cut(base / "model.safetensors", -8)
    for words in (["merge"], ["eval", "--task", "boolq", "--data-dir", data_dir]):
        assert "safetensors" in refuse(*words, "--base", base)
    (place_with_run.path / "two").mkdir()
    told = refuse("train", place_with_run.recipe, f"model.name_or_path={base}", "output_dir=two")
    assert "model.safetensors" in told


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("nowhere", ["nowhere"]),
        ("tiny.jsonl", ["tiny.jsonl", "file"]),
        (".", ["adapter_config.json"]),
    ],
)
@pytest.mark.parametrize("command", ["merge", "eval"])
def test_what_is_no_adapter(refuse, place, data_dir, command, target, parts):
    words = ["--task", "boolq", "--data-dir", data_dir] if command == "eval" else []
    told = refuse(command, target, *words)
    assert all(part in told for part in parts)


@pytest.mark.parametrize("command", ["merge", "eval"])
def test_no_finished_run(refuse, place_with_run, command):
    path = place_with_run.run / "run.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "status": "interrupted"}))
    told = refuse(command)
    assert "no finished run under runs/" in told
    assert "wegeft train" in told


def test_a_recipe_without_a_run_is_no_target(refuse, place, data_dir):
    told = refuse("eval", place.recipe, "--task", "boolq", "--data-dir", data_dir)
    assert f"wegeft train {place.recipe}" in told


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--output", "tiny.jsonl"], ["tiny.jsonl", "file"]),
        (["--output", "tiny.jsonl/deep"], ["tiny.jsonl/deep"]),
        (["--output", "runs"], ["runs", "not empty"]),
        (["--dtype", "float8"], ["--dtype", "'float8'", "bfloat16"]),
    ],
)
def test_where_a_merge_cannot_go(refuse, place_with_run, words, parts):
    told = refuse("merge", *words)
    assert all(part in told for part in parts)


def test_a_second_merge_replaces_nothing(wegeft, refuse, place_with_run):
    assert wegeft("merge").exit_code == EXIT_DONE
    assert "not empty" in refuse("merge")


# --- scores


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--task", "boolk"], ["boolk", "did you mean `boolq`?"]),
        (["--task", "boolq", "--protocol", "nope"], ["nope", "known: wegeft"]),
        (["--task", "mawps"], ["mawps", "test.json"]),
        (["--task", "boolq", "--data-dir", "nowhere"], ["--data-dir", "nowhere/boolq/test.json"]),
        (["--task", "boolq", "--data-dir", "tiny.jsonl"], ["--data-dir"]),
        ([], ["--task"]),
    ],
)
def test_tasks_that_cannot_be_asked(refuse, place, data_dir, llama_dir, words, parts):
    if "--data-dir" not in words:
        words = [*words, "--data-dir", data_dir]
    told = refuse("eval", llama_dir, *words)
    assert all(part in told for part in parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["not JSON"]),
        (b"[]", ["no rows"]),
        (b"{}", ["not a JSON array"]),
        (b"\xff", ["UTF-8"]),
        (b'[{"instruction": "a", "answer": "maybe"}]', ["row 0", "'maybe'"]),
        (b'[{"instruction": "a", "answer": "true"}, 3]', ["row 1"]),
    ],
)
def test_damaged_test_sets(refuse, place, llama_dir, content, parts):
    path = place.path / "data/boolq/test.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    told = refuse("eval", llama_dir, "--task", "boolq", "--data-dir", "data")
    assert all(part in told for part in ["data/boolq/test.json", *parts])


@pytest.mark.parametrize(
    ("output", "parts"),
    [
        ("runs", ["--output", "folder"]),
        ("tiny.jsonl/scores.json", ["--output", "'tiny.jsonl'"]),
        ("tiny.jsonl", ["--output", "nothing else is overwritten"]),
    ],
)
def test_where_scores_cannot_go_is_found_before_the_work(
    refuse, place, llama_dir, data_dir, output, parts
):
    (place.path / "runs").mkdir()
    words = ["--task", "boolq", "--data-dir", data_dir, "--output", output]
    told = refuse("eval", llama_dir, *words)
    assert all(part in told for part in parts)


def test_comparing_needs_a_base(refuse, place, llama_dir, data_dir):
    words = ["--task", "boolq", "--data-dir", data_dir, "--compare-base"]
    assert "--base" in refuse("eval", llama_dir, *words)


def sample(index: object, output: object = "the correct answer is true") -> str:
    return json.dumps({"index": index, "output": output}) + "\n"


ALL_SAMPLES = "".join(sample(index) for index in range(6))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["no sample for 6 of 6 rows"]),
        (ALL_SAMPLES.replace(sample(3), ""), ["no sample for 1 of 6 rows", "index 3"]),
        (ALL_SAMPLES + sample(2), ["given.jsonl:7", "`index` 2 again", "given.jsonl:3"]),
        (ALL_SAMPLES + sample(6), ["given.jsonl:7", "6", "rows 0 to 5"]),
        (ALL_SAMPLES + sample(-1), ["given.jsonl:7", "-1"]),
        (ALL_SAMPLES + sample("1"), ["given.jsonl:7", "not a whole number"]),
        (ALL_SAMPLES + sample(True), ["given.jsonl:7", "not a whole number"]),
        (ALL_SAMPLES.replace(sample(5), sample(5, None)), ["given.jsonl:6", "`output`"]),
        (ALL_SAMPLES + '{"index": 1, "outp', ["given.jsonl:7", "not a line of JSON"]),
        (ALL_SAMPLES + "[]\n", ["given.jsonl:7", "not a JSON object"]),
        (b"\xff\n", ["given.jsonl:1", "UTF-8"]),
    ],
)
def test_bad_samples(refuse, place, data_dir, content, parts):
    path = place.path / "given.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ["--task", "boolq", "--data-dir", data_dir, "--samples", "given.jsonl"]
    told = refuse("eval", *words)
    assert all(part in told for part in parts)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--samples", "missing.jsonl", "--task", "boolq"], "missing.jsonl"),
        (["--samples", ".", "--task", "boolq"], "cannot be read"),
        (["--samples", "given.jsonl"], "--task"),
        (["--samples", "given.jsonl", "--task", "boolq", "--compare-base"], "--compare-base"),
        (["some/model", "--samples", "given.jsonl", "--task", "boolq"], "TARGET"),
    ],
)
def test_samples_that_contradict_the_rest(refuse, place, data_dir, words, part):
    (place.path / "given.jsonl").write_text(ALL_SAMPLES)
    assert part in refuse("eval", "--data-dir", data_dir, *words)


# --- the machine


def test_a_full_disk_while_training_keeps_what_was_saved(
    wegeft, place, monkeypatch: pytest.MonkeyPatch
):
    from wegeft_cli.storage import atomic as files

    settle = files._settle

    def fill_at_second_checkpoint(path: Path, mode: int) -> None:
        if "step-00000002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        settle(path, mode)

    monkeypatch.setattr(files, "_settle", fill_at_second_checkpoint)
    result = wegeft("train", place.recipe, "train.save_steps=1")
    assert result.exit_code == EXIT_FAILED
    assert result.stdout == ""
    assert "No space left on device" in result.stderr
    assert "free some space" in result.stderr
    assert [path.name for path in (place.run / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (place.run / "adapter").exists()
    assert json.loads((place.run / "run.json").read_text())["status"] == "failed"
    monkeypatch.setattr(files, "_settle", settle)
    resumed = wegeft("train", place.recipe, "--resume", "auto", "--json")
    assert resumed.exit_code == EXIT_DONE
    assert "resuming from step 1" in resumed.stderr


class FullDiskPath(type(Path())):
    """A path whose new files take nothing, as on a full disk."""

    def open(self, mode: str = "r", **options: Any) -> Any:
        file = super().open(mode, **options)
        if mode == "x":
            file.close()
            return Path("/dev/full").open("w", **options)
        return file


@pytest.mark.parametrize("command", ["merge", "eval", "recipes"])
def test_a_full_disk_leaves_nothing_half_written(
    refuse, wegeft, place_with_run, data_dir, monkeypatch: pytest.MonkeyPatch, command
):
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if command == "recipes":
        monkeypatch.setattr("wegeft_cli.recipe.catalog.Path", FullDiskPath)
        words = ["copy", "quickstart"]
    else:
        monkeypatch.setattr(os, "fsync", fail)
        words = [] if command == "merge" else ["--task", "boolq", "--data-dir", data_dir]
        words = [*words, "--output", "new" if command == "merge" else "new.json"]
        words += ["--limit", "1", "--max-new-tokens", "2"] if command == "eval" else []
    if command != "eval":
        told = refuse(command, *words, code=EXIT_FAILED)
    else:  # the answers so far are kept, for the same command to go on with; no result is
        before = place_with_run.read_files()
        result = wegeft(command, *words)
        assert result.exit_code == EXIT_FAILED
        told, after = result.stderr, place_with_run.read_files()
        assert {name: after[name] for name in before} == before
        assert {name.split("/")[0] for name in after.keys() - before} == {"new-samples.partial"}
    assert "No space left on device" in told


def test_a_disk_too_small_is_found_before_the_merge(
    refuse, place_with_run, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(place_with_run.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "are free" in refuse("merge", code=EXIT_FAILED)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everywhere")
@pytest.mark.parametrize("name", ["tiny.yaml", "tiny.jsonl"])
def test_unreadable_files(wegeft, place, name):
    (place.path / name).chmod(0)
    result = wegeft("train", place.recipe)
    (place.path / name).chmod(0o644)
    assert result.exit_code == EXIT_USER
    assert name in result.stderr
    assert "Permission denied" in result.stderr


def test_copying_a_recipe_replaces_nothing(wegeft, refuse, place):
    assert "is not overwritten" in refuse("recipes", "copy", "quickstart", place.recipe)
    assert "tiny.jsonl/x" in refuse("recipes", "copy", "quickstart", "tiny.jsonl/x")
    assert "did you mean" in refuse("recipes", "copy", "quikstart")
    assert "did you mean" in refuse("recipes", "show", "quikstart")
    assert wegeft("recipes", "copy", "quickstart", "new/").exit_code == EXIT_DONE
    assert (place.path / "new/quickstart.yaml").is_file()


def test_resume_without_a_value_means_auto(wegeft, place):
    assert wegeft("train", place.recipe, "train.max_steps=1", "--json").exit_code == EXIT_DONE
    longer = ["train.max_steps=1", "output_dir=" + str(place.run)]
    for words in (["--resume"], ["--resume", *longer], ["--resume", "--dry-run"]):
        done = wegeft("train", place.recipe, *longer, *words)
        assert done.exit_code == EXIT_DONE, done.stderr
        assert "ready" in done.stdout or "is finished already" in done.stderr


def test_a_panic_of_the_tokenizers_package_is_one_message(capsys):
    expression = Regex("(x+x+)+y")
    normalizer = normalizers.Replace(expression, "")

    @guard
    def command():
        normalizer.normalize_str(40 * "x")

    with pytest.raises(typer.Exit) as caught:
        command()
    assert caught.value.exit_code == 2
    assert "the tokenizer failed: Onig" in capsys.readouterr().err
