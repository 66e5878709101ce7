"""What commands print with --json and what they write: keys, types of values, layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden
import pytest
import yaml
from golden import check_golden
from safetensors import safe_open

import wegeft_cli

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

# Keys whose values depend on git, on what a model of six steps answers, or on torch's own classes.
BY_KEY: dict[str, Any] = {
    "git_revision": "null|str",
    "prediction": "null|str",
    "precision": "float|null",
    "mistaken_for": {"<class>": "int"},
    "param_groups": "torch's",
    "schedule": "torch's",
    "scaler": "torch's",
}
# Files of the base that transformers writes and other packages read.
FOREIGN = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def settle(description: Any) -> Any:
    """Replace what is not ours, or not the same everywhere."""
    if isinstance(description, list):
        return [settle(each) for each in description]
    if not isinstance(description, dict):
        return description
    return {key: BY_KEY.get(key) or settle(each) for key, each in description.items()}


def describe(*values: Any) -> Any:
    return settle(golden.describe(*values))


def list_files(folder: Path) -> list[str]:
    """Return the relative paths of all files, locks left out."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found if path.name != ".wegeft.lock")


def describe_file(path: Path) -> Any:
    """Describe a JSON, JSONL, YAML or safetensors file."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: f"{each.get_dtype()} {list(each.get_shape())}"
                for name, each in shapes.items()
            }
            return {"tensors": tensors, "metadata": sorted(file.metadata() or {})}
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return describe(*(json.loads(line) for line in text.splitlines()))
    return describe(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text))


def describe_folder(folder: Path) -> dict[str, Any]:
    """Describe every file that is data; of others, only that they are there."""
    kinds = (".json", ".jsonl", ".yaml", ".safetensors")
    return {
        name: describe_file(folder / name)
        if Path(name).suffix in kinds and Path(name).name not in FOREIGN
        else "other"
        for name in list_files(folder)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("contracts")


@pytest.fixture(scope="module")
def recipe(folder, write_run) -> Path:
    return write_run["causal_lm"](
        folder,
        "tiny",
        data={"validation": [{"path": str(folder / "tiny.jsonl")}]},
        train={"save_steps": 3, "eval_steps": 3, "load_best_model_at_end": True},
        logging={"sample_prompts": ["Q1:"]},
    )


@pytest.fixture(scope="module")
def trained(recipe, wegeft) -> dict[str, Any]:
    """What `wegeft train` prints and writes, before another command adds to it."""
    printed = wegeft("train", recipe)
    run_dir = Path(printed["run_dir"])
    return {
        "run_dir": run_dir,
        "found": {"train": describe(printed), "files": describe_folder(run_dir)},
    }


@pytest.fixture(scope="module")
def run_dir(trained) -> Path:
    return trained["run_dir"]


def test_before_training(recipe, wegeft):
    check_golden(
        "json_before_training",
        {
            "validate": describe(wegeft("validate", recipe)),
            "plan": describe(wegeft("plan", recipe)),
            "preview": describe(wegeft("preview", recipe)),
            "train --dry-run": describe(wegeft("train", recipe, "--dry-run")),
            "sweep --dry-run": describe(wegeft("sweep", recipe, "sweep.seed=[1,2]", "--dry-run")),
            "recipes list": describe(wegeft("recipes", "list")),
            "eval --list": describe(wegeft("eval", "--list")),
        },
    )


def test_before_anything_is_there(tmp_path, write_run, wegeft, build_llama_dir):
    """`plan` and `validate` need neither weights nor data; what is unknown is null."""
    model = {"name_or_path": str(build_llama_dir(weights=False))}
    recipe = write_run["causal_lm"](tmp_path, "tiny", model=model)
    (tmp_path / "tiny.jsonl").unlink()
    found = {name: describe(wegeft(name, recipe)) for name in ("validate", "plan")}
    check_golden("json_without_inputs", found)


def test_results_in_python(recipe, run_dir, folder, data_dir):
    """Public attributes of what the functions of the package return."""

    def list_names(result: Any) -> list[str]:
        if isinstance(result, dict):
            return sorted(result)
        kinds = [kind for kind in type(result).__mro__ if kind.__module__.startswith("wegeft_cli")]
        names = {*getattr(result, "__dict__", ())}.union(*(vars(kind) for kind in kinds))
        return sorted(name for name in names if not name.startswith(("_", "model_")))

    asked: dict[str, Any] = {"tasks": ["boolq"], "data_dir": data_dir, "max_new_tokens": 2}
    preview = wegeft_cli.preview(recipe)
    edited = wegeft_cli.edit(run_dir, drop=["layer:0"], output=folder / "edit-python")
    sweep = wegeft_cli.sweep(recipe, ["sweep.seed=[1,2]"], dry_run=True)
    results = {
        "load_recipe": wegeft_cli.load_recipe(recipe),
        "train": wegeft_cli.train(recipe, [f"output_dir={folder}/dry"], dry_run=True),
        "plan": wegeft_cli.plan(recipe),
        "preview": preview,
        "preview rows": preview.rows[0],
        "preview tokens": preview.rows[0].tokens[0],
        "sweep": sweep,
        "sweep rows": sweep.rows[0],
        "merge": wegeft_cli.merge(run_dir, output=folder / "merge-python"),
        "edit": edited,
        "evaluate": wegeft_cli.evaluate(run_dir, output=folder / "python.json", **asked),
        "generate": wegeft_cli.generate(run_dir, prompts=["Hello"], max_new_tokens=2),
        "inspect": wegeft_cli.inspect(run_dir),
        "report": wegeft_cli.report([run_dir], output=folder / "python.html", look_inside=False),
    }
    check_golden("python_results", {name: list_names(each) for name, each in results.items()})


def test_a_run(trained):
    check_golden("run", trained["found"])


def test_eval_and_compare(run_dir, folder, wegeft, data_dir):
    words = ["--task", "boolq", "--data-dir", data_dir, "--max-new-tokens", 4]
    before = {*list_files(run_dir)}
    both = wegeft("eval", run_dir, *words, "--compare-base")
    first = wegeft("eval", run_dir, *words, "--output", folder / "scores.json")
    compared = wegeft("compare", folder / "scores.json", folder / "scores.json")
    written = {*list_files(run_dir)} - before
    check_golden(
        "eval",
        {
            "eval --compare-base": describe(both),
            "eval": describe(first),
            "eval --output": describe_file(folder / "scores.json"),
            "compare": describe(compared),
            "files": {name: describe_file(run_dir / name) for name in sorted(written)},
        },
    )


def test_merge_export_edit(run_dir, folder, wegeft):
    found = {}
    commands: dict[str, list[Any]] = {
        "merge": ["merge", run_dir, "--output", folder / "merge"],
        "export --format lora": ["export", run_dir, "--output", folder / "lora"],
        "export --format gguf": ["export", run_dir, "-f", "gguf", "--output", folder / "gguf"],
        "edit": ["edit", run_dir, "--drop", "layer:0", "--output", folder / "edit"],
    }
    for name, words in commands.items():
        printed = wegeft(*words)
        found[name] = {"prints": describe(printed), "files": describe_folder(words[-1])}
    check_golden("merge_export_edit", found)


def test_inspect_generate_report(run_dir, folder, wegeft, data_dir):
    task = ["--task", "boolq", "--data-dir", data_dir, "--limit", 1]
    prompts = ["--prompt", "Hello", "--prompt", "Bye", "--max-new-tokens", 4]
    output = folder / "answers.jsonl"
    check_golden(
        "inspect_generate_report",
        {
            "inspect": describe(wegeft("inspect", run_dir)),
            "inspect --against": describe(wegeft("inspect", run_dir, "--against", run_dir)),
            "inspect --ablate": describe(wegeft("inspect", run_dir, "--ablate", "group", *task)),
            "generate": describe(wegeft("generate", run_dir, *prompts)),
            "generate --compare-base --output": describe(
                wegeft("generate", run_dir, *prompts, "--compare-base", "--output", output)
            ),
            "answers.jsonl": describe_file(output),
            "report": describe(wegeft("report", run_dir, "--output", folder / "page.html")),
        },
    )


@pytest.mark.parametrize(
    "task",
    ["image_classification", pytest.param("sequence_classification", marks=pytest.mark.slow)],
)
def test_a_classifier(task, tmp_path, write_run, wegeft, images_dir):
    recipe = write_run[task](tmp_path, "tiny", train={"save_steps": 3, "eval_steps": 3})
    found = {name: describe(wegeft(name, recipe)) for name in ("validate", "plan", "preview")}
    trained = wegeft("train", recipe)
    run_dir = Path(trained["run_dir"])
    found["run"] = {"train": describe(trained), "files": describe_folder(run_dir)}
    before = {*list_files(run_dir)}
    found["eval"] = describe(wegeft("eval", run_dir))
    for name in sorted({*list_files(run_dir)} - before):
        found[f"eval / {name}"] = describe_file(run_dir / name)
    found["merge"] = describe(wegeft("merge", run_dir, "--output", tmp_path / "merge"))
    found["files of the merge"] = describe_folder(tmp_path / "merge")
    if task == "image_classification":
        image = images_dir / "test" / "a" / "00.png"
        found["inspect --image"] = describe(wegeft("inspect", run_dir, "--image", image))
    check_golden("classifiers", found, part=task)


def test_a_baseline(tmp_path, write_run, wegeft):
    """LoRA: PEFT's own format, which other tools read."""
    recipe = write_run["causal_lm"](tmp_path, "tiny", adapter={"type": "lora"})
    trained = wegeft("train", recipe)
    files = describe_folder(Path(trained["run_dir"]) / "adapter")
    # These keys are PEFT's and differ by its version.
    files["adapter_config.json"] = {
        key: files["adapter_config.json"][key]
        for key in ("base_model_name_or_path", "lora_alpha", "peft_type", "r", "target_modules")
    }
    merged = wegeft("merge", trained["run_dir"])
    check_golden("baseline", {"adapter": files, "merge": describe(merged)})


@pytest.mark.slow
def test_a_quantised_baseline(tmp_path, write_run, wegeft):
    """`wegeft_base.json` beside PEFT's files tells how the base was quantised."""
    model = {"load_in_8bit": True, "quant_method": "torchao"}
    recipe = write_run["causal_lm"](tmp_path, "tiny", adapter={"type": "lora"}, model=model)
    adapter_dir = Path(wegeft("train", recipe)["adapter_dir"])
    path = adapter_dir / "wegeft_base.json"
    found = {"files": list_files(adapter_dir), "wegeft_base.json": describe_file(path)}
    check_golden("baseline_quantised", found)


@pytest.mark.slow
def test_a_sweep(tmp_path, write_run, wegeft):
    recipe = write_run["causal_lm"](
        tmp_path, "tiny", sweep={"seed": [1, 2]}, data={"validation_fraction": 0.2}
    )
    printed = wegeft("sweep", recipe)
    folder = Path(printed["output_dir"])
    top = sorted(path.name for path in folder.iterdir())
    check_golden(
        "sweep",
        {
            "prints": describe(printed),
            "sweep.json": describe_file(folder / "sweep.json"),
            "files": [name for name in top if name != ".wegeft.lock"],
        },
    )
