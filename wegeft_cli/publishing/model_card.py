"""Model cards: of an adapter, of its LoRA twin, of a merged model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import SCORES_END, find_recipe_of
from wegeft_cli.models.loading import find_base_folder
from wegeft_cli.recipe.load import recipe_to_yaml
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.values import INPLACE_TYPES
from wegeft_cli.redaction import mask_secrets
from wegeft_cli.storage.json_files import read_object
from wegeft_cli.version import VERSION

PAPER = (
    "WeGeFT: Savadikar, Song, Wu, ICML 2025, "
    "[arXiv 2312.00700](https://arxiv.org/abs/2312.00700): `W' = W (I + s phi psi)`, "
    "with one pair (phi, psi) for all layers of a group."
)

_LOAD_ADAPTER = """```python
from transformers import AutoModelForCausalLM
from wegeft_cli import load_adapter

model = AutoModelForCausalLM.from_pretrained("{base}")
load_adapter(model, "THIS_FOLDER")
```

```python
import wegeft_cli.interop.peft    # makes WeGeFT a method of PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(model, "THIS_FOLDER")
```

```bash
wegeft eval THIS_FOLDER --task gsm8k
wegeft merge THIS_FOLDER                                     # a model folder for any tool
wegeft export THIS_FOLDER --format lora --output lora        # for PEFT, vLLM, SGLang
wegeft export THIS_FOLDER --format gguf --output gguf        # for llama.cpp
```
"""

_LOAD_PEFT = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "THIS_FOLDER")
```
"""

_LOAD_SERVERS = """```bash
vllm serve {base} --enable-lora --max-lora-rank {max_rank} --lora-modules tuned=THIS_FOLDER
python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths tuned=THIS_FOLDER
```
"""

_LOAD_MERGED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

```bash
vllm serve THIS_FOLDER
wegeft export THIS_FOLDER --format gguf --output gguf && llama-cli -m gguf/model.gguf
```
"""


_LOAD_INPLACE = """```bash
wegeft eval THIS_FOLDER --task gsm8k
wegeft merge THIS_FOLDER                                     # a model folder for any tool
```
"""

_LOAD_CLASSIFIER = """```bash
wegeft eval THIS_FOLDER --data-dir FOLDER     # FOLDER/test/<class>/..., or a table called test
wegeft merge THIS_FOLDER                      # a model folder for any tool, head and all
```

