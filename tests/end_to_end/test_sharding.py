"""Which processes share a base, and which engines are refused."""

import pytest
import torch

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.distributed.sharding import build_sharding, check_launcher
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import TrainSection


def sharding(num_processes, **keys):
    processes = Processes(0, num_processes, torch.device("cuda"))
    return build_sharding(TrainSection(**keys), processes).get("distributed_config")


@pytest.mark.parametrize(
    "name",
    [
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_MEGATRON_LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG",
    ],
)
def test_an_engine_under_which_factors_are_not_exact_is_refused(name, monkeypatch, write_recipe):
    check_launcher({name: "false"})
    with pytest.raises(UserError) as caught:
        check_launcher({name: "true"})
    assert caught.value.key == name
    assert "fsdp2" in caught.value.hint
    assert len(caught.value.message) > 40


def test_the_base_is_whole_unless_processes_share_it():
    assert sharding(8) is None
    assert sharding(1, strategy="fsdp2") is None
    assert sharding(4, strategy="hsdp", fsdp_size=1) is None


def test_who_shares(monkeypatch):
    config = sharding(8, strategy="fsdp2")
    assert (config.fsdp_size, config.dp_replicate_size) == (8, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = sharding(8, strategy="hsdp")
    assert (config.fsdp_size, config.dp_replicate_size) == (4, 2)
    config = sharding(8, strategy="hsdp", fsdp_size=2)
    assert (config.fsdp_size, config.dp_replicate_size) == (2, 4)
    with pytest.raises(UserError, match="cannot be divided") as caught:
        sharding(8, strategy="hsdp", fsdp_size=3)
    assert caught.value.key == "train.fsdp_size"
