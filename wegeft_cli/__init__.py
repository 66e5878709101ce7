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
    from wegeft_cli.analysis.ablate import ablate
    from wegeft_cli.analysis.edit import edit
    from wegeft_cli.analysis.inspect import inspect
    from wegeft_cli.analysis.report import report
    from wegeft_cli.evaluation.evaluate import evaluate
    from wegeft_cli.inference.generate import generate
    from wegeft_cli.merging.merge import merge
    from wegeft_cli.methods.layers.owner import (
        disable_generators,
        get_generators,
        remove_generators,
        use_generators,
    )
    from wegeft_cli.methods.wegeft.folding import fold_generators, unfold_generators
    from wegeft_cli.methods.wegeft.inject import inject_generators
    from wegeft_cli.methods.wegeft.save_load import load_adapter, save_adapter
    from wegeft_cli.planning.plan import plan
    from wegeft_cli.planning.preview import preview
    from wegeft_cli.recipe.load import load_recipe
    from wegeft_cli.runs.bench.bench import bench
    from wegeft_cli.runs.sweep import sweep
    from wegeft_cli.runs.train import train

_HOMES = {
    "inject_generators": "wegeft_cli.methods.wegeft.inject",
    "get_generators": "wegeft_cli.methods.layers.owner",
    "use_generators": "wegeft_cli.methods.layers.owner",
    "disable_generators": "wegeft_cli.methods.layers.owner",
    "remove_generators": "wegeft_cli.methods.layers.owner",
    "fold_generators": "wegeft_cli.methods.wegeft.folding",
    "unfold_generators": "wegeft_cli.methods.wegeft.folding",
    "save_adapter": "wegeft_cli.methods.wegeft.save_load",
    "load_adapter": "wegeft_cli.methods.wegeft.save_load",
    "load_recipe": "wegeft_cli.recipe.load",
    "train": "wegeft_cli.runs.train",
    "sweep": "wegeft_cli.runs.sweep",
    "bench": "wegeft_cli.runs.bench.bench",
    "merge": "wegeft_cli.merging.merge",
    "evaluate": "wegeft_cli.evaluation.evaluate",
    "plan": "wegeft_cli.planning.plan",
    "preview": "wegeft_cli.planning.preview",
    "generate": "wegeft_cli.inference.generate",
    "inspect": "wegeft_cli.analysis.inspect",
    "ablate": "wegeft_cli.analysis.ablate",
    "edit": "wegeft_cli.analysis.edit",
    "report": "wegeft_cli.analysis.report",
}

__all__ = [
    "MachineError",
    "UserError",
    "__version__",
    "ablate",
    "bench",
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
