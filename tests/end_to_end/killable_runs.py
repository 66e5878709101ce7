"""Forks training processes from one that has loaded torch, which takes longer than they do.

Reads one JSON object a line and answers with one number a line: `{"start": [words], "log": path}`
gives the process id of `wegeft words`, `{"poll": id}` its exit code, or null while it runs.
"""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

# What a run loads sooner or later; nothing of it may have started a thread.
import datasets
import transformers.models.llama.modeling_llama
import transformers.trainer

import wegeft_cli.runs.train
from wegeft_cli.cli.app import main

LOADED = (datasets, transformers, wegeft_cli)


def become(words: list[str], log: str) -> NoReturn:
    """Be `python -m wegeft_cli words` from here on."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["wegeft", *words]
    code: object = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def serve() -> None:
    """Answer until the input ends."""
    codes: dict[int, int] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            pid = os.fork()
            if pid == 0:
                become(asked["start"], asked["log"])
            print(pid, flush=True)
            continue
        pid = asked["poll"]
        if pid not in codes:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps(codes.get(pid)), flush=True)


if __name__ == "__main__":
    serve()
