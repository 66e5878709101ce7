"""Starting a training run's processes on this machine, and joining those that someone else starts.

The engine is torch's elastic launcher: one agent on each machine starts that machine's processes,
watches them, and starts all of them again, together, where one died and restarts are left.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wegeft_cli.errors import EXIT_DONE, EXIT_INTERRUPTED, MachineError, UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from wegeft_cli.recipe.schema import TrainSection

LOST_PEER = "another process of this run has ended or does not answer"
"""What a process says that fails only because another one did."""

_SECONDS_TO_SAVE = 600
"""How long processes may take to save and leave after a signal; torch would kill after 30 s."""
_FIRST_SLURM_PORT = 20_000
_SLURM_PORTS = 10_000


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Args:
        num_processes: Of all machines together.
        num_machines: How many machines share them, the same number on each.
        rdzv_endpoint: host:port of one of the machines, where they meet; None on a single machine.
        max_restarts: How often all processes are started again after one of them died.
    """

    num_processes: int
    num_machines: int = 1
    rdzv_endpoint: str | None = None
    max_restarts: int = 0

    def __post_init__(self) -> None:
        if self.num_processes % self.num_machines:
            raise UserError(
                f"{self.num_processes} processes cannot be shared equally by "
                f"{self.num_machines} machines",
                key="--num-processes",
                hint="give the number on all machines together",
            )
        if self.num_machines > 1 and self.rdzv_endpoint is None:
            raise UserError(
                "several machines need a place to meet",
                key="--rdzv-endpoint",
                hint="HOST:PORT of one of them, the same on all, such as node1:29500",
            )
        if self.rdzv_endpoint is not None and not re.fullmatch(
            r".+:[0-9]{1,5}", self.rdzv_endpoint
        ):
            raise UserError(
                f"got {self.rdzv_endpoint!r}",
                key="--rdzv-endpoint",
                hint="HOST:PORT, such as node1:29500",
            )


def is_in_group(environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether a launcher (torchrun, `accelerate launch`, this one) started this process.

    Args:
        environment: Variables; None takes the process's own.

    Returns:
        Whether its rank is settled.
    """
    environment = os.environ if environment is None else environment
    return "RANK" in environment and "WORLD_SIZE" in environment


def num_sharing(train: TrainSection) -> int:
    """Count the processes that share one copy of the base, by the group this process is in.

    Args:
        train: The recipe's `train`.

    Returns:
        1 where each has its own, or there is one process.
    """
    many = int(os.environ.get("WORLD_SIZE", "1"))
    if train.strategy == "replicated" or many == 1:
        return 1
    if train.strategy == "fsdp2":
        return many
    return train.fsdp_size or int(os.environ.get("LOCAL_WORLD_SIZE", str(many)))


def join_slurm(environment: MutableMapping[str, str] | None = None) -> bool:
    """Take rank and meeting place from SLURM where `srun` started several tasks of this command.

    Args:
        environment: Variables, changed in place; None takes the process's own.

    Returns:
        Whether this process is one of several tasks.

    Raises:
        UserError: If SLURM does not tell where the tasks are to meet.
    """
    environment = os.environ if environment is None else environment
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if is_in_group(environment) or not num_tasks.isdigit() or int(num_tasks) <= 1:
        return False
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    host = first_host(nodes)
    if not host:
        raise UserError(
            "srun started several tasks, but no list of nodes tells where they meet",
            key="SLURM_STEP_NODELIST",
            hint="one task on each node, with --num-processes, needs no list",
        )
    job = int(re.sub(r"\D", "", environment.get("SLURM_JOB_ID", "")) or 0)
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=num_tasks,
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=environment.get("SLURM_STEP_TASKS_PER_NODE", num_tasks).split("(")[0],
    )
    environment.setdefault("MASTER_ADDR", host)
    environment.setdefault("MASTER_PORT", str(_FIRST_SLURM_PORT + job % _SLURM_PORTS))
    return True


def first_host(nodes: str) -> str:
    """Give the first name of a SLURM node list: `node[03-05,9],x1` gives `node03`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", nodes)
    return "" if found is None else "".join(part or "" for part in found.groups())


def launch(words: Sequence[str], group: Group) -> int:
    """Run `wegeft WORDS` in many processes and wait for all of them.

    A process that dies takes the others down at once, and all are started again while restarts are
    left. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 go to every process, once; they save and leave.

    Args:
        words: The command line, without `wegeft`.
        group: How many processes, and where.

    Returns:
        The exit code, where no more needs to be said: 0, or that of the first process, which has
        told its own fault.

    Raises:
        UserError: If a process ended with a fault of the user's.
        MachineError: If a process failed or was killed.
        KeyboardInterrupt: If a signal stopped the run.
    """
    # Restarted processes must not meet the addresses of those that died.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    num_local = group.num_processes // group.num_machines
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_local)))
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=group.num_machines,
        max_nodes=group.num_machines,
        nproc_per_node=num_local,
        run_id=os.environ.get("SLURM_JOB_ID", "wegeft"),
        rdzv_backend="c10d",
        rdzv_endpoint=group.rdzv_endpoint or "localhost:0",
        max_restarts=group.max_restarts,
        logs_specs=DefaultLogsSpecs(),
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGUSR1",
        shutdown_timeout=_SECONDS_TO_SAVE,
    )
    # -P: a file called json.py in the working folder is no module.
    command = ("-P", "-m", "wegeft_cli", *words)
    try:
        elastic_launch(config, sys.executable)(*command)
    except SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        return explain_failure(error.failures)
    return EXIT_DONE


def explain_failure(failures: Mapping[int, ProcessFailure]) -> int:
    """Tell what ended a run of many processes: the failure that the others followed from.

    Args:
        failures: Rank -> how it failed.

    Returns:
        The exit code of the first process, where that has told its fault itself.

    Raises:
        UserError: If that process told a fault of the user's.
        MachineError: If it failed or was killed.
        KeyboardInterrupt: If the run was stopped and saved.
    """
    if all(failure.exitcode == EXIT_INTERRUPTED for failure in failures.values()):
        raise KeyboardInterrupt
    # Those that only lost a peer, and those that the agent ended for it, come last.
    rank, first = min(failures.items(), key=lambda item: (_follows(item[1]), item[1].timestamp))
    if first.exitcode < 0:
        number = signal.Signals(-first.exitcode)
        raise MachineError(
            f"process {rank} of the run was killed by {number.name}",
            hint="the machine may have run out of memory; the newest checkpoint is whole: "
            "--resume auto goes on"
            if number == signal.SIGKILL
            else "the newest checkpoint is whole: --resume auto goes on",
        )
    message = _message(first)
    # The first process tells its faults itself, and so one that all of them met.
    if message is not None and 0 in failures and message == _message(failures[0]):
        return first.exitcode
    what = f"exit code {first.exitcode}" if message is None else message
    kind = UserError if first.exitcode == UserError.exit_code else MachineError
    raise kind(f"process {rank} of the run failed: {what}")


def _follows(failure: ProcessFailure) -> bool:
    return LOST_PEER in (_message(failure) or "") or failure.exitcode == -signal.SIGTERM


def _message(failure: ProcessFailure) -> str | None:
    """Give what the process left for its launcher, if anything."""
    told: object = failure.message
    return str(told["message"]) if isinstance(told, dict) and "message" in told else None
