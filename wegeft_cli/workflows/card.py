"""The model card that lies beside an adapter."""

from __future__ import annotations

from wegeft_cli.recipe.check import INPLACE_TYPES
from wegeft_cli.recipe.load import recipe_to_yaml
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.version import VERSION

_TEXT = """---
base_model: {base}
library_name: {library}
tags: [wegeft, peft]
---

# {title}

A {method} adapter for `{base}`, trained by wegeft-cli {version}: {num_steps} optimizer steps, final
training loss {loss}.{kept}

{saved}{usage}
## Recipe

```yaml
{recipe}```
"""

_WEGEFT_USAGE = """Use it:

```bash
wegeft merge THIS_FOLDER            # a model folder that any tool loads
wegeft eval THIS_FOLDER --task gsm8k
```

```python
from transformers import AutoModelForCausalLM
from wegeft_cli import load_adapter

model = AutoModelForCausalLM.from_pretrained("{base}")
load_adapter(model, "THIS_FOLDER")
```

WeGeFT (Savadikar, Song, Wu; ICML 2025; arXiv 2312.00700): W' = W (I + s phi psi).

"""


_SAVED = """Trained whole beside it, and kept in the same file: {names}.

"""


_CLASS_USAGE = """Use it:

```bash
wegeft merge THIS_FOLDER            # a model folder that transformers' {auto} loads, head and all
wegeft eval THIS_FOLDER --data-dir FOLDER
```

"""

_AUTO = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}


def _tell_usage(recipe: Recipe) -> str:
    if recipe.task in _AUTO:
        return _CLASS_USAGE.format(auto=_AUTO[recipe.task])
    if recipe.adapter.type == "wegeft":
        return _WEGEFT_USAGE.format(base=recipe.model.name_or_path)
    return ""


def write_card(
    recipe: Recipe, num_steps: int, final_loss: float | None, *, adapter_step: int
) -> str:
    """Write the card's text from what the run knows.

    Args:
        recipe: The resolved recipe.
        num_steps: Optimizer steps done.
        final_loss: Mean loss of the last line of metrics.
        adapter_step: The step whose factors these are.

    Returns:
        Markdown with the hub's metadata on top.
    """
    base = recipe.model.name_or_path
    is_wegeft = recipe.adapter.type == "wegeft"
    names = ", ".join(f"`{name}`" for name in recipe.adapter.modules_to_save)
    return _TEXT.format(
        base=base,
        library="wegeft-cli" if is_wegeft or recipe.adapter.type in INPLACE_TYPES else "peft",
        title=recipe.output_dir.rstrip("/").rpartition("/")[2],
        method="WeGeFT" if is_wegeft else recipe.adapter.type,
        version=VERSION,
        num_steps=num_steps,
        loss="unknown" if final_loss is None else f"{final_loss:.4f}",
        saved=_SAVED.format(names=names) if names else "",
        kept=""
        if adapter_step == num_steps
        else f" The adapter is that of step {adapter_step}, the best by "
        f"`{recipe.train.metric_for_best_model}`.",
        usage=_tell_usage(recipe),
        recipe=recipe_to_yaml(recipe),
    )
