"""Launch the processes of a run on this machine, or join those of another launcher.

The engine is torch's elastic launcher: one agent per machine starts and watches its processes, and
restarts all of them together if one has died and restarts are left.
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
from wegeft_cli.reporter import Reporter, SilentReporter

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from wegeft_cli.recipe.schema import TrainSection

LOST_PEER = "another process of this run has ended or does not answer"
"""Message of a process that fails only because another one did."""

_SECONDS_TO_SAVE = 600
"""How long processes may take to save and exit after a signal; torch kills them after 30 s."""
_SECONDS_TO_MEET = 600
"""How long a machine waits for the others, at the start and after a restart."""
_FIRST_SLURM_PORT = 20_000
_SLURM_PORTS = 10_000


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Args:
        num_processes: Number of processes on all machines together.
        num_machines: Number of machines, each with the same number of processes.
        rdzv_endpoint: HOST:PORT of one machine, where all meet; None for a single machine.
        max_restarts: How often all processes are restarted after one of them has died.
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
                hint="it is the number on all machines together",
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
    """Return whether a launcher (torchrun, `accelerate launch`, wegeft) started this process."""
    environment = os.environ if environment is None else environment
    return "RANK" in environment and "WORLD_SIZE" in environment


def num_sharing(train: TrainSection) -> int:
    """Return the number of processes that share one copy of the base, 1 without sharding."""
    many = int(os.environ.get("WORLD_SIZE", "1"))
    if train.strategy == "replicated" or many == 1:
        return 1
    if train.strategy == "fsdp2":
        return many
    return train.fsdp_size or int(os.environ.get("LOCAL_WORLD_SIZE", str(many)))


def join_slurm(environment: MutableMapping[str, str] | None = None) -> bool:
    """Read rank and rendezvous from SLURM if `srun` started several tasks of this command.

    Return whether this process is one of several tasks. Set the variables of torch.distributed in
    `environment`; raise UserError if SLURM does not list the nodes.
    """
    environment = os.environ if environment is None else environment
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if is_in_group(environment) or not num_tasks.isdigit() or int(num_tasks) <= 1:
        return False
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    host = first_host(nodes)
    if not host:
        raise UserError(
            "srun started several tasks, but no node list says where they meet",
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
    """Return the first host of a SLURM node list: `node[03-05,9],x1` gives `node03`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", nodes)
    return "" if found is None else "".join(part or "" for part in found.groups())


class _RendezvousNotes(logging.Handler):
    """Reports from torch's log when this machine waits for the others, and when all are there."""

    def __init__(self, group: Group, reporter: Reporter) -> None:
        super().__init__()
        self._group = group
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Report a rendezvous that begins or ends."""
        num_machines = self._group.num_machines
        if "Rendezvous'ing" in str(record.msg):
            self._reporter.note(
                f"waiting for all {num_machines} machines at {self._group.rdzv_endpoint}, for "
                f"{_SECONDS_TO_MEET} s at most"
            )
        elif "Rendezvous complete" in str(record.msg):
            self._reporter.note(f"all {num_machines} machines are here")


def launch(words: Sequence[str], group: Group, reporter: Reporter | None = None) -> int:
    """Run `wegeft WORDS` in several processes and wait for all of them.

    A process that dies ends the others at once; all are restarted while restarts are left. Ctrl-C,
    SIGTERM, SIGHUP and SIGUSR1 are sent to every process once; they save and exit.

    Return the exit code if the first process has printed its own error, else see
    `explain_failure`. Raise KeyboardInterrupt if a signal stopped the run.
    """
    # Restarted processes must not use the addresses of those that died.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    num_local = group.num_processes // group.num_machines
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_local)))
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _report_rendezvous(group, reporter or SilentReporter())
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=group.num_machines,
        max_nodes=group.num_machines,
        nproc_per_node=num_local,
        run_id=os.environ.get("SLURM_JOB_ID", "wegeft"),
        rdzv_backend="c10d",
        rdzv_endpoint=group.rdzv_endpoint or "localhost:0",
        rdzv_configs={"join_timeout": _SECONDS_TO_MEET},
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
    except RendezvousError as error:
        raise MachineError(
            f"the {group.num_machines} machines did not meet at {group.rdzv_endpoint}: "
            f"{str(error) or type(error).__name__}",
            hint="start the same command on each machine, with an address that all can reach",
        ) from error
    except ChildFailedError as error:
        return explain_failure(error.failures)
    return EXIT_DONE


def _report_rendezvous(group: Group, reporter: Reporter) -> None:
    """Replace the log lines of torch's launcher by notes for the user."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.setLevel(logging.CRITICAL)
    if group.num_machines > 1:
        agent = logging.getLogger("torch.distributed.elastic.agent.server.api")
        agent.setLevel(logging.INFO)
        agent.propagate = False
        agent.handlers = [_RendezvousNotes(group, reporter)]


def explain_failure(failures: Mapping[int, ProcessFailure]) -> int:
    """Raise the failure that the others followed from, or return the first process's exit code.

    The exit code is returned if the first process has printed the error itself. The failure is a
    UserError or MachineError like that of the failed process, or KeyboardInterrupt if the run was
    stopped and saved.
    """
    if all(failure.exitcode == EXIT_INTERRUPTED for failure in failures.values()):
        raise KeyboardInterrupt
    # Processes that only lost a peer, or that the agent ended, come last.
    rank, first = min(failures.items(), key=lambda item: (_follows(item[1]), item[1].timestamp))
    if first.exitcode < 0:
        number = signal.Signals(-first.exitcode)
        raise MachineError(
            f"process {rank} of the run was killed by {number.name}",
            hint="the machine may have run out of memory; the newest checkpoint is complete: "
            "continue with --resume auto"
            if number == signal.SIGKILL
            else "the newest checkpoint is complete: continue with --resume auto",
        )
    message = _message(first)
    # The first process prints its own errors, also one that all processes raise.
    if message is not None and 0 in failures and message == _message(failures[0]):
        return first.exitcode
    what = f"exit code {first.exitcode}" if message is None else message
    kind = UserError if first.exitcode == UserError.exit_code else MachineError
    raise kind(f"process {rank} of the run failed: {what}")


def _follows(failure: ProcessFailure) -> bool:
    return LOST_PEER in (_message(failure) or "") or failure.exitcode == -signal.SIGTERM


def _message(failure: ProcessFailure) -> str | None:
    """Return the message that a process has left for its launcher, if any."""
    report: object = failure.message
    if isinstance(report, dict) and "message" in report:
        return str(report["message"])
    return None
