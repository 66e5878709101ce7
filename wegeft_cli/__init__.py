"""WeGeFT: fine-tune large pretrained models with weight changes generated from the weights.

The commands of `wegeft` as functions, for people with their own training loop:

    from wegeft_cli import inject_generators, save_adapter

    generators = inject_generators(model, rank=64, target_modules=["q_proj", "v_proj"])
    optimizer = torch.optim.AdamW(generators.trainable(), lr=2e-4)
    ...
    save_adapter(model, "my-adapter", base_model_name_or_path="...")

Importing this package loads no torch; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from wegeft_cli.generators.fold import fold_generators, unfold_generators
    from wegeft_cli.generators.inject import (
        disable_generators,
        get_generators,
        inject_generators,
        remove_generators,
        use_generators,
    )
    from wegeft_cli.recipe.load import load_recipe
    from wegeft_cli.workflows.ablate import ablate
    from wegeft_cli.workflows.adapters import load_adapter, save_adapter
    from wegeft_cli.workflows.edit import edit
    from wegeft_cli.workflows.evaluate import evaluate
    from wegeft_cli.workflows.generate import generate
    from wegeft_cli.workflows.inspect import inspect
    from wegeft_cli.workflows.merge import merge
    from wegeft_cli.workflows.plan import plan
    from wegeft_cli.workflows.preview import preview
    from wegeft_cli.workflows.report import report
    from wegeft_cli.workflows.sweep import sweep
    from wegeft_cli.workflows.train import train

_HOMES = {
    "inject_generators": "wegeft_cli.generators.inject",
    "get_generators": "wegeft_cli.generators.inject",
    "use_generators": "wegeft_cli.generators.inject",
    "disable_generators": "wegeft_cli.generators.inject",
    "remove_generators": "wegeft_cli.generators.inject",
    "fold_generators": "wegeft_cli.generators.fold",
    "unfold_generators": "wegeft_cli.generators.fold",
    "save_adapter": "wegeft_cli.workflows.adapters",
    "load_adapter": "wegeft_cli.workflows.adapters",
    "load_recipe": "wegeft_cli.recipe.load",
    "train": "wegeft_cli.workflows.train",
    "sweep": "wegeft_cli.workflows.sweep",
    "merge": "wegeft_cli.workflows.merge",
    "evaluate": "wegeft_cli.workflows.evaluate",
    "plan": "wegeft_cli.workflows.plan",
    "preview": "wegeft_cli.workflows.preview",
    "generate": "wegeft_cli.workflows.generate",
    "inspect": "wegeft_cli.workflows.inspect",
    "ablate": "wegeft_cli.workflows.ablate",
    "edit": "wegeft_cli.workflows.edit",
    "report": "wegeft_cli.workflows.report",
}

__all__ = [
    "MachineError",
    "UserError",
    "__version__",
    "ablate",
    "disable_generators",
    "edit",
    "evaluate",
    "fold_generators",
    "generate",
    "get_generators",
    "inject_generators",
    "inspect",
    "load_adapter",
    "load_recipe",
    "merge",
    "plan",
    "preview",
    "remove_generators",
    "report",
    "save_adapter",
    "sweep",
    "train",
    "unfold_generators",
    "use_generators",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
