"""Started by `preloaded`: loads what a run needs, then forks a process for each one asked for.

The arguments are the descriptor of a socket and the path of a recipe, or nothing. A request to
start is a JSON object with the three standard streams of the process; the answer is its process
id. A request with a process id is answered by its status as `os.waitpid` gives it, or null while
it runs.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

# What a run loads sooner or later; nothing of it may start a thread.
import datasets
import peft
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers.models.llama.modeling_llama
import transformers.trainer
from kept_traces import keep_traces

import wegeft_cli.cli.app
import wegeft_cli.runs.train
from wegeft_cli.planning.plan import plan

LOADED = (datasets, peft, torch, transformers, wegeft_cli)
FOLLOWS = "WEGEFT_FOLLOWS"
LARGEST_REQUEST = 1 << 17


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Answer until the other end is closed; in a forked process, return what it is asked to be."""
    statuses: dict[int, int | None] = {}
    while True:
        message, streams, _, _ = socket.recv_fds(channel, LARGEST_REQUEST, 3)
        if not message:
            for pid, status in statuses.items():
                if status is None:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            return None
        asked = json.loads(message)
        if "poll" in asked:
            pid = asked["poll"]
            if statuses[pid] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                statuses[pid] = status if found else None
            channel.send(json.dumps(statuses[pid]).encode())
            continue
        pid = os.fork()
        if pid == 0:
            channel.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return asked
        for stream in streams:
            os.close(stream)
        statuses[pid] = None
        channel.send(json.dumps(pid).encode())


def become(asked: dict[str, Any]) -> None:
    """Run what `python WORDS` runs, with the environment and the working folder asked for."""
    if asked["session"]:
        os.setsid()
    if asked["process_group"] is not None:
        os.setpgid(0, asked["process_group"])
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    if FOLLOWS in os.environ:
        os.environ[FOLLOWS] = str(os.getppid())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    is_safe, words = asked["words"][:1] == ["-P"], asked["words"]
    words = words[1:] if is_safe else words
    del sys.path[0]  # this script's folder
    if words[0] == "-m":
        sys.argv = words[1:]
        if not is_safe:
            sys.path.insert(0, asked["cwd"])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def leave(asked: dict[str, Any]) -> None:
    """Run what is asked, and exit without clearing every module, which takes longer than a fork."""
    code: object = None
    try:
        become(asked)
    except SystemExit as leaving:
        code = leaving.code
        if not isinstance(code, int | None):
            raise
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def prepare(recipe: str) -> None:
    """Do once what forks would each do: plan the recipe. They do not wait for the disk."""
    keep_traces(setattr)
    os.fsync = os.fstat
    # With a GPU, autograd starts threads, and a fork could not use it.
    if recipe and not torch.cuda.device_count():
        plan(recipe)


if __name__ == "__main__":
    prepare(sys.argv[2])
    gc.collect()
    gc.freeze()
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        leave(asked)
