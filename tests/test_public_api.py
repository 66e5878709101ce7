"""The package's own names: light to import, all there, and of use without the command line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import wegeft_cli


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, wegeft_cli; dir(wegeft_cli); wegeft_cli.UserError; wegeft_cli.__version__;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'accelerate', 'typer')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_import_of_torch_leaves_the_collector_on_and_its_objects_out():
    code = (
        "import gc, sys; from wegeft_cli.torch_import import load_torch; load_torch(); "
        "print('torch' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3


def test_every_name_is_there():
    assert len(wegeft_cli.__all__) == len(set(wegeft_cli.__all__)) == 25
    for name in wegeft_cli.__all__:
        assert getattr(wegeft_cli, name) is not None
        assert name in dir(wegeft_cli)
    for name in (
        "train",
        "sweep",
        "bench",
        "merge",
        "evaluate",
        "generate",
        "plan",
        "load_adapter",
    ):
        assert callable(getattr(wegeft_cli, name))
    for name in ("inspect", "ablate", "edit", "report"):
        assert callable(getattr(wegeft_cli, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = wegeft_cli.no_such_name


def test_an_own_loop_as_the_package_documents_it(llama_dir, tmp_path):
    from wegeft_cli import inject_generators, load_adapter, save_adapter

    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    generators = inject_generators(model, rank=64, target_modules=["q_proj", "v_proj"])
    optimizer = torch.optim.AdamW(generators.trainable(), lr=2e-4)
    ids = torch.arange(4, 24).view(2, 10)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    save_adapter(model, tmp_path / "my-adapter", base_model_name_or_path=str(llama_dir))
    assert losses[-1] < losses[0]

    again = AutoModelForCausalLM.from_pretrained(llama_dir)
    load_adapter(again, tmp_path / "my-adapter", base_dir=llama_dir)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    wegeft_cli.fold_generators(again)
    merged = wegeft_cli.merge(tmp_path / "my-adapter")
    plain = AutoModelForCausalLM.from_pretrained(merged.output_dir)
    assert torch.equal(plain(ids).logits, again(ids).logits)
    wegeft_cli.unfold_generators(again)
    wegeft_cli.remove_generators(again)
    assert wegeft_cli.get_generators(again) is None


def test_the_pages_import_what_there_is():
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    found: set[str] = set()
    for page in [*pages, Path(__file__).parents[1] / "README.md"]:
        for names in re.findall(r"^from wegeft_cli import (.+)$", page.read_text(), re.MULTILINE):
            found |= {name.strip() for name in names.split(",")}
    assert len(found) >= 15
    assert found <= set(wegeft_cli.__all__)
