"""Output files of `inspect` and `ablate`: the JSON object and the plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.storage.atomic import check_output_file, write_bytes_atomic, write_text_atomic
from wegeft_cli.storage.json_files import to_finite

_START = '{\n  "adapter": "'  # as these results begin


def check_plots() -> None:
    """Raise UserError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise UserError(
            "pictures need matplotlib",
            key="--plots",
            hint="pip install 'wegeft-cli[plot]', or leave out --plots",
        )


def check_output(output: Path) -> None:
    """Raise UserError if an output file exists that is not an earlier result."""
    check_output_file(output, _START, "earlier result", "result.json")


def write_json(output: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, with NaN and infinity as null."""
    text = json.dumps(to_finite(dict(result)), indent=2, allow_nan=False)
    write_text_atomic(output, text + "\n")


def save_inspection(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw an inspection into PNG files, which replace files of the same names."""
    from wegeft_cli.analysis.plots import draw_inspection

    return _save(draw_inspection(result), folder)


def save_ablation(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw an ablation into a PNG file."""
    from wegeft_cli.analysis.plots import draw_ablation

    return _save({f"ablation-{result['by']}": draw_ablation(result)}, folder)


def _save(pictures: Mapping[str, bytes], folder: Path) -> list[Path]:
    paths = []
    for name, data in pictures.items():
        paths.append(folder / f"{name}.png")
        write_bytes_atomic(paths[-1], data)
    return paths
