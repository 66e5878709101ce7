"""`wegeft train --num-processes`: many processes started by the command itself, over gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pytest
import torch
from safetensors.torch import load_file

from wegeft_cli.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 240
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(*words, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "wegeft_cli", "train", *(str(word) for word in words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT, **env},
    )


def fork(*words, **env):
    """Start a process that has loaded torch, where the launcher is not what is tested."""
    return preloaded.Popen(
        [sys.executable, "-m", "wegeft_cli", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT, **env},
    )


def run_two(*words):
    """Run two processes without the launcher."""
    words = ("-m", "wegeft_cli", "train", *words)
    return preloaded.run_group(2, *words, timeout=TIMEOUT_SECONDS)


def finish(process):
    stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(*words, **env):
    return finish(start(*words, **env))


def read_run(recipe):
    return json.loads((recipe.parent / "runs" / recipe.stem / "run.json").read_text())


def load_factors(recipe):
    folder = recipe.parent / "runs" / recipe.stem / "adapter"
    return load_file(folder / "adapter_model.safetensors")


def are_equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def wait_for(condition, process):
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def workers_of(process):
    """Give the launched processes by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            lines = (folder / "environ").read_text().split("\0")
        except (OSError, ValueError, IndexError):
            continue
        values = dict(line.split("=", 1) for line in lines if "=" in line)
        if parent == process.pid and "RANK" in values:
            found[int(values["RANK"])] = int(folder.name)
    return found


# Long enough to be met in the middle.
LONG = {"per_device_train_batch_size": 2, "num_train_epochs": 200, "save_steps": 5}


def num_steps_of(recipe):
    path = recipe.parent / "runs" / recipe.stem / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def checkpoints_of(recipe):
    return list((recipe.parent / "runs" / recipe.stem / "checkpoints").glob("step-*"))


def test_the_command_starts_its_processes(write_recipe):
    """It replaces an earlier run, gives what torchrun gives, bit for bit, and says it once."""
    train = {"per_device_train_batch_size": 2}
    one, other = write_recipe("one", train=train), write_recipe("other", train=train)
    assert finish(fork(one)).returncode == EXIT_DONE
    assert read_run(one)["num_processes"] == 1
    done = run(one, "--overwrite", "--num-processes", "2", "--json")
    assert done.returncode == EXIT_DONE, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    assert read_run(one)["num_processes"] == 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*torchrun, "-m", "wegeft_cli", "train", str(other)],
        env={**os.environ, **ENVIRONMENT},
        check=True,
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert are_equal(load_factors(one), load_factors(other))


def test_two_agents_meet(write_recipe):
    """Two machines, here two launchers, with one rendezvous."""
    train = {"per_device_train_batch_size": 2}
    one, other = write_recipe("one", train=train), write_recipe("other", train=train)
    assert run_two(one).returncode == EXIT_DONE
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    words = ["--num-processes", "2", "--num-machines", "2", "--rdzv-endpoint", endpoint]
    agents = [start(other, *words) for _ in range(2)]
    ended = [finish(agent) for agent in agents]
    assert [agent.returncode for agent in ended] == [EXIT_DONE] * 2, [a.stderr for a in ended]
    # Only the process of rank 0 speaks, whichever machine it is on.
    assert sum("finished" in agent.stdout for agent in ended) == 1
    assert are_equal(load_factors(one), load_factors(other))


def test_a_fault_is_told_once(write_recipe):
    recipe = write_recipe(adapter={"target_modules": ["q_prj"]})
    done = run(recipe, "--num-processes", "2")
    assert done.returncode == EXIT_USER
    assert done.stderr.count("matches no linear layer") == 1
    assert "Traceback" not in done.stderr


def test_a_killed_process_ends_the_run(write_recipe):
    recipe = write_recipe(train=LONG)
    process = start(recipe, "--num-processes", "2")
    wait_for(lambda: checkpoints_of(recipe), process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    done = finish(process)
    assert time.monotonic() - killed < 60
    assert done.returncode == EXIT_FAILED
    assert "process 1 of the run was killed by SIGKILL" in done.stderr
    assert read_run(recipe)["status"] == "failed"
    resumed = run_two(recipe, "--resume", "auto", "train.num_train_epochs=10")
    assert resumed.returncode == EXIT_DONE, resumed.stderr
    assert "resuming from step" in resumed.stderr or num_steps_of(recipe)


def test_a_restart_goes_on_to_the_same_bits(write_recipe):
    train = {**LONG, "num_train_epochs": 40}
    adapter = {"dropout": 0.2}
    whole = write_recipe("whole", train=train, adapter=adapter)
    broken = write_recipe("broken", train=train, adapter=adapter)
    assert run_two(whole).returncode == EXIT_DONE
    process = start(broken, "--num-processes", "2", "--max-restarts", "1")
    wait_for(lambda: checkpoints_of(broken), process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    done = finish(process)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "resuming from step" in done.stderr
    assert are_equal(load_factors(whole), load_factors(broken))


@pytest.mark.parametrize(
    ("number", "max_restarts"), [(signal.SIGINT, 0), (signal.SIGTERM, 2), (signal.SIGUSR1, 0)]
)
def test_a_signal_saves_and_leaves(write_recipe, number, max_restarts):
    recipe = write_recipe(train={**LONG, "save_steps": 0})
    process = start(recipe, "--num-processes", "2", "--max-restarts", max_restarts)
    wait_for(lambda: num_steps_of(recipe) > 3, process)
    process.send_signal(number)
    done = finish(process)
    assert done.returncode == EXIT_INTERRUPTED, done.stderr
    assert "Traceback" not in done.stderr
    assert read_run(recipe)["status"] == "interrupted"
    assert len(checkpoints_of(recipe)) == 1


def test_a_process_that_hangs_ends_the_run(write_recipe):
    recipe = write_recipe(train={**LONG, "ddp_timeout": 5})
    process = start(recipe, "--num-processes", "2")
    wait_for(lambda: num_steps_of(recipe) > 3, process)
    hung = workers_of(process)[1]
    os.kill(hung, signal.SIGSTOP)
    try:
        wait_for(lambda: 0 not in workers_of(process), process)
    finally:
        os.kill(hung, signal.SIGCONT)
    done = finish(process)
    assert done.returncode == EXIT_FAILED
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_srun_joins(write_recipe):
    """Several tasks of one `srun`, as its variables describe them."""
    recipe = write_recipe(train={"per_device_train_batch_size": 2})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "17",
        "MASTER_PORT": port,
    }
    tasks = [
        fork(recipe, **shared, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)
    ]
    ended = [finish(task) for task in tasks]
    assert [task.returncode for task in ended] == [EXIT_DONE] * 2, [t.stderr for t in ended]
    assert read_run(recipe)["num_processes"] == 2
    assert sum("finished" in task.stdout for task in ended) == 1


def test_a_machine_says_what_it_waits_for(write_recipe):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    words = ["--num-processes", "2", "--num-machines", "2", "--rdzv-endpoint", endpoint]
    process = start(write_recipe(), *words)
    try:
        lines = [process.stderr.readline() for _ in range(2)]  # after "train: loading PyTorch"
    finally:
        process.send_signal(signal.SIGINT)
        finish(process)
    assert f"waiting for all 2 machines at {endpoint}, for 600 s at most" in lines[1]
