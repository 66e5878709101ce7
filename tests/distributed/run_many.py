"""What a launched process runs: several recipes, one after the other, in one process group."""

import json
import sys

from accelerate import Accelerator

from wegeft_cli.workflows import train as train_module


def main() -> None:
    """Train each recipe of the list given; write how each ended."""
    train_module._leave_group = Accelerator.wait_for_everyone
    for path in json.loads(sys.argv[1]):
        train_module.train(path)
    Accelerator(cpu=True).end_training()


main()
