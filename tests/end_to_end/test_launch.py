"""How a run of many processes is described, joined, and what is said of its end."""

import json
from types import SimpleNamespace

import pytest

from wegeft_cli.distributed.failures import (
    LAUNCHED,
    is_lost_peer,
    lost_peer_error,
    may_be_restarted,
    num_restarts,
    report_to_launcher,
)
from wegeft_cli.distributed.launch import (
    LOST_PEER,
    Group,
    explain_failure,
    first_host,
    is_in_group,
    join_slurm,
)
from wegeft_cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, MachineError, UserError


def fail(exitcode, message=None, timestamp=0):
    told = "no word" if message is None else {"message": message, "extraInfo": {}}
    return SimpleNamespace(exitcode=exitcode, message=told, timestamp=timestamp)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[03-05,9],x1", "node03"),
        ("rack[1,4]-gpu,x", "rack1-gpu"),
        ("a-b.c[007]", "a-b.c007"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"num_processes": 3, "num_machines": 2, "rdzv_endpoint": "a:1"}, "--num-processes"),
        ({"num_processes": 2, "num_machines": 2}, "--rdzv-endpoint"),
        ({"num_processes": 2, "num_machines": 2, "rdzv_endpoint": "node1"}, "--rdzv-endpoint"),
    ],
)
def test_a_group_that_cannot_be(values, key):
    with pytest.raises(UserError) as caught:
        Group(**values)
    assert caught.value.key == key


def test_srun_gives_rank_and_place():
    tasks = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
    }
    assert join_slurm(tasks)
    assert is_in_group(tasks)
    wanted = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    wanted |= {"MASTER_ADDR": "gpu07", "MASTER_PORT": "23456"}
    assert {name: tasks[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    "values", [{}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": "4", "RANK": "0"}]
)
def test_srun_is_left_alone(values):
    values |= {"WORLD_SIZE": "4"} if "RANK" in values else {}
    before = dict(values)
    assert not join_slurm(values)
    assert values == before


def test_srun_without_a_place_is_told():
    with pytest.raises(UserError, match="where they meet"):
        join_slurm({"SLURM_STEP_NUM_TASKS": "2"})


def test_the_first_failure_is_told():
    failures = {
        0: fail(EXIT_FAILED, f"{LOST_PEER} (more)", timestamp=3),
        1: fail(-15, timestamp=4),
        2: fail(EXIT_FAILED, "ValueError: bad", timestamp=5),
    }
    with pytest.raises(MachineError, match="process 2 of the run failed: ValueError: bad"):
        explain_failure(failures)
    failures[2] = fail(-9, timestamp=5)
    with pytest.raises(MachineError, match="process 2 of the run was killed by SIGKILL") as caught:
        explain_failure(failures)
    assert "out of memory" in caught.value.hint


def test_who_has_spoken_is_not_repeated():
    assert explain_failure({0: fail(EXIT_USER, "no such file"), 1: fail(-15)}) == EXIT_USER
    with pytest.raises(UserError, match="process 1") as caught:
        explain_failure({1: fail(EXIT_USER, "no such file", timestamp=1), 0: fail(-15)})
    assert caught.value.exit_code == EXIT_USER
    # Both met it, the second one earlier; what it alone met is told.
    first = fail(EXIT_USER, "no such file", timestamp=2)
    both = {1: fail(EXIT_USER, "no such file", timestamp=1), 0: first}
    assert explain_failure(both) == EXIT_USER
    with pytest.raises(UserError, match="process 1 of the run failed: another"):
        explain_failure({1: fail(EXIT_USER, "another", timestamp=1), 0: first})
    # A traceback on standard error, and no word for the launcher.
    with pytest.raises(MachineError, match="exit code 3"):
        explain_failure({0: fail(3)})


def test_a_run_that_was_stopped_is_interrupted():
    with pytest.raises(KeyboardInterrupt):
        explain_failure({0: fail(EXIT_INTERRUPTED), 1: fail(EXIT_INTERRUPTED)})


def test_a_fault_is_left_for_the_launcher(tmp_path, monkeypatch):
    report_to_launcher("nobody asks")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    report_to_launcher("torchrun prints the fault by itself")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(LAUNCHED, "1")
    report_to_launcher("bad")
    (written,) = tmp_path.iterdir()
    told = json.loads(written.read_text())["message"]
    assert told["message"] == "bad"
    assert told["extraInfo"]["timestamp"].isdigit()


def test_restarts_are_counted(monkeypatch):
    assert (num_restarts(), may_be_restarted()) == (0, False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert may_be_restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert (num_restarts(), may_be_restarted()) == (2, False)


def test_a_lost_process_is_told_from_other_faults():
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    assert is_lost_peer(RuntimeError(gloo))
    assert not is_lost_peer(RuntimeError("shapes do not match"))
    assert not is_lost_peer(ValueError("Connection closed by peer"))
    fault = lost_peer_error(30)
    assert LOST_PEER in str(fault)
    assert "30 s" in fault.hint
