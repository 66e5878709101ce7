"""The rows of a step that was skipped, written down for a look: `skipped/step-<8 digits>.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.storage.atomic import write_text_atomic

FOLDER_NAME = "skipped"


def write_skipped(
    run_dir: Path,
    step: int,
    loss: float,
    grad_norm: float,
    rows: Iterable[tuple[int | None, np.ndarray, np.ndarray] | dict[str, Any]],
    tokenizer: Any,
    processes: Processes,
) -> Path:
    """Write the rows of a step whose loss or gradient was not finite.

    Args:
        run_dir: The run's folder.
        step: Which step, from 1.
        loss: Its loss.
        grad_norm: Its gradient norm.
        rows: This process's rows of that step: (number in the training set or None,
            ids, label mask), or what is to be told of each.
        tokenizer: Turns tokens into text.
        processes: The processes of the run; every process calls this, the first one writes.

    Returns:
        The file.
    """
    path = run_dir / FOLDER_NAME / f"step-{step:08d}.json"
    mine = [row if isinstance(row, dict) else _tell(*row, tokenizer) for row in rows]
    shares = processes.gather(mine)
    if processes.is_main:
        values = {
            "step": step,
            # JSON has no NaN; the word says which of them it was.
            "loss": loss if math.isfinite(loss) else str(loss),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
            "rows": [row for share in shares for row in share],
        }
        write_text_atomic(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
    return path


def _tell(number: int | None, ids: np.ndarray, mask: np.ndarray, tokenizer: Any) -> dict[str, Any]:
    return {
        "row": number,
        "text": tokenizer.decode(ids.tolist()),
        "token_ids": ids.tolist(),
        "learned": mask.tolist(),
    }
