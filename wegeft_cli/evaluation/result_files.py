"""The files of an evaluation: result, samples, third-party formats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import SAMPLES_END, SCORES_END, RunDirectory
from wegeft_cli.evaluation.response_cache import remove_caches
from wegeft_cli.evaluation.runner import Evaluation
from wegeft_cli.evaluation.score import Score
from wegeft_cli.storage.atomic import check_output_file, write_text_atomic

_RESULT_START = '{\n  "results": ['  # as json.dumps(indent=2) begins it
_SAMPLES_START = '{"model": "'


def check_outputs(output: Path) -> None:
    """Raise UserError if --output or its samples file cannot be written or is no earlier result."""
    check_output_file(output, _RESULT_START, "earlier result", "scores.json")
    check_output_file(beside(output), _SAMPLES_START, "earlier result", "scores.json")


def beside(output: Path) -> Path:
    """Return the samples file of a result file."""
    return output.with_name(f"{output.stem}{SAMPLES_END}")


def choose_samples_path(
    path: str | Path | None, output: Path | None, names: Sequence[str], protocol: str
) -> Path:
    """Return the path of the samples: beside --output, in the run's folder, or under runs/."""
    if output is not None:
        return beside(output)
    name = "-".join([*names, protocol])
    folder = Path(path) if path is not None else Path("runs")
    run = RunDirectory.containing(folder) or RunDirectory(Path("runs"))
    return run.eval_dir / f"{folder.name}-{name}{SAMPLES_END}"


def choose_scores_path(samples_path: Path) -> Path:
    """Return the result file of a samples file."""
    return samples_path.with_name(samples_path.name.replace(SAMPLES_END, SCORES_END))


def response_cache_dir(samples_path: Path) -> Path:
    """Return the folder of the response caches, which exists until the samples are written."""
    return samples_path.with_suffix(".partial")


@dataclass(frozen=True)
class ResultFiles:
    """The files of one evaluation.

    Args:
        samples_path: One line per answer.
        output: The JSON object. Default: beside the samples, where model cards find it.
        writes_samples: False writes neither samples nor a default output.
    """

    samples_path: Path
    output: Path | None
    writes_samples: bool = True

    def write(self, evaluation: Evaluation, result: dict[str, Any]) -> None:
        """Write all files and remove the response caches.

        Each entry of `results` whose score has third-party files gets a list `files`.
        """
        output = self.output
        if self.writes_samples:
            lines = [
                json.dumps(line, ensure_ascii=False) + "\n" for line in _sample_lines(evaluation)
            ]
            write_text_atomic(self.samples_path, "".join(lines))
            output = output or choose_scores_path(self.samples_path)
        self._write_third_party(evaluation.scores, result["results"], "")
        if evaluation.base_scores is not None:
            self._write_third_party(evaluation.base_scores, result["base_results"], "base-")
        if output is not None:
            write_text_atomic(output, json.dumps(result, indent=2, allow_nan=False) + "\n")
        remove_caches(response_cache_dir(self.samples_path))

    def _write_third_party(
        self, scores: Sequence[Score], rows: Sequence[dict[str, Any]], prefix: str
    ) -> None:
        stem = self.samples_path.stem.removesuffix("-samples")
        for score, row in zip(scores, rows, strict=True):
            paths = []
            for end, content in score.files.items():
                path = self.samples_path.with_name(f"{stem}-{prefix}{end}")
                write_text_atomic(path, content)
                paths.append(str(path))
            if paths:
                row["files"] = paths


def _sample_lines(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield the lines of a samples file: model, benchmark, protocol, and the record of a row."""
    for model, scores in (("base", evaluation.base_scores or ()), ("target", evaluation.scores)):
        for score in scores:
            for sample in score.samples:
                yield {"model": model, "task": score.task, "protocol": score.protocol, **sample}
