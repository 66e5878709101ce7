"""Streams and exit codes: results on standard output, all else on standard error."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wegeft_cli.cli import console
from wegeft_cli.cli.tables import show_table
from wegeft_cli.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, UserError

HAS_FULL_DEVICE = Path("/dev/full").exists()
WAIT_SECONDS = 60
"""So long until a process must show a sign of life on a busy machine."""

SIGNAL_GAP_SECONDS = 0.05
"""Signals sent closer to each other than the process wakes up reach it as one."""

# What recipes.md promises of each object.
NAMES = {
    "train": {
        "run_dir",
        "adapter_dir",
        "status",
        "num_steps",
        "final_loss",
        "trainable_parameters",
    },
    "plan": {"trainable_parameters", "base_parameters", "groups", "num_steps", "memory_gib"},
    "preview": {"rows", "num_rows", "num_label_tokens", "histogram", "waste", "template_hash"},
    "eval": {"results", "samples_path"},
    "merge": {"output_dir", "num_tensors", "num_folded", "seconds", "peak_memory_gib"},
    "validate": {"valid", "recipe"},
}
RESULT_NAMES = {"task", "protocol", "score", "num_correct", "n", "n_invalid"}


def read_object(text: str) -> dict:
    """Read the one JSON object that the text must be, on one line."""
    assert text.count("\n") == 1
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


def test_train_prints_one_object(wegeft, place):
    result = wegeft("train", place.recipe, "train.max_steps=2", "--json")
    assert result.exit_code == EXIT_DONE
    value = read_object(result.stdout)
    assert NAMES["train"] <= set(value)
    assert (value["status"], value["num_steps"]) == ("finished", 2)
    assert Path(value["adapter_dir"]) == place.run / "adapter"
    assert all(word in result.stderr for word in ["10 rows", "training 2/2", "loss", "tokens/s"])


def test_a_dry_run_prints_one_object_and_writes_nothing(wegeft, place):
    before = place.read_files()
    value = read_object(wegeft("train", place.recipe, "--dry-run", "--json").stdout)
    assert NAMES["train"] <= set(value)
    assert value["status"] == "checked"
    assert place.read_files() == before


@pytest.mark.parametrize("command", ["plan", "preview", "validate"])
def test_looking_at_a_recipe_prints_one_object(wegeft, place, command):
    value = read_object(wegeft(command, place.recipe, "--json").stdout)
    assert NAMES[command] <= set(value)
    if command == "plan":
        assert sum(value["groups"].values()) == value["trainable_parameters"]
        assert sum(v for k, v in value["memory_gib"].items() if k != "total") == pytest.approx(
            value["memory_gib"]["total"]
        )


def test_merge_prints_one_object(wegeft, place_with_run):
    result = wegeft("merge", "--json")
    value = read_object(result.stdout)
    assert NAMES["merge"] <= set(value)
    assert Path(value["output_dir"], "model.safetensors").is_file()
    assert "merging" in result.stderr


def test_eval_prints_one_object_and_writes_it_on_request(wegeft, place_with_run, data_dir):
    words = ["--task", "boolq", "--data-dir", data_dir, "--max-new-tokens", "3", "--compare-base"]
    result = wegeft("eval", *words, "--json", "--output", "scores.json")
    assert result.exit_code == EXIT_DONE
    value = read_object(result.stdout)
    assert NAMES["eval"] <= set(value)
    for row in value["results"] + value["base_results"]:
        assert set(row) >= RESULT_NAMES
        assert row["score"] == row["num_correct"] / row["n"]
    assert json.loads(Path("scores.json").read_text()) == value
    assert Path(value["samples_path"]).is_file()
    assert "base: boolq" in result.stderr
    again = wegeft("eval", *words, "--json", "--output", "scores.json")
    assert again.exit_code == EXIT_DONE


def test_given_samples_print_one_object(wegeft, place, data_dir):
    lines = [json.dumps({"index": n, "output": "the correct answer is true"}) for n in range(6)]
    Path("given.jsonl").write_text("\n".join(lines))
    words = ["--task", "boolq", "--data-dir", data_dir, "--samples", "given.jsonl", "--json"]
    value = read_object(wegeft("eval", *words).stdout)
    assert (value["results"][0]["num_correct"], value["results"][0]["n"]) == (3, 6)


def test_listings_print_one_object(wegeft):
    assert read_object(wegeft("recipes", "list", "--json").stdout)["recipes"]
    listed = read_object(wegeft("eval", "--list", "--json").stdout)
    assert set(listed) == {"tasks", "groups", "protocols"}


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_fit_the_terminal(wegeft, place, data_dir, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    console.get_console.cache_clear()  # it read the width when it was made
    lines = [json.dumps({"index": n, "output": "the correct answer is true"}) for n in range(6)]
    Path("given.jsonl").write_text("\n".join(lines))
    words = ["--task", "boolq", "--data-dir", data_dir, "--samples", "given.jsonl"]
    done = wegeft("eval", *words)
    console.get_console.cache_clear()
    assert done.exit_code == EXIT_DONE
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert all(part in done.stdout for part in ["boolq", "3 / 6", "50.0%"])
    assert "…" not in done.stdout


def test_paths_are_shown_as_they_are(wegeft, place):
    odd = place.path / "a:smile:b [bold]c.yaml"
    odd.write_bytes(place.recipe.read_bytes())
    assert str(odd) in wegeft("validate", odd).stdout
    odd.write_text("sede: 1")
    assert f"{odd}:1:1: sede" in wegeft("validate", odd).stderr


def test_only_the_first_process_prints(run_wegeft, place):
    for words in (["validate", place.recipe], ["validate", place.recipe, "--json"]):
        done = run_wegeft(*words, env={"RANK": "1"})
        assert (done.returncode, done.stdout, done.stderr) == (EXIT_DONE, "", "")
    done = run_wegeft("validate", "missing.yaml", env={"RANK": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_USER, "", "")
    assert run_wegeft("validate", place.recipe, env={"RANK": "0"}).stdout


def test_the_import_of_torch_is_announced_before_it(run_wegeft, place):
    """A log or a terminal is not silent for the seconds that the import takes."""
    stub = place.path / "stub"
    stub.mkdir()
    (stub / "torch.py").write_text("raise SystemExit('torch is imported')")
    path = os.pathsep.join([str(stub), os.environ.get("PYTHONPATH", "")])
    for command in (["train", place.recipe, "--dry-run"], ["plan", place.recipe]):
        done = run_wegeft(*command, env={"PYTHONPATH": path}, fresh=True)
        assert done.stderr.splitlines() == [f"{command[0]}: loading PyTorch", "torch is imported"]
        done = run_wegeft(*command, env={"PYTHONPATH": path, "RANK": "1"}, fresh=True)
        assert done.stderr.splitlines() == ["torch is imported"]
    for command in ("train", "plan", "preview"):
        done = run_wegeft(command, "missing.yaml", env={"PYTHONPATH": path}, fresh=True)
        assert done.returncode == EXIT_USER, done.stderr
        assert "loading PyTorch" not in done.stderr  # the fault is reported before the import


def test_debugging_shows_the_traceback(run_wegeft, place):
    plain = run_wegeft("validate", "missing.yaml")
    assert plain.returncode == EXIT_USER
    assert "Traceback" not in plain.stderr
    traced = run_wegeft("validate", "missing.yaml", env={"WEGEFT_DEBUG": "1"})
    assert traced.returncode == EXIT_FAILED
    assert "Traceback" in traced.stderr
    assert "UserError" in traced.stderr


@pytest.mark.parametrize("words", [["recipes", "list"], ["recipes", "list", "--json"]])
def test_a_reader_that_goes_away_is_no_fault(start_wegeft, words):
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start_wegeft(*words, stdout=write_end, fresh=True)
    os.close(write_end)
    _, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, stderr) == (EXIT_DONE, "")


@pytest.mark.skipif(not HAS_FULL_DEVICE, reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["recipes", "list"], ["recipes", "list", "--json"]])
def test_a_full_disk_under_the_output_is_told(start_wegeft, words):
    with Path("/dev/full").open("w") as full:
        process = start_wegeft(*words, stdout=full.fileno(), fresh=True)
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == EXIT_FAILED
    assert "No space left on device" in stderr
    assert "Traceback" not in stderr


@pytest.mark.skipif(not HAS_FULL_DEVICE, reason="this system has no /dev/full")
def test_a_full_disk_under_the_messages_ends_nothing(start_wegeft, place):
    with Path("/dev/full").open("w") as full:
        words = ["validate", place.recipe, "--json"]
        process = start_wegeft(*words, stderr=full.fileno(), fresh=True)
        stdout, _ = process.communicate(timeout=WAIT_SECONDS)
        failed = start_wegeft("validate", "missing.yaml", stderr=full.fileno(), fresh=True)
        failed.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == EXIT_DONE
    assert read_object(stdout)["valid"] is True
    assert failed.returncode == EXIT_USER


class _FailingStream(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def write(self, text: str) -> int:
        raise OSError(self._number, "cannot write")


def test_only_results_fail_with_a_full_disk():
    full, closed = _FailingStream(errno.ENOSPC), _FailingStream(errno.EIO)
    assert console.LastingStream(full, loses_output=True).write("step 1") == len("step 1")
    assert console.LastingStream(closed, loses_output=False).write("result") == len("result")
    with pytest.raises(OSError, match="cannot write"):
        console.LastingStream(full, loses_output=False).write("result")


@pytest.mark.parametrize("print_text", [console.note, console.warn])
def test_a_text_cannot_control_the_terminal(capsys, monkeypatch, print_text):
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_text("model \x1b]0;owned\x07 \x9b2J \x1b[31mred")
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert "\u241b]0;owned" in printed
    assert "\u241b[31mred" in printed
    assert "\x1b]0" not in printed
    assert "\x1b[31mred" not in printed
    assert "\x07" not in printed
    assert "\x9b" not in printed


def test_a_table_and_an_error_cannot_control_the_terminal(capsys):
    show_table({"task \x1b[2J": ["a\x1b[2Jb"]})
    console.print_fault(UserError("no \x1b[2J", file="a\x1b[2J.yaml", hint="try \x1b[2J"))
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert captured.out.count("\u241b[2J") == 2
    assert captured.err.count("\u241b[2J") == 3


def test_no_color_is_heeded(run_wegeft):
    done = run_wegeft("recipes", "list", env={"NO_COLOR": "1", "FORCE_COLOR": "1"})
    assert "\x1b[3" not in done.stdout


def wait_for(process: subprocess.Popen[str], sign: Path) -> None:
    """Wait until a file holds something."""
    end = time.monotonic() + WAIT_SECONDS
    while not (sign.exists() and sign.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_figures_that_json_has_no_word_for_are_null(capsys):
    console.print_json({"loss": float("nan"), "rows": [float("-inf"), {"std": float("inf")}, 1.5]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [None, {"std": None}, 1.5]}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_asked_to_stop_saves_and_says_how_to_go_on(start_wegeft, run_wegeft, place, number):
    process = start_wegeft("train", place.recipe, "train.max_steps=100000", "--json")
    wait_for(process, place.run / "metrics.jsonl")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == EXIT_INTERRUPTED
    value = read_object(stdout)
    assert value["status"] == "interrupted"
    assert "stopping" in stderr
    assert "Traceback" not in stderr
    step = value["num_steps"]
    assert (place.run / "checkpoints" / f"step-{step:08d}").is_dir()
    assert json.loads((place.run / "run.json").read_text())["status"] == "interrupted"
    more = [f"train.max_steps={step + 1}", "--resume", "auto", "--json"]
    done = run_wegeft("train", place.recipe, *more)
    assert done.returncode == EXIT_DONE, done.stderr
    assert f"resuming from step {step}" in done.stderr
    assert read_object(done.stdout)["num_steps"] == step + 1


@pytest.mark.slow
def test_a_run_asked_twice_leaves_at_once(start_wegeft, place):
    process = start_wegeft("train", place.recipe, "train.max_steps=100000")
    wait_for(process, place.run / "metrics.jsonl")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(SIGNAL_GAP_SECONDS)
    stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == EXIT_INTERRUPTED
    assert "interrupted" in stdout + stderr
    assert "Traceback" not in stderr
    assert json.loads((place.run / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "eval"])
def test_ctrl_c_while_loading(start_wegeft, place, llama_dir, data_dir, command):
    # The pipe opens before torch is loaded, which takes seconds: the signal falls into those.
    words = {"plan": [place.recipe], "eval": [llama_dir, "--task", "boolq", "--data-dir", data_dir]}
    process = start_wegeft(command, *words[command], env={"PYTHONVERBOSE": "1"}, fresh=True)
    assert process.stderr is not None
    assert any("import 'torch'" in line or "/torch/" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == EXIT_INTERRUPTED
    assert stdout == ""
    assert "interrupted" in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_messages(start_wegeft, place):
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start_wegeft("train", place.recipe, "train.max_steps=2", "--json", stderr=write_end)
    os.close(write_end)
    stdout, _ = process.communicate(timeout=2 * WAIT_SECONDS)
    assert process.returncode == EXIT_DONE
    assert read_object(stdout)["status"] == "finished"


@pytest.mark.slow
def test_a_run_saves_when_its_terminal_is_closed(place):
    pid, terminal = pty.fork()
    if pid == 0:  # this process has the terminal as its controlling one
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        words = ["-m", "wegeft_cli", "train", str(place.recipe), "train.max_steps=100000"]
        os.execve(sys.executable, [sys.executable, *words], {**os.environ, "OMP_NUM_THREADS": "1"})
    metrics, end = place.run / "metrics.jsonl", time.monotonic() + WAIT_SECONDS
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < end
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    os.waitpid(pid, 0)
    record = json.loads((place.run / "run.json").read_text())
    assert (record["status"], record["error"]) == ("interrupted", None)
    assert (place.run / "checkpoints" / f"step-{record['num_steps']:08d}").is_dir()


@pytest.mark.slow
def test_nothing_else_reaches_the_real_standard_output(run_wegeft, place_with_run, data_dir):
    words = ["--task", "boolq", "--data-dir", data_dir, "--max-new-tokens", "2", "--json"]
    value = read_object(run_wegeft("eval", *words, fresh=True).stdout)
    assert value["results"][0]["n"] == 6
    words = ["output_dir=new", "train.max_steps=1", "--json"]
    new = run_wegeft("train", place_with_run.recipe, *words, fresh=True)
    assert read_object(new.stdout)["status"] == "finished"


def test_the_console_script_is_the_same_program(run_wegeft):
    script = Path(sys.executable).with_name("wegeft")
    if not script.exists():
        pytest.skip("the package is not installed as a program here")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == run_wegeft("--version", fresh=True).stdout


def test_the_names_of_rows_are_not_cut_for_the_sake_of_figures(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    figures = {f"figure {number:02d}": ["1.0"] for number in range(5)}
    show_table({"method": ["per_layer_twice"], **figures})
    assert "per_layer_twice" in capsys.readouterr().out
