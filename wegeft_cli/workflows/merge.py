"""An adapter and its base become one ordinary model folder, tensor by tensor."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.checkpoints.adapter import (
    load_adapter_files,
    read_adapter_type,
    resolve_adapter_dir,
)
from wegeft_cli.checkpoints.files import (
    check_unused_folder,
    write_text_atomic,
)
from wegeft_cli.checkpoints.manifest import PEFT_TYPE
from wegeft_cli.checkpoints.shards import list_tensors
from wegeft_cli.checkpoints.stream import merge_stream
from wegeft_cli.errors import UserError
from wegeft_cli.generators.fold import fold_generators
from wegeft_cli.generators.inject import remove_generators
from wegeft_cli.models.base import (
    fetch_base_folder,
    load_model,
)
from wegeft_cli.training.meters import measure_peak_memory_gib
from wegeft_cli.version import VERSION
from wegeft_cli.workflows.adapters import check_base, load_adapter, tell_base
from wegeft_cli.workflows.edits import build_edits, has_all_tensors
from wegeft_cli.workflows.quantised_merge import (
    choose_weights,
    compare_logits,
    describe_base,
    merge_dequantised,
    write_model,
)
from wegeft_cli.workflows.reporter import Reporter, SilentReporter
from wegeft_cli.workflows.run_folder import find_recipe_of, find_run

PROVENANCE_NAME = "wegeft_merge.json"

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeResult:
    """What was written.

    Args:
        output_dir: The model folder.
        num_tensors: Tensors in it.
        num_folded: How many of them the adapter changed.
        seconds: How long it took.
        peak_memory_gib: Highest resident memory of the process, in GiB.
        merged_weights: What the change was folded into: the base's own weights (`base`), or what a
            quantised base's stand for (`dequantized`).
        logits_difference: Of an adapter that was trained on a quantised base: how far the merged
            model is from what was trained, see `compare_logits`.
    """

    output_dir: Path
    num_tensors: int
    num_folded: int
    seconds: float
    peak_memory_gib: float
    merged_weights: str = "base"
    logits_difference: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the result as a JSON object, paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def merge(
    adapter: str | Path | None = None,
    *,
    base: str | None = None,
    output: Path | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    reporter: Reporter | None = None,
) -> MergeResult:
    """Fold an adapter into its base: W' = W (I + s phi psi), in float32 or better.

    Modules that were trained whole take the place of the base's. A WeGeFT adapter is streamed: the
    base's shards are copied in blocks of rows and the model is never held. An adapter of another
    PEFT method is merged by PEFT, in memory.

    Args:
        adapter: An adapter or run folder; None takes the newest finished run under runs/.
        base: The base's folder or hub id, where it is not as recorded.
        output: Folder to write, new or empty; None is `merged` in the run's folder.
        dtype: float32, bfloat16 or float16; None keeps the base's.
        dequantize: Fold into the dequantised weights of the base as it was quantised while
            training, not into its 16-bit weights.
        reporter: Where words and progress go.

    Returns:
        What was written.

    Raises:
        UserError: If the adapter is damaged, the base is another one, or the output is not empty.
        MachineError: If the disk is too small or fails.
    """
    reporter = reporter or SilentReporter()
    start = time.perf_counter()
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"got {dtype!r}", key="--dtype", hint=f"one of {', '.join(_DTYPES)}")
    adapter_dir = resolve_adapter_dir(find_run(adapter))
    output = output or _default_output(adapter_dir)
    check_unused_folder(output)
    kind, recorded_base, revision = read_adapter_type(adapter_dir)
    recipe = find_recipe_of(adapter_dir)
    name_or_path = base or recorded_base
    if base is not None:
        revision = None
    trusts = recipe is not None and recipe.model.trust_remote_code
    quantization: str | None = None
    if kind != PEFT_TYPE:
        if dequantize:
            raise UserError(f"a {kind} adapter is merged by PEFT alone", key="--dequantize")
        reporter.note(f"a {kind} adapter is merged by PEFT, in memory")
        with tell_base(base, adapter_dir):
            num_tensors, num_folded = _merge_by_peft(
                name_or_path, revision, adapter_dir, output, dtype, trusts
            )
    else:
        files = load_adapter_files(adapter_dir)
        with tell_base(base, adapter_dir):
            base_dir = fetch_base_folder(name_or_path, revision)
            stored = list_tensors(base_dir)
            if not stored:
                raise UserError(
                    f"the folder {str(base_dir)!r} holds no safetensors", key="model.name_or_path"
                )
        check_base(files.manifest, base_dir, adapter_dir, warn=reporter.warn)
        quantization, dequantize = choose_weights(files.manifest, base_dir, dequantize)
        if dequantize:
            reporter.note(f"merged into the dequantised weights ({quantization}), in memory")
            trained_base = describe_base(files.manifest, recipe, base_dir)
            num_tensors, num_folded = merge_dequantised(trained_base, adapter_dir, output, dtype)
        elif has_all_tensors(files, stored):
            with reporter.progress("merging", 100) as advance:
                report = merge_stream(
                    base_dir,
                    output,
                    build_edits(files, {name: info.shape for name, info in stored.items()}),
                    dtype=dtype,
                    on_progress=lambda done, total: advance(round(100 * done / max(total, 1))),
                )
            num_tensors, num_folded = report.num_tensors, report.num_edited
        else:
            reporter.note("the base's files name its layers otherwise: merged in memory")
            num_tensors, num_folded = _merge_in_memory(base_dir, adapter_dir, output, dtype, trusts)
    merged_weights = "dequantized" if dequantize else "base"
    difference = None
    if quantization is not None:
        trained_base = describe_base(files.manifest, recipe, base_dir)
        difference = compare_logits(trained_base, adapter_dir, output, reporter)
    provenance = {
        "base_model_name_or_path": name_or_path,
        "revision": revision,
        "adapter": str(adapter_dir),
        "peft_type": kind,
        "wegeft_version": VERSION,
        "base_quantization": quantization,
        "merged_weights": merged_weights,
        "logits_difference": difference,
    }
    write_text_atomic(output / PROVENANCE_NAME, json.dumps(provenance, indent=2) + "\n")
    return MergeResult(
        output_dir=output,
        num_tensors=num_tensors,
        num_folded=num_folded,
        seconds=time.perf_counter() - start,
        peak_memory_gib=measure_peak_memory_gib(torch.device("cpu")),
        merged_weights=merged_weights,
        logits_difference=difference,
    )


def _merge_in_memory(
    base_dir: Path, adapter_dir: Path, output: Path, dtype: str | None, trusts: bool
) -> tuple[int, int]:
    model = load_model(str(base_dir), trust_remote_code=trusts)
    load_adapter(model, adapter_dir)
    num_folded = fold_generators(model, keep_base=False)
    remove_generators(model)
    return write_model(model, str(base_dir), None, output, dtype, trusts), num_folded


def _merge_by_peft(
    name_or_path: str,
    revision: str | None,
    adapter_dir: Path,
    output: Path,
    dtype: str | None,
    trusts: bool,
) -> tuple[int, int]:
    from wegeft_cli.interop.baselines import load_peft, merge_peft

    model = load_model(name_or_path, revision=revision, trust_remote_code=trusts)
    merged, num_folded = merge_peft(load_peft(model, adapter_dir))
    return write_model(merged, name_or_path, revision, output, dtype, trusts), num_folded


def _default_output(adapter_dir: Path) -> Path:
    is_in_run = adapter_dir.name == "adapter"
    return adapter_dir.parent / ("merged" if is_in_run else f"{adapter_dir.name}-merged")
