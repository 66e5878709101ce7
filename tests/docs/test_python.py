"""The Python blocks of each page run in order, on tiny models, beside the files that they name."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from classifiers import write_images, write_vit
from doc_examples import Block, find_blocks

BLOCKS = find_blocks("python")
PAGES = sorted({block.page.name for block in BLOCKS})
SPLITS = {name: {"5": 6, "6": 6} for name in ("train", "validation", "test")}
RECIPE = """\
output_dir: runs/recipe
model: {name_or_path: path/or/hub-id}
adapter: {r: 4, target_modules: [q_proj, v_proj]}
data: {train: [{path: train.jsonl}], max_length: 64}
eval: {max_new_tokens: 8}
train: {max_steps: 2, per_device_train_batch_size: 4, save_steps: 0}
sweep: {adapter.r: [4]}
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (
        json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows)
    )
    path.write_text(text)


@pytest.fixture(scope="module")
def base_dir(build_llama_dir: Callable[..., Path]) -> Path:
    return build_llama_dir(
        hidden_size=64, intermediate_size=64, max_position_embeddings=1024, num_key_value_heads=4
    )


@pytest.fixture
def world(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the examples: bases, rows and recipes under the names they use."""
    monkeypatch.chdir(tmp_path)
    for name in ("path/or/hub-id", "the-base", ".cache/quickstart/model"):
        shutil.copytree(base_dir, tmp_path / name)
    for file in base_dir.iterdir():
        shutil.copy(file, tmp_path / "path" / file.name)
    rows = [{"instruction": f"What is {n} + 1?", "output": str(n + 1)} for n in range(16)]
    answered = [{**row, "input": "", "answer": row["output"]} for row in rows]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "gsm8k" / "test.json", answered[:2])
    for split in ("train", "test"):
        write_rows(tmp_path / ".cache/quickstart/data/quickstart" / f"{split}.json", answered)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def prepare_python(world: Path) -> None:
    from transformers import AutoModelForCausalLM

    from wegeft_cli import inject_generators, save_adapter

    model = AutoModelForCausalLM.from_pretrained("path/or/hub-id")
    inject_generators(model, target_modules=["q_proj"], rank=4)
    save_adapter(model, "second-adapter", base_model_name_or_path="path/or/hub-id")
    write_vit(world / ".cache/digits/model")
    images = write_images(world / ".cache/digits/images", SPLITS)
    shutil.copy(next((images / "test").glob("*/*.png")), world / "eight.png")


def prepare_inspect(world: Path) -> None:
    from wegeft_cli import train

    train("quickstart", ["train.max_steps=1"])


def prepare_report(world: Path) -> None:
    from wegeft_cli import train

    for name in ("a", "b"):
        train("recipe.yaml", [f"output_dir=runs/{name}", "train.max_steps=1"])


def prepare_serving(world: Path) -> None:
    from wegeft_cli import train
    from wegeft_cli.exporting.export import ExportOptions, export

    run = train("recipe.yaml", ["model.name_or_path=the-base"])
    options = ExportOptions(parity=False)
    export(run.run_dir, format="lora", output=world / "lora", options=options)


PREPARE: dict[str, Callable[[Path], None]] = {
    "python.md": prepare_python,
    "inspect.md": prepare_inspect,
    "report.md": prepare_report,
    "serving.md": prepare_serving,
}


def run_blocks(blocks: list[Block], names: dict[str, Any]) -> None:
    for block in blocks:
        code = compile("\n" * block.line + block.text, str(block.page), "exec")
        exec(code, names)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page: str, world: Path) -> None:
    PREPARE.get(page, lambda _: None)(world)
    blocks = [block for block in BLOCKS if block.page.name == page and block.reason is None]
    assert blocks
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        run_blocks(blocks, {})


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_few_blocks_are_not_run() -> None:
    assert len(BLOCKS) >= 15
    assert sum(block.reason is not None for block in BLOCKS) <= 2
