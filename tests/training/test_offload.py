"""Activations in the host's memory, and compiled layers: the same gradients by another road."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.models.kernels import compile_layers
from wegeft_cli.runs.train import train
from wegeft_cli.training import forward_context
from wegeft_cli.training.forward_context import offload_activations

# Inductor fuses products and sums: float32 in another order.
OTHER_KERNELS = 1e-5
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3, initializer_range=0.2))
    generators = inject_generators(model, rank=4, target_modules=["q_proj", "down_proj"])
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generators.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return model.train()


def give_gradients(model, context, widths=(9,)):
    model.zero_grad()
    for width in widths:
        ids = torch.randint(0, 50, (2, width), generator=torch.Generator().manual_seed(width))
        with context():
            loss = model(input_ids=ids, use_cache=False).logits.square().mean()
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_offloading_moves_activations_and_no_weight(model, monkeypatch):
    moved = []
    original = torch.Tensor.copy_
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}

    def note(tensor, source, *args, **kwargs):
        moved.append(tuple(source.shape))
        return original(tensor, source, *args, **kwargs)

    expected = give_gradients(model, lambda: torch.autograd.graph.saved_tensors_hooks(*[_same] * 2))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", note)
        found = give_gradients(model, lambda: offload_activations(model, 1))
    assert torch.equal(found, expected)
    assert len(moved) > 30
    assert not weights & set(moved)
    assert (18, 32) in moved  # what the factors' gradient needs: psi's input


class Stream:
    """A stream whose copies run when another stream waits for them, and no earlier."""

    def __init__(self):
        self.pending = []
        self.most = self.done = 0

    def copy(self, target, source):
        target.zero_()
        self.pending.append((target, source))
        self.most = max(self.most, len(self.pending))

    def record_event(self):
        return self

    def wait_event(self, event):
        self.done += len(event.pending)
        while event.pending:
            target, source = event.pending.pop(0)
            target.copy_(source)

    wait_stream = wait_event


def test_the_computation_waits_for_copies_beside_it(model, monkeypatch):
    side, compute = Stream(), Stream()
    expected = give_gradients(model, torch.enable_grad)
    monkeypatch.setattr(forward_context, "_side_stream", lambda device: side)
    monkeypatch.setattr(forward_context, "_copy", lambda stream, *pair: stream.copy(*pair))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)

    with offload_activations(model, 1):
        ids = torch.arange(18).view(2, 9)
        loss = model(input_ids=ids, use_cache=False).logits.square().mean()
    assert not side.pending
    num_saved = compute.done
    assert num_saved > 30
    assert 2 <= side.most <= 3
    del loss
    assert torch.equal(give_gradients(model, lambda: offload_activations(model, 1)), expected)
    # Each copy was awaited, and none was made in vain.
    assert compute.done == 3 * num_saved
    assert not side.pending


def _same(tensor):
    return tensor


def test_the_key_offloads(write_recipe, monkeypatch, read_adapter_of):
    calls = []

    def note(model):
        calls.append(1)
        return offload_activations(model, 1)

    monkeypatch.setattr("wegeft_cli.training.trainer.offload_activations", note)
    plain = train(write_recipe("plain"))
    assert not calls
    offloaded = train(write_recipe("offloaded", train={"activation_offload": True}))
    assert len(calls) == offloaded.num_steps
    assert read_adapter_of(plain) == read_adapter_of(offloaded)


@pytest.fixture
def read_adapter_of():
    return lambda result: (result.adapter_dir / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
# torch's compiler meets warnings of torch while it looks into tensors and classes, and ends where
# they are errors; what it computes is compared below.
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_give_the_same_gradients(model):
    expected = give_gradients(model, torch.enable_grad, widths=(9, 13))
    assert compile_layers(model) == 3
    torch._dynamo.utils.counters.clear()
    found = give_gradients(model, torch.enable_grad, widths=(9, 13))
    assert (found - expected).abs().max() < OTHER_KERNELS * expected.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 50


def test_the_key_compiles(write_recipe, monkeypatch):
    compiled = []
    monkeypatch.setattr("wegeft_cli.runs.build.compile_layers", compiled.append)
    train(write_recipe("plain", train={"max_steps": 1}))
    assert not compiled
    train(write_recipe("compiled", train={"max_steps": 1, "compile": True}))
    assert len(compiled) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_frees_the_device(model):
    model.to("cuda")
    peaks = []
    for context in (torch.enable_grad, lambda: offload_activations(model, 1024)):
        torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(0, 50, (8, 512), device="cuda")
        with context():
            loss = model(input_ids=ids, use_cache=False).logits.square().mean()
        peaks.append(torch.cuda.memory_allocated())
        loss.backward()
    assert peaks[1] < 0.7 * peaks[0]
