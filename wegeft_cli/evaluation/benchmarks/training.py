"""Options of benchmarks during training, which come from the environment."""

from __future__ import annotations

import os
from typing import Any

ALLOW_CODE_VARIABLE = "WEGEFT_ALLOW_CODE_EXECUTION"
"""Environment variable: 1 allows training to run generated code in the sandbox."""
JUDGE_URL_VARIABLE = "WEGEFT_JUDGE_URL"
JUDGE_MODEL_VARIABLE = "WEGEFT_JUDGE_MODEL"


def training_options() -> dict[str, Any]:
    """Return the options of `wegeft eval` that apply to `train.eval_tasks`.

    Test sets with known train/test overlap are allowed: the score only guides the training.
    """
    return {
        "allow_leaky": True,
        "allow_code_execution": os.environ.get(ALLOW_CODE_VARIABLE) == "1",
        "judge_url": os.environ.get(JUDGE_URL_VARIABLE) or None,
        "judge_model": os.environ.get(JUDGE_MODEL_VARIABLE) or None,
    }
