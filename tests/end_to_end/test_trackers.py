"""Trackers get what metrics.jsonl gets, offline, and cost neither the run nor its output."""

import json
import math
import os
import sqlite3
import struct
import sys
from pathlib import Path

import preloaded
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.runs.callbacks import trackers as trackers_module
from wegeft_cli.runs.callbacks.trackers import Trackers
from wegeft_cli.runs.run import recipe_settings
from wegeft_cli.runs.train import train

TIMEOUT_SECONDS = 240
VALIDATED = {
    "data": {"validation_fraction": 0.2},
    "train": {"eval_steps": 2, "max_steps": 4},
    "eval": {"max_new_tokens": 3},
    "logging": {"sample_prompts": ["is 3 an even number?"], "run_name": "mine"},
}
FLOAT32 = 1e-6  # tensorboard keeps float32


def with_tracker(name, **train_section):
    return {
        **VALIDATED,
        "train": {**VALIDATED["train"], **train_section},
        "logging": {**VALIDATED["logging"], "report_to": name, "project": "trials"},
    }


@pytest.fixture
def launch(tmp_path):
    """A function that trains in a process of its own: trackers keep threads and patch streams."""

    def run(recipe, *arguments, **variables):
        done = preloaded.run(
            [sys.executable, "-m", "wegeft_cli", "train", str(recipe), "--json", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        # Whatever a tracker prints, standard output holds the one JSON object.
        return json.loads(done.stdout), done.stderr

    return run


def read_lines(run_dir):
    return [json.loads(x) for x in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def read_events(run_dir):
    events = EventAccumulator(str(Path(run_dir) / "logs"), size_guidance={"tensors": 0})
    events.Reload()
    return events


def read_scalars(run_dir, name):
    return [(event.step, event.value) for event in read_events(run_dir).Scalars(name)]


def test_tensorboard_holds_the_figures(write_recipe, read_run):
    result = train(write_recipe(**with_tracker("tensorboard")))
    lines = read_lines(result.run_dir)
    for name in ("loss", "learning_rate", "grad_norm", "eval_loss"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        found = read_scalars(result.run_dir, name)
        assert [step for step, _ in found] == [step for step, _ in expected]
        for (_, one), (_, two) in zip(found, expected, strict=True):
            assert one == pytest.approx(two, rel=FLOAT32)
    texts = read_events(result.run_dir).Tags()["tensors"]
    assert sorted(texts) == ["recipe/text_summary", "samples/text_summary"]
    assert read_run(result.run_dir)["trackers"] == {"tensorboard": "logs"}


def test_a_resumed_run_goes_on_in_the_same_events(write_recipe, stop_after):
    recipe = write_recipe(**with_tracker("tensorboard", save_steps=2))
    run_dir = train(recipe, should_stop=stop_after(3)).run_dir
    (run_dir / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    train(recipe, resume="auto")
    assert [step for step, _ in read_scalars(run_dir, "loss")] == [1, 2, 3, 4]


def test_no_tracker_is_the_default(write_recipe, read_run):
    run_dir = train(write_recipe()).run_dir
    assert read_run(run_dir)["trackers"] == {}
    assert not (run_dir / "logs").exists()


@pytest.mark.slow
def test_wandb_offline(write_recipe, launch, stop_after):
    recipe = write_recipe(**with_tracker(["wandb", "tensorboard"]))
    told, _ = launch(recipe, WANDB_MODE="offline")
    run_dir = Path(told["run_dir"])
    run_id = json.loads((run_dir / "run.json").read_text())["trackers"]["wandb"]
    (file,) = run_dir.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    history, config = read_wandb(file)
    lines = read_lines(run_dir)
    for name in ("loss", "learning_rate", "eval_loss"):
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert {row["_step"]: row[name] for row in history if name in row} == expected
    assert config["train.learning_rate"] == 0.01
    assert any("samples" in key for row in history for key in row)
    # Going on to more steps takes up the same run.
    (run_dir / "adapter").rename(run_dir / "earlier")
    launch(recipe, "train.max_steps=6", "--resume", "auto", WANDB_MODE="offline")
    assert json.loads((run_dir / "run.json").read_text())["trackers"]["wandb"] == run_id
    assert len(list(run_dir.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))) == 2


def read_wandb(file):
    """The rows of an offline run's history, and its config."""
    from wandb.proto import wandb_internal_pb2

    history, config = [], {}
    for data in read_log(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("history"):
            history.append(
                {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return history, config


def read_log(content):
    """Records of LevelDB's log format: blocks of 32 KiB, pieces of (crc, length, type, data).

    The file's header of seven bytes takes the first bytes of the first block.
    """
    whole, position = b"", 0
    while position + 7 <= len(content):
        left = 32768 - (position + 7) % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


@pytest.mark.slow
@pytest.mark.parametrize("is_named", [False, True])
def test_mlflow_in_a_local_store(write_recipe, launch, tmp_path, monkeypatch, is_named):
    """In the run's own folder as it comes, elsewhere where the user says so."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    recipe = write_recipe(**with_tracker("mlflow"))
    store = tmp_path / "elsewhere" if is_named else recipe.parent / "runs" / "tiny" / "mlruns"
    variables = {"MLFLOW_TRACKING_URI": store.as_uri()} if is_named else {}
    told, stderr = launch(recipe, **variables)
    assert "the tracker" not in stderr
    run_dir = Path(told["run_dir"])
    assert (run_dir / "mlruns").exists() is not is_named
    run_id = json.loads((run_dir / "run.json").read_text())["trackers"]["mlflow"]
    (folder,) = store.glob(f"*/{run_id}")
    for name in ("loss", "learning_rate", "eval_loss"):
        rows = [row.split() for row in (folder / "metrics" / name).read_text().splitlines()]
        expected = [(line["step"], line[name]) for line in read_lines(run_dir) if name in line]
        assert [(int(step), float(value)) for _, value, step in rows] == expected
    assert (folder / "params" / "train.learning_rate").read_text() == "0.01"
    assert list((folder / "artifacts" / "samples").iterdir())
    assert "status: 3" in (folder / "meta.yaml").read_text()  # mlflow's FINISHED
    (run_dir / "adapter").rename(run_dir / "earlier")
    launch(recipe, "train.max_steps=6", "--resume", "auto", **variables)
    assert len(list(store.glob(f"*/{run_id}"))) == len(list(store.glob("*/*/metrics"))) == 1
    assert (folder / "metrics" / "loss").read_text().count("\n") == 6


@pytest.mark.slow
def test_trackio_in_a_local_folder(write_recipe, launch, tmp_path):
    variables = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    recipe = write_recipe(**with_tracker("trackio"))
    told, _ = launch(recipe, **variables)
    run_dir = Path(told["run_dir"])
    launch_again = (recipe, "train.max_steps=6", "--resume", "auto")
    (run_dir / "adapter").rename(run_dir / "earlier")
    launch(*launch_again, **variables)
    database = tmp_path / "trackio" / "trials.db"
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    connection.close()
    assert {name for name, _, _ in rows} == {"mine"}
    losses = {step: json.loads(x)["loss"] for _, step, x in rows if "loss" in json.loads(x)}
    assert losses == {x["step"]: x["loss"] for x in read_lines(run_dir) if "loss" in x}
    assert any("eval_loss" in json.loads(metrics) for _, _, metrics in rows)
    assert any("samples" in json.loads(metrics) for _, _, metrics in rows)


@pytest.mark.slow
def test_a_server_that_is_not_there_costs_one_warning(write_recipe, launch):
    recipe = write_recipe(**with_tracker("mlflow"))
    told, stderr = launch(
        recipe, MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"
    )
    assert told["status"] == "finished"
    assert stderr.count("the tracker mlflow failed") == 1
    assert len(read_lines(told["run_dir"])) > 4


def test_a_disk_that_fails_under_a_tracker_costs_one_warning(write_recipe, listener):
    """The tracker's folder cannot be made: a file stands there."""
    recipe = write_recipe(**with_tracker("tensorboard"))
    run_dir = recipe.parent / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "logs").write_text("")
    result = train(recipe, reporter=listener)
    assert result.status == "finished"
    assert sum("the tracker tensorboard failed" in text for text in listener.warnings) == 1


def test_a_fault_of_the_run_itself_is_told_to_the_tracker(write_recipe, monkeypatch):
    closed = []
    monkeypatch.setattr(Trackers, "finish", lambda self: closed.append(self.status))
    with pytest.raises(UserError):
        train(write_recipe("failed"), ["model.dtype=float16", "model.attn_implementation=none"])
    train(write_recipe("done"))
    assert closed == ["failed", "finished"]


@pytest.mark.parametrize(
    ("value", "hint"),
    [("wandbb", "wandb"), ("[tensorboard, mlfow]", "mlflow"), ("[none, wandb]", None), ("3", None)],
)
def test_unknown_names_are_refused_with_the_nearest(write_recipe, value, hint):
    with pytest.raises(UserError) as caught:
        load_recipe(write_recipe(), [f"logging.report_to={value}"])
    assert caught.value.key == "logging.report_to"
    if hint is not None:
        assert f"`{hint}`" in caught.value.hint


def test_a_tracker_that_is_not_installed_is_told_before_the_run(
    write_recipe, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("wegeft_cli.planning.run_setup.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed") as caught:
        train(write_recipe(logging={"report_to": "wandb"}))
    assert caught.value.key == "logging.report_to"
    assert caught.value.hint == "pip install 'wegeft-cli[wandb]'"
    assert not (tmp_path / "runs").exists()


def test_secrets_do_not_leave_the_machine(write_recipe, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("SOME_TOKEN", "tiny")  # too short to be told from a word
    path = write_recipe()
    recipe = load_recipe(
        path,
        [
            "model.revision=x-hf_abcdefgh-y",
            "data.train[0].path=https://user:word@host/file.jsonl",
            "logging.project=tiny",
        ],
    ).recipe
    sent = recipe_settings(recipe)
    assert sent["model.revision"] == "x-***-y"
    assert sent["data.train[0].path"] == "https://***@host/file.jsonl"
    assert sent["logging.project"] == "tiny"
    assert sent["train.learning_rate"] == 0.01
    assert not any("hf_abc" in str(value) for value in sent.values())


@pytest.mark.slow
def test_no_byte_of_wandb_holds_a_secret(write_recipe, launch):
    secret = "hf_abcdefgh"
    recipe = write_recipe(**with_tracker("wandb", eval_steps=0))
    overrides = [f"logging.project=x-{secret}", f"logging.run_name={secret}-y"]
    overrides.append("logging.sample_prompts=[]")
    told, _ = launch(recipe, *overrides, WANDB_MODE="offline", HF_TOKEN=secret)
    files = [path for path in Path(told["run_dir"]).glob("wandb/**/*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_names_are_masked_for_every_tracker(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "0123456789")
    given = []
    monkeypatch.setitem(trackers_module._TRACKERS, "wandb", lambda *names: given.append(names[:2]))
    Trackers(
        ["wandb"], project="p-0123456789", run_name="0123456789-r", run_dir=tmp_path, earlier={},
        step=0, warn=lambda text: None,
    )  # fmt: skip
    assert given == [("p-***", "***-r")]


@pytest.mark.slow
def test_only_the_first_of_two_processes_tracks(write_recipe, tmp_path):
    recipe = write_recipe(**with_tracker("tensorboard", per_device_train_batch_size=2))
    done = preloaded.run_group(2, "-m", "wegeft_cli", "train", recipe, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    run_dir = recipe.parent / "runs" / "tiny"
    assert len(list((run_dir / "logs").iterdir())) == 1
    assert [step for step, _ in read_scalars(run_dir, "loss")] == [1, 2, 3, 4]


def test_figures_that_are_not_finite_do_not_upset_a_tracker(tmp_path):
    told = []
    trackers = Trackers(
        ["tensorboard"], project="p", run_name="r", run_dir=tmp_path, earlier={}, step=0,
        warn=told.append,
    )  # fmt: skip
    trackers.log({"loss": math.nan}, 1)
    trackers.log({"loss": 1.0}, 2)
    trackers.finish()
    assert told == []
    assert [step for step, _ in read_scalars(tmp_path, "loss")] == [1, 2]
