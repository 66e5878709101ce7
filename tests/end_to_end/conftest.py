"""What a run leaves behind, read back; a wish to stop; a listener; adapters on real bases."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import save_adapter
from wegeft_cli.runs.train import train

# These tell of the clock and of the process, not of the training.
TIMINGS = ("tokens_per_second", "step_seconds", "peak_memory_gib")


@pytest.fixture
def read_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """A function: the lines of a run's metrics without their timings."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if k not in TIMINGS} for x in lines]

    return read


@pytest.fixture
def read_adapter() -> Callable[[Path], bytes]:
    """A function: the bytes of a run's trained tensors."""
    return lambda run_dir: (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def read_run() -> Callable[[Path], dict[str, Any]]:
    """A function: a run's run.json."""
    return lambda run_dir: json.loads((run_dir / "run.json").read_text())


@pytest.fixture
def steps_saved() -> Callable[[Path], list[int]]:
    """A function: the steps of the checkpoints in a run's folder."""
    return lambda run_dir: sorted(int(p.name[5:]) for p in run_dir.glob("checkpoints/step-*"))


@pytest.fixture
def files_in() -> Callable[[Path], dict[str, str]]:
    """A function: every file of a folder -> the hash of its bytes."""

    def hash_all(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return hash_all


class StopAfter:
    """Asks a run to stop in its k-th step; it is asked once a step."""

    def __init__(self, num_steps: int) -> None:
        self.num_left = num_steps

    def __call__(self) -> bool:
        self.num_left -= 1
        return self.num_left == 0


@pytest.fixture
def stop_after() -> type[StopAfter]:
    return StopAfter


class Listener:
    """Keeps what a workflow says."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.titles: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    @contextmanager
    def progress(self, title: str, total: float):
        self.titles.append(title)
        yield lambda done, **figures: None


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture(scope="session")
def build_gpt2_dir(tmp_path_factory, build_tokenizer) -> Callable[..., Path]:
    """A function that writes a two-layer GPT-2 with biases; `prefix` is its tensors' first part.

    The original files of the family have no prefix, those that transformers writes now have one.
    """
    made: dict[str, Path] = {}

    def build(prefix: str = "transformer.") -> Path:
        if prefix not in made:
            folder = made[prefix] = tmp_path_factory.mktemp("gpt2")
            tokenizer = build_tokenizer()
            tokenizer.save_pretrained(folder)
            torch.manual_seed(0)
            model = GPT2LMHeadModel(
                GPT2Config(
                    n_embd=32,
                    n_layer=2,
                    n_head=4,
                    n_positions=256,
                    vocab_size=len(tokenizer),
                    bos_token_id=1,
                    eos_token_id=2,
                    initializer_range=0.2,
                )
            )
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder)
            weights = folder / "model.safetensors"
            tensors = load_file(weights)
            assert all(name.startswith("transformer.") for name in tensors)
            renamed = {prefix + name.partition(".")[2]: tensor for name, tensor in tensors.items()}
            save_file(renamed, weights, metadata={"format": "pt"})
        return made[prefix]

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of eleven tokens."""
    return torch.randint(4, 300, (2, 11), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def make_adapter(tmp_path) -> Callable[..., tuple[Path, torch.nn.Module]]:
    """A function: an adapter with factors far from zero on a base; its folder and the model."""

    def make(base_dir: Path, name: str = "mine", *, told: str | None = None, **settings: Any):
        model = AutoModelForCausalLM.from_pretrained(base_dir)
        generators = inject_generators(model, **{"rank": 4, **settings})
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in generators.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
        folder = tmp_path / name
        save_adapter(model, folder, base_model_name_or_path=told or str(base_dir))
        return folder, model.eval()

    return make


@pytest.fixture(scope="session")
def hostile() -> str:
    """A sample's text that would do something if a page took it for markup."""
    return "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture(scope="session")
def run_dir(write_recipe_in, hostile, data_dir, tmp_path_factory) -> Path:
    """A run with validation, an evaluation beside its base, and hostile samples."""
    folder = tmp_path_factory.mktemp("report")
    recipe = write_recipe_in(
        folder,
        data={"validation": [{"path": str(folder / "tiny.jsonl")}]},
        train={"eval_steps": 3},
    )
    run = Path(train(recipe).run_dir)
    evaluate(run, tasks=["boolq"], data_dir=data_dir, max_new_tokens=4, compare_base=True)
    (samples,) = (run / "eval").glob("*-samples.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 12
    # Known verdicts: the base answers row 0, the tuned model rows 0 to 3, and one cannot be read.
    for line in lines:
        is_base = line["model"] == "base"
        line["correct"] = line["index"] < (1 if is_base else 4)
        line["valid"] = line["index"] != 5
        line["output"] = f"{hostile} {line['model']} row {line['index']}"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture(scope="session")
def pair(run_dir, hostile, tmp_path_factory) -> tuple[Path, Path]:
    """The run and a second one whose recipe, curves and name differ."""
    other = tmp_path_factory.mktemp("other") / "b<i>&"
    shutil.copytree(run_dir, other)
    text = (other / "recipe.yaml").read_text().replace("seed: 7", "seed: 8")
    (other / "recipe.yaml").write_text(text + f"# {hostile}\n")
    values = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**values, "device": hostile, "num_steps": 9}))
    return run_dir, other
