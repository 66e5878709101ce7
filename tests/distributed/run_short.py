"""What a launched process runs: a recipe during which one process is out of memory, and its repeat.

The second recipe is begun with the size of passes to which the first one was lowered.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.runs import train as train_module
from wegeft_cli.training.loss import CausalLoss

LARGEST = 40
"""Most positions of a pass for which the second process has memory."""


def main() -> None:
    """Train the recipe of the first path short of memory and that of the second one with memory."""
    Processes.leave = Processes.wait
    short, small = sys.argv[1:3]
    compute, num_failures = CausalLoss._forward, []

    def fail(self, model, batch):
        if model.training and batch.input_ids.numel() > LARGEST:
            num_failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, model, batch)

    if PartialState(cpu=True).process_index == 1:
        CausalLoss._forward = fail
    result = train_module.train(short)
    CausalLoss._forward = compute
    assert bool(num_failures) == (PartialState(cpu=True).process_index == 1)
    limit = json.loads(Path(result.run_dir, "run.json").read_text())["max_tokens_per_pass"]
    assert limit <= LARGEST
    train_module.train(small, [f"train.max_tokens_per_pass={limit}"])
    PartialState().destroy_process_group()


main()
