"""Every file that is read, damaged: a `UserError` or no harm, no pickle, nothing read elsewhere.

Each kind of file has a reader here, which does what a command does with it. The damages come from
one seed per kind, so that a failure repeats: `WEGEFT_FUZZ_DAMAGES` says how many there are (the
fast tests do a few of each, `make fuzz` thousands), and the message names seed and number.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.fuzz.damage import (
    Damage,
    damage_bytes,
    damage_csv,
    damage_gzip,
    damage_lines,
    damage_safetensors,
    damage_yaml,
    json_damage,
)
from wegeft_cli.artifacts.adapter import Adapter, base_record_to_json, resolve_adapter_dir
from wegeft_cli.artifacts.adapter_files import BASE_NAME, load_adapter_files
from wegeft_cli.artifacts.checkpoint import find_newest_checkpoint, load_checkpoint
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.artifacts.run_directory import RunDirectory, find_newest_run, find_recipe_of
from wegeft_cli.data.sources.formats import FORMATS, find_format, read_row
from wegeft_cli.data.sources.loading import load_rows
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text.loading import find_test_set, load_questions
from wegeft_cli.evaluation.text.scoring import read_samples
from wegeft_cli.inference.form_choice import choose_form
from wegeft_cli.inference.loaded_model import LoadedModel
from wegeft_cli.inference.prompt_files import read_questions
from wegeft_cli.merging.merge import merge
from wegeft_cli.models.loading import build_meta_model, load_config, load_model, load_tokenizer
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import DataSource
from wegeft_cli.runs.train import train

NUM_DAMAGES = int(os.environ.get("WEGEFT_FUZZ_DAMAGES", "16"))
SEED = 0
ROWS = [{"prompt": f"Q{n}", "completion": f"A{n}"} for n in range(4)]
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it lies, how it is damaged, and what reads it.

    Args:
        name: For the test's name.
        place: The part of the world that is copied and damaged.
        pattern: The file in it.
        damage: What is done to its bytes.
        read: Reads the folder, as a command does.
        share: Of the damages, for readers that take long.
        always_told: Whether most damages are faults; else it is as good to read past them.
    """

    name: str
    place: str
    pattern: str
    damage: Damage
    read: Callable[[Path], Any]
    share: float = 1.0
    always_told: bool = True


def read_data(folder: Path, name: str) -> None:
    rows = load_rows(DataSource(path=str(folder / name)), recipe_dir=None)
    form = FORMATS[find_format("auto", list(rows.rows[0]), {})]
    for row in rows.rows:
        read_row(row, form, {})


def read_run(folder: Path) -> None:
    find_newest_run(folder.parent)
    run = RunDirectory(folder)
    run.status()
    run.load_record()
    find_recipe_of(folder)
    choose_form(None, folder, load_recipe(SOUND["recipe"], need_data=False).recipe, SOUND["tok"])
    resolve_adapter_dir(folder)


def read_metrics(folder: Path) -> None:
    RunDirectory(folder).last_metrics()
    RunDirectory(folder).validation()
    RunDirectory(folder).truncate_lines(1, redo_validation=False)


def read_test_set(folder: Path) -> None:
    load_questions(find_test_set("boolq"), data_dir=folder, limit=None)


def read_outputs(folder: Path) -> None:
    data = load_questions(find_test_set("boolq"), data_dir=SOUND["world"] / "sets", limit=None)
    read_samples(folder / "outputs.jsonl", data)


def read_template(folder: Path) -> None:
    form = choose_form(str(folder / "mine.jinja"), folder, None, SOUND["tok"])
    form.write({"instruction": "x"}, "system")
    form.write(TALK)


def read_merge(folder: Path) -> None:
    out = folder.parent / "merged"
    try:
        merge(SOUND["world"] / "run", base=str(folder), output=out)
    finally:
        left = sorted(path.name for path in folder.parent.iterdir())
        if out.exists():
            assert (out / "model.safetensors").is_file() or (out / INDEX).is_file()
        shutil.rmtree(out, ignore_errors=True)
        assert not [name for name in left if name.startswith((".tmp", ".trash"))]


def read_peft(folder: Path) -> None:
    LoadedModel.open(folder, None, base=str(SOUND["world"] / "base"))


