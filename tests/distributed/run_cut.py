"""What a launched process runs: a recipe whole, and one with a stop in the middle of a step.

Only the second process is asked to stop, between the passes of the third step.
"""

import sys

from accelerate import PartialState

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.runs import train as train_module


def main() -> None:
    """Train the recipe of the first path whole and that of the second one in two parts."""
    Processes.leave = Processes.wait
    whole, cut, calls = *sys.argv[1:3], []

    def should_stop() -> bool:
        calls.append(1)
        # Four times a step: between its four passes, and after the last.
        return PartialState(cpu=True).process_index == 1 and len(calls) == 10

    train_module.train(whole)
    stopped = train_module.train(cut, should_stop=should_stop)
    assert (stopped.status, stopped.num_steps) == ("interrupted", 2)
    assert train_module.train(cut, resume="auto").status == "finished"
    PartialState().destroy_process_group()


main()
