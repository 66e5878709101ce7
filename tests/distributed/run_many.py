"""What a launched process runs: several recipes, one after the other, in one process group.

A second argument makes the second process leave the others behind: at its third step it clips to
another norm, as a wrong collective would leave it with another gradient.
"""

import json
import sys

from accelerate import PartialState

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.runs import train as train_module
from wegeft_cli.training import trainer as loop


def diverge(clip_gradients):
    """Give a `clip_gradients` that is wrong at its third call."""
    calls = []

    def clip(parameters, max_grad_norm):
        calls.append(1)
        return clip_gradients(parameters, 1e-3 if len(calls) == 3 else max_grad_norm)

    return clip


def main() -> None:
    """Train each recipe of the list given."""
    Processes.leave = Processes.wait
    if len(sys.argv) > 2 and PartialState(cpu=True).process_index == 1:
        loop.clip_gradients = diverge(loop.clip_gradients)
    for path in json.loads(sys.argv[1]):
        train_module.train(path)
    PartialState().destroy_process_group()


main()
