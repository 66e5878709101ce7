"""The memory of CPU kernels stays bounded when every pass has another number of tokens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from wegeft_cli.models.kernels import bound_kernel_caches
from wegeft_cli.models.loading import load_model

CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")

MEASURE = """
import torch
from wegeft_cli.models.kernels import bound_kernel_caches
bound_kernel_caches(torch.nn.Linear(1, 1))
torch.set_num_threads(1)
weights = [torch.randn(64 * n, 64, dtype=torch.bfloat16) for n in range(1, 9)]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def run(num_tokens):
    x = torch.randn(num_tokens, 64, dtype=torch.bfloat16)
    for weight in weights:
        torch.nn.functional.linear(x, weight)

run(600)
before = resident()
for num_tokens in range(200, 320):
    run(num_tokens)
print(resident() - before)
"""


@pytest.fixture
def environment(monkeypatch):
    variables = {key: value for key, value in os.environ.items() if key not in CACHES}
    monkeypatch.setattr(os, "environ", variables)
    return variables


def test_loading_a_model_bounds_the_caches(llama_dir, environment):
    load_model(str(llama_dir))
    assert [environment[name] for name in CACHES] == ["64", "64"]


def test_the_users_own_capacity_stays(environment):
    environment[CACHES[0]] = "7"
    bound_kernel_caches(nn.Linear(1, 1))
    assert [environment[name] for name in CACHES] == ["7", "64"]


def test_experts_have_more_shapes_than_a_bound_allows(environment):
    bound_kernel_caches(nn.ModuleDict({"experts": nn.Linear(1, 1)}))
    assert not environment.keys() & set(CACHES)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_new_shapes_do_not_fill_the_memory(monkeypatch):
    def measure():
        done = subprocess.run(
            [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    for name in CACHES:
        monkeypatch.setenv(name, "1024")
    unbounded = measure()
    for name in CACHES:
        monkeypatch.delenv(name)
    bounded = measure()
    if unbounded < 64:
        pytest.skip(f"this CPU's bfloat16 kernels took {unbounded:.0f} MiB for 960 shapes")
    assert bounded < unbounded / 2