```python
from transformers import {auto}

model = {auto}.from_pretrained("THIS_FOLDER-merged")
```
"""

_LOAD_MERGED_CLASSIFIER = """```python
from transformers import {auto}

model = {auto}.from_pretrained("THIS_FOLDER")
```
"""

_AUTO = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
_PIPELINES = {
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "image_classification": "image-classification",
}


def write_card(
    recipe: Recipe,
    num_steps: int,
    final_loss: float | None,
    *,
    adapter_step: int,
    parameters: tuple[int, int] | None = None,
    validation: Mapping[int, Mapping[str, float]] | None = None,
) -> str:
    """Write the text of a trained adapter's card from what the run knows.

    Args:
        recipe: The resolved recipe.
        num_steps: Optimizer steps done.
        final_loss: Mean loss of the last line of metrics.
        adapter_step: The step whose factors these are.
        parameters: Trained parameters, and those of the base.
        validation: Step -> what was measured on held-out rows and tasks.

    Returns:
        Markdown with the hub's metadata on top.
    """
    facts = Facts(recipe.model.name_or_path, recipe.model.revision, recipe)
    is_own = recipe.adapter.type == "wegeft"
    needs_us = is_own or recipe.adapter.type in INPLACE_TYPES or recipe.task in _AUTO
    method = "WeGeFT" if is_own else recipe.adapter.type
    loss = "unknown" if final_loss is None else f"{final_loss:.4f}"
    kept = (
        ""
        if adapter_step == num_steps
        else f" The adapter is that of step {adapter_step}, the best by "
        f"`{recipe.train.metric_for_best_model}`."
    )
    text = (
        f"A {method} adapter for `{facts.base}`, trained by wegeft-cli {VERSION}: {num_steps} "
        f"optimizer steps, final training loss {loss}.{kept}"
    )
    saved = ", ".join(f"`{name}`" for name in recipe.adapter.modules_to_save)
    at_end = (validation or {}).get(adapter_step)
    return _join(
        _front(facts, "wegeft-cli" if needs_us else "peft", ["wegeft", "peft"]),
        f"# {recipe.output_dir.rstrip('/').rpartition('/')[2]}",
        text,
        f"Trained whole beside it, and kept in the same file: {saved}." if saved else "",
        _count(parameters) if parameters is not None else "",
        _measured(at_end) if at_end else "",
        "## Use",
        _tell_loading(recipe),
        PAPER if is_own else "",
        *_tail(facts),
    )


def write_twin_card(
    adapter_dir: Path,
    base: str,
    revision: str | None,
    *,
    title: str,
    rank: int,
    num_modules: int,
    num_parameters: int,
    for_servers: bool,
    parity: Mapping[str, Any],
) -> str:
    """Write the text of a LoRA twin's card.

    Args:
        adapter_dir: The WeGeFT adapter that it came from.
        base: The base's name or path.
        revision: Its hub revision.
        title: Name of the folder.
        rank: The twin's rank.
        num_modules: Adapted layers.
        num_parameters: Numbers in the file.
        for_servers: Whether it holds LoRA pairs alone, which is all that servers read.
        parity: The report, as parity.json holds it.

    Returns:
        Markdown with the hub's metadata on top.
    """
    facts = read_facts(adapter_dir, base, revision)
    max_rank = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
    return _join(
        _front(facts, "peft", ["lora", "wegeft"]),
        f"# {title}",
        f"The exact LoRA twin of a WeGeFT adapter for `{base}`, written by wegeft-cli {VERSION}: "
        "`B A = s W phi psi`, layer by layer, with no approximation.",
        f"{num_modules} layers, rank {rank}, {num_parameters:,} numbers.",
        "## Parity",
        _parity_table(parity),
        "## Use",
        _LOAD_PEFT.format(base=base),
        _LOAD_SERVERS.format(base=base, max_rank=max_rank)
        if for_servers
        else "It holds more than LoRA pairs (biases, or modules trained whole): PEFT reads it, "
        "servers such as vLLM do not. For those, merge: `wegeft merge`.",
        _score_table(facts.scores),
        PAPER,
        *_tail(facts),
    )


def write_merged_card(
    adapter_dirs: Sequence[Path],
    weights: Sequence[float],
    base: str,
    revision: str | None,
    title: str,
) -> str:
    """Write the text of a merged model's card.

    Args:
        adapter_dirs: The adapters.
        weights: Their weights.
        base: The base's name or path.
        revision: Its hub revision.
        title: Name of the folder.

    Returns:
        Markdown with the hub's metadata on top.
    """
    facts = read_facts(adapter_dirs[0], base, revision)
    single = len(adapter_dirs) == 1
    names = [f"- `{_short(d)}`, weight {w:g}" for d, w in zip(adapter_dirs, weights, strict=True)]
    counts = facts.run.get("trainable_parameters")
    return _join(
        _front(facts, "transformers", ["wegeft"]),
        f"# {title}",
        f"`{base}` with {'an adapter' if single else 'adapters'} folded in by wegeft-cli "
        f"{VERSION}: `W' = W + sum w_i s_i W phi_i psi_i`, summed in float32 and rounded once.",
        "\n".join(names),
        f"Learned parameters: {counts:,}." if single and isinstance(counts, int) else "",
        "## Use",
        _tell_merged(facts),
        _score_table(facts.scores) if single else "",
        PAPER,
        *_tail(facts if single else Facts(base, revision)),
    )


def _tell_loading(recipe: Recipe) -> str:
    """Give the ways to use a trained adapter, by its task and method."""
    if recipe.task in _AUTO:
        return _LOAD_CLASSIFIER.format(auto=_AUTO[recipe.task])
    if recipe.adapter.type in INPLACE_TYPES:
        return _LOAD_INPLACE
    usage = _LOAD_ADAPTER if recipe.adapter.type == "wegeft" else _LOAD_PEFT
    return usage.format(base=recipe.model.name_or_path)


def _tell_merged(facts: Facts) -> str:
    auto = None if facts.recipe is None else _AUTO.get(facts.recipe.task)
    return _LOAD_MERGED if auto is None else _LOAD_MERGED_CLASSIFIER.format(auto=auto)


def _join(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _short(adapter_dir: Path) -> str:
    """Name an adapter by its run where its own folder's name says nothing."""
    folder = adapter_dir.resolve()
    return folder.parent.name if folder.name == "adapter" else folder.name


def _front(facts: Facts, library: str, tags: Sequence[str]) -> str:
    """Give the hub's metadata; a hub refuses a path as `base_model`, and an unknown licence."""
    licence, _ = facts.find_licence()
    task = "causal_lm" if facts.recipe is None else facts.recipe.task
    lines = ["---"]
    if facts.is_on_hub:
        lines.append(f"base_model: {facts.base}")
    if licence is not None:
        lines.append(f"license: {json.dumps(licence)}")
    lines += [
        f"library_name: {library}",
        f"pipeline_tag: {_PIPELINES[task]}",
        f"tags: [{', '.join(tags)}]",
        "---",
    ]
    return "\n".join(lines)


