"""What a launched process runs: it loads its share of a base, and tells what that took.

Arguments: the base's folder, and the folder for what is told.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.distributed.sharding import build_sharding
from wegeft_cli.models.loading import load_base
from wegeft_cli.recipe.schema import ModelSection, TrainSection


def count_mapped() -> int:
    """Count mapped regions of safetensors files."""
    return Path("/proc/self/maps").read_text().count(".safetensors")


def refuse(*arguments, **options):
    """Stand for the collectives that must not be used."""
    raise AssertionError("gathered by a collective that copies")


def main() -> None:
    """Load whole, then the share; run both."""
    processes = Processes.join(timedelta(minutes=30))
    section = ModelSection(name_or_path=sys.argv[1])
    ids = torch.arange(4, 20)[None]
    whole = load_base(section)
    mapped_whole = count_mapped()
    with torch.no_grad():
        expected = whole(ids).logits
    num_bytes = sum(parameter.nbytes for parameter in whole.parameters())
    del whole
    sharding = build_sharding(TrainSection(strategy="fsdp2"), processes)
    shared = load_base(section, **sharding)
    mapped_share = count_mapped()
    own_bytes = sum(parameter.to_local().nbytes for parameter in shared.parameters())
    for name in ("all_gather_into_tensor", "all_gather_single", "all_gather"):
        setattr(torch.distributed, name, refuse)
    with torch.no_grad():
        logits = shared(ids).logits
    told = {
        "mapped": [mapped_whole, mapped_share],
        "share": own_bytes / num_bytes,
        "same": torch.equal(logits, expected),
    }
    path = Path(sys.argv[2]) / f"{processes.rank}.json"
    path.write_text(json.dumps(told))
    processes.leave()


main()
