"""The rows of skipped steps, written for inspection: `skipped/step-<8 digits>.json`."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.reporter import Reporter
from wegeft_cli.storage.atomic import write_text_atomic
from wegeft_cli.training.callbacks import Callback
from wegeft_cli.training.trainer import Trainer


class SkippedStepsCallback(Callback):
    """Writes the rows of each step whose loss or gradient was not finite, and warns."""

    def __init__(self, directory: RunDirectory, tokenizer: Any, reporter: Reporter) -> None:
        self._directory = directory
        self._tokenizer = tokenizer
        self._reporter = reporter

    def on_skipped_step(self, trainer: Trainer, loss: float, grad_norm: float) -> None:
        """Write the rows of all processes."""
        path = self._directory.skipped_path(trainer.step)
        rows = trainer.source.examples_at(trainer.step - 1)
        mine = [row if isinstance(row, dict) else self._describe(*row) for row in rows]
        parts = trainer.processes.gather(mine)
        if trainer.processes.is_main:
            values = {
                "step": trainer.step,
                # JSON has no NaN and no infinity; the text keeps which of them it was.
                "loss": loss if math.isfinite(loss) else str(loss),
                "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
                "rows": [row for part in parts for row in part],
            }
            write_text_atomic(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
        self._reporter.warn(
            f"step {trainer.step} was skipped: its loss is {loss}, its gradient norm {grad_norm}; "
            f"its rows are in {path}"
        )

    def _describe(self, number: int | None, ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        return {
            "row": number,
            "text": self._tokenizer.decode(ids.tolist()),
            "token_ids": ids.tolist(),
            "learned": mask.tolist(),
        }