def _tail(facts: Facts) -> list[str]:
    licence, has_file = facts.find_licence()
    if licence is not None:
        terms = f"The base's card states the licence `{licence}`; it binds what is made from it."
    elif has_file:
        terms = "The base comes with a licence file, which binds what is made from it."
    else:
        terms = "The base's licence binds what is made from it; its files here do not state one."
    recipe = facts.recipe_text()
    return ["## Licence", terms, f"## Recipe\n\n```yaml\n{recipe}```" if recipe else ""]


def _count(parameters: tuple[int, int]) -> str:
    trained, base = parameters
    return f"Learned parameters: {trained:,} ({trained / base:.3%} of the base's {base:,})."


def _measured(figures: Mapping[str, float]) -> str:
    rows = [f"| {name} | {value:.4f} |" for name, value in sorted(figures.items())]
    return "\n".join(["## Measured while training", "", "| figure | value |", "|---|---|", *rows])


def _score_table(scores: Sequence[Mapping[str, Any]]) -> str:
    if not scores:
        return ""
    rows = [
        "| {} | {} | {} | {:.1%} | {} |".format(
            row["task"],
            row.get("protocol", ""),
            row.get("n", ""),
            row["score"],
            "" if row["base_score"] is None else f"{row['base_score']:.1%}",
        )
        for row in scores
    ]
    head = ["## Scores", "", "| task | protocol | n | score | base |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _parity_table(parity: Mapping[str, Any]) -> str:
    if not parity["is_measured"]:
        return f"Not measured: {parity['reason']}."
    rows = [
        f"| {row['dtype']} | {row['pair']} | {row['max_difference']:.2e} | "
        f"{row['mean_difference']:.2e} | {row['same_top_token']:.1%} |"
        for row in parity["results"]
    ]
    effects = ", ".join(f"{row['effect']:.3g} in {row['dtype']}" for row in parity["effects"])
    return "\n".join(
        [
            f"Largest and mean difference of the logits over {parity['num_positions']} positions "
            f"of {len(parity['prompts'])} prompts (`parity.json`). The adapter's own largest "
            f"effect on the base's logits, for comparison: {effects}.",
            "",
            "| type | compared | largest | mean | same first token |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter.

    Args:
        base: The base's name or path.
        revision: Its hub revision.
        recipe: The resolved recipe of its run.
        run: The run's run.json.
        scores: The results of `wegeft eval` on it, each with the base's score where it was asked.
    """

    base: str
    revision: str | None = None
    recipe: Recipe | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    scores: Sequence[Mapping[str, Any]] = ()

    @property
    def is_on_hub(self) -> bool:
        """Whether the base's name is one that others can use."""
        return not Path(self.base).expanduser().exists() and self.base.count("/") <= 1

    def find_licence(self) -> tuple[str | None, bool]:
        """Give the licence that the base's card states, and whether a licence lies beside it."""
        folder = find_base_folder(self.base, self.revision)
        if folder is None:
            return None, False
        has_file = any((folder / name).is_file() for name in _LICENCE_FILES)
        return _read_licence(folder / "README.md"), has_file

    def recipe_text(self) -> str:
        """Give the recipe as YAML, without secrets; empty where there is none."""
        return "" if self.recipe is None else mask_secrets(recipe_to_yaml(self.recipe))


def read_facts(adapter_dir: Path, base: str, revision: str | None) -> Facts:
    """Read what the run left that an adapter belongs to.

    Args:
        adapter_dir: The adapter's folder.
        base: The base's name or path.
        revision: Its hub revision.

    Returns:
        What is known.

    Raises:
        UserError: If the run's recipe is damaged.
    """
    recipe = find_recipe_of(adapter_dir)
    if recipe is None:
        return Facts(base, revision)
    run_dir = adapter_dir if (adapter_dir / "run.json").is_file() else adapter_dir.parent
    run = read_object(run_dir / "run.json")
    scores: list[Mapping[str, Any]] = []
    for path in sorted((run_dir / "eval").glob(f"adapter*{SCORES_END}")):
        scores += _read_scores(read_object(path))
    return Facts(base, revision, recipe, run, scores)


def _read_scores(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    results, bases = values.get("results"), values.get("base_results")
    if not isinstance(results, list):
        return []
    rows = [row for row in results if isinstance(row, dict) and "task" in row and "score" in row]
    told = {row["task"]: row["score"] for row in bases or [] if isinstance(row, dict)}
    return [{**row, "base_score": told.get(row["task"])} for row in rows]


def _read_licence(card: Path) -> str | None:
    from huggingface_hub import metadata_load

    try:
        values = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, TypeError):
        return None
    licence = values.get("license") if isinstance(values, dict) else None
    return licence if isinstance(licence, str) else None