INDEX = "model.safetensors.index.json"
SOUND: dict[str, Any] = {}
small_json, any_json = json_damage(huge=False), json_damage()
KINDS = [
    Kind("adapter config", "run/adapter", "adapter_config.json", any_json, load_adapter_files),
    Kind("adapter weights", "run/adapter", "*.safetensors", damage_safetensors, load_adapter_files),
    Kind("adapter type", "run/adapter", "adapter_config.json", any_json, Adapter.open,
         always_told=False),
    Kind("base header", "base", "*.safetensors", damage_safetensors, fingerprint_base),
    Kind("base index", "sharded", "*.index.json", any_json, fingerprint_base),
    Kind("merge header", "base", "*.safetensors", damage_safetensors, read_merge, 0.3),
    Kind("merge index", "sharded", "*.index.json", any_json, read_merge, 0.3),
    Kind("merge config", "base", "config.json", any_json, read_merge, 0.1, False),
    Kind("checkpoint manifest", "checkpoint", "manifest.json", any_json, load_checkpoint),
    Kind("checkpoint state", "checkpoint", "state.json", any_json, load_checkpoint),
    Kind("checkpoint tensors", "checkpoint", "parameters.safetensors", damage_safetensors,
         load_checkpoint),
    Kind("newest checkpoint", "run", "checkpoints/*2/manifest.json", any_json,
         lambda folder: find_newest_checkpoint(folder / "checkpoints"), always_told=False),
    Kind("run.json", "run", "run.json", any_json, read_run, always_told=False),
    Kind("run recipe", "run", "recipe.yaml", damage_yaml, find_recipe_of, 0.3, False),
    Kind("recipe", "recipe", "*.yaml", damage_yaml,
         lambda folder: load_recipe(folder / "tiny.yaml"), 0.3, False),
    Kind("metrics", "run", "metrics.jsonl", damage_lines, read_metrics, always_told=False),
    Kind("sample answers", "run", "samples.jsonl", damage_lines, read_metrics, always_told=False),
    Kind("test set", "sets", "boolq/test.json", any_json, read_test_set),
    Kind("given outputs", "outputs", "outputs.jsonl", damage_lines, read_outputs),
    Kind("data json", "data", "rows.json", any_json, lambda f: read_data(f, "rows.json")),
    Kind("data jsonl", "data", "rows.jsonl", damage_lines, lambda f: read_data(f, "rows.jsonl")),
    Kind("data talks", "data", "talks.jsonl", damage_lines, lambda f: read_data(f, "talks.jsonl")),
    Kind("data gzip", "data", "rows.jsonl.gz", damage_gzip,
         lambda f: read_data(f, "rows.jsonl.gz")),
    Kind("data csv", "data", "rows.csv", damage_csv, lambda f: read_data(f, "rows.csv"),
         always_told=False),
    Kind("data parquet", "data", "rows.parquet", damage_bytes,
         lambda f: read_data(f, "rows.parquet"), always_told=False),
    Kind("prompts", "data", "talks.jsonl", damage_lines,
         lambda f: read_questions((), f / "talks.jsonl", None), always_told=False),
    Kind("prompt text", "data", "prompt.txt", damage_bytes,
         lambda f: read_questions((), f / "prompt.txt", None), always_told=False),
    Kind("chat template", "template", "mine.jinja", damage_bytes, read_template,
         always_told=False),
    Kind("model config", "base", "config.json", small_json, lambda f: load_config(str(f)),
         always_told=False),
    Kind("planned model", "base", "config.json", small_json,
         lambda f: build_meta_model(load_config(str(f))), 0.5, False),
    Kind("model by config", "base", "config.json", small_json, lambda f: load_model(str(f)), 0.2,
         False),
    Kind("model weights", "base", "*.safetensors", damage_safetensors,
         lambda f: load_model(str(f)), 0.3),
    Kind("model index", "sharded", "*.index.json", any_json, lambda f: load_model(str(f)), 0.3),
    Kind("generation config", "base", "generation_config.json", small_json,
         lambda f: load_model(str(f)), 0.2, False),
    Kind("tokenizer", "base", "tokenizer.json", small_json, lambda f: load_tokenizer(str(f)), 0.3,
         False),
    Kind("tokenizer config", "base", "tokenizer_config.json", small_json,
         lambda f: load_tokenizer(str(f)), 0.3, False),
    Kind("LoRA config", "lora", "adapter_config.json", small_json, read_peft, 0.2, False),
    Kind("LoRA base record", "quantised", BASE_NAME, any_json,
         lambda folder: Adapter.open(folder).quantization),
    Kind("LoRA weights", "lora", "*.safetensors", damage_safetensors, read_peft, 0.2, False),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_recipe_in, build_llama_dir, adapters_rows) -> Path:
    """One of each kind of file, sound, as the commands write them."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(build_llama_dir(), folder / "base")
    shutil.copytree(build_llama_dir(max_shard_size="30KB"), folder / "sharded")
    recipe = write_recipe_in(
        folder,
        model={"name_or_path": str(folder / "base")},
        data={"validation_fraction": 0.2},
        train={"max_steps": 2, "save_steps": 1, "eval_steps": 1},
        logging={"sample_prompts": ["who?"]},
    )
    train(recipe)
    shutil.copytree(folder / "runs" / "tiny", folder / "run")
    checkpoints = sorted((folder / "run" / "checkpoints").iterdir())
    shutil.copytree(checkpoints[-1], folder / "checkpoint")
    (folder / "recipe").mkdir()
    shutil.copy(recipe, folder / "recipe" / "tiny.yaml")
    lora = write_recipe_in(
        folder,
        "lora",
        model={"name_or_path": str(folder / "base")},
        adapter={"type": "lora"},
        train={"max_steps": 1},
    )
    shutil.copytree(Path(train(lora).adapter_dir), folder / "lora")
    shutil.copytree(folder / "lora", folder / "quantised")
    (folder / "quantised" / BASE_NAME).write_text(base_record_to_json("torchao_8bit", None))
    write_data(folder / "data")
    (folder / "sets" / "boolq").mkdir(parents=True)
    (folder / "sets" / "boolq" / "test.json").write_text(json.dumps(adapters_rows))
    (folder / "outputs").mkdir()
    lines = [json.dumps({"index": n, "output": "true"}) for n in range(len(adapters_rows))]
    (folder / "outputs" / "outputs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "template").mkdir()
    (folder / "template" / "mine.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    SOUND.update(world=folder, recipe=recipe, tok=AutoTokenizer.from_pretrained(folder / "base"))
    return folder


def write_data(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.jsonl").write_text(text)
    (folder / "talks.jsonl").write_text((json.dumps(TALK) + "\n") * 3)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    lines = ["prompt,completion", *(f"{row['prompt']},{row['completion']}" for row in ROWS)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    (folder / "prompt.txt").write_text("A question,\nin two lines?\n")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")


class Watch:
    """Sees what Python opens and unpickles while a reader runs."""

    def __init__(self) -> None:
        self.forbidden: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.forbidden is None:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.fsdecode(arguments[0])
            if "canary" in path or path.startswith(("/etc/passwd", str(self.forbidden))):
                self.seen.append(f"opened {path}")
        elif event in ("pickle.find_class", "os.system", "subprocess.Popen"):
            self.seen.append(f"{event} {arguments}")

    @contextmanager
    def guard(self, forbidden: Path) -> Iterator[None]:
        self.forbidden = forbidden
        try:
            yield
        finally:
            self.forbidden = None
        assert not self.seen, self.seen


WATCH = Watch()


@pytest.fixture
def no_pickle(monkeypatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)


def read_damaged(kind: Kind, folder: Path) -> bool:
    """Whether a reader told of a fault; anything but a `UserError` goes on."""
    told = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kind.read(folder)
        except* UserError as group:
            told = True
            for fault in group.exceptions:
                str(fault).encode("utf-8", "surrogateescape")
    return told


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name.replace(" ", "-") for kind in KINDS])
def test_damage_is_told_or_does_no_harm(kind, world, tmp_path, no_pickle, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    for source in sorted((world / "sharded").glob("*.safetensors"))[:1]:
        shutil.copy(source, outside / "canary.safetensors")
    (outside / "canary").write_text("secret")
    folder = tmp_path / "place" / "damaged"
    shutil.copytree(world / kind.place, folder)
    paths = sorted(folder.glob(kind.pattern))
    assert len(paths) == 1
    sound = paths[0].read_bytes()
    kind.read(folder)
    draw = random.Random(f"{SEED} {kind.name}")
    num_told, num_damages = 0, max(4, round(NUM_DAMAGES * kind.share))
    for number in range(num_damages):
        damaged = kind.damage(draw, sound)
        paths[0].write_bytes(damaged)
        others = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
        try:
            with WATCH.guard(outside):
                num_told += read_damaged(kind, folder)
        except BaseException as error:
            error.add_note(f"{kind.name}, seed {SEED}, damage {number}: {damaged[:400]!r}")
            raise
        assert (outside / "canary").read_text() == "secret"
        for path, data in others.items():
            path.write_bytes(data)  # what a reader rightly rewrites: lines of a later step
    if kind.always_told:
        assert num_told > num_damages / 6  # of a few damages, most may be harmless ones
    paths[0].write_bytes(sound)
    kind.read(folder)
    assert not list(tmp_path.glob("canary*"))
