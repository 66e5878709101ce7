"""Adapters and their base become one ordinary model folder, tensor by tensor."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.artifacts.adapter import (
    CARD_NAME,
    PROVENANCE_NAME,
    Adapter,
    AdapterFiles,
)
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.artifacts.run_directory import find_recipe_of, find_run
from wegeft_cli.artifacts.stored_names import has_all_tensors
from wegeft_cli.errors import UserError
from wegeft_cli.merging.in_memory import fold_onto, fold_whole, is_whole
from wegeft_cli.merging.quantized import (
    choose_weights,
    compare_logits,
    describe_base,
    fold_dequantized,
)
from wegeft_cli.merging.streaming import merge_stream
from wegeft_cli.merging.tensor_changes import build_edits
from wegeft_cli.methods.registry import method_of_adapter
from wegeft_cli.methods.wegeft.layer_names import name_as_in_model
from wegeft_cli.methods.wegeft.save_load import check_fingerprint, tell_base
from wegeft_cli.models.device_memory import measure_peak_memory_gib
from wegeft_cli.models.loading import (
    fetch_base_folder,
    load_model,
    load_tokenizer,
    name_quantization,
    quiet_transformers,
)
from wegeft_cli.publishing.hub import HubTarget, publish
from wegeft_cli.publishing.model_card import write_merged_card
from wegeft_cli.recipe.schema import ModelSection, Recipe
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.storage.atomic import (
    atomic_folder,
    check_free_space,
    check_unused_folder,
    write_text_atomic,
)
from wegeft_cli.storage.safetensors_reader import list_tensors
from wegeft_cli.storage.safetensors_writer import parse_size
from wegeft_cli.version import VERSION

_DTYPES = ("float32", "bfloat16", "float16")
_WHOLE_SHARD = "50GB"  # transformers' own default


@dataclass(frozen=True)
class MergeResult:
    """What was written.

    Args:
        output_dir: The model folder.
        num_tensors: Tensors in it.
        num_folded: How many of them the adapters changed.
        seconds: How long it took.
        peak_memory_gib: Highest resident memory of the process, in GiB.
        url: Where it was pushed to; None for nowhere.
        merged_weights: What the change was folded into: the base's own weights (`base`), or what a
            quantized base's stand for (`dequantized`).
        logits_difference: Of an adapter that was trained on a quantized base: how far the merged
            model is from what was trained, see `compare_logits`.
    """

    output_dir: Path
    num_tensors: int
    num_folded: int
    seconds: float
    peak_memory_gib: float
    url: str | None = None
    merged_weights: str = "base"
    logits_difference: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the result as a JSON object, paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class _Form:
    """How the result is to be written.

    Args:
        output: The folder.
        dtype: The type of all floating tensors; None is the base's.
        max_shard_size: Largest size of a file's tensors, as the user wrote it.
        texts: File name -> text of what is written beside the weights.
        trusts: Whether code that comes with the base may run.
    """

    output: Path
    dtype: str | None
    max_shard_size: str | None
    texts: dict[str, str]
    trusts: bool


def merge(
    adapter: str | Path | Sequence[str | Path] | None = None,
    *,
    weights: Sequence[float] = (),
    base: str | None = None,
    revision: str | None = None,
    output: Path | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    dequantize: bool = False,
    push: HubTarget | None = None,
    reporter: Reporter | None = None,
) -> MergeResult:
    """Fold adapters into their base: W' = W + sum of w_i s_i W phi_i psi_i, in float32 or better.

    Each change is that of the base's own weight, so the order of the adapters does not matter.
    Modules that were trained whole take the place of the base's (W + w (trained - W) where the
    weight is not 1). WeGeFT adapters are streamed: the base's shards are copied in blocks of rows
    and the model is never held. One adapter of another PEFT method is merged by PEFT, in memory;
    in memory too a classifier's, whose head comes with it, and what trained the base's own weights.

    Args:
        adapter: An adapter or run folder, or several; None takes the newest finished run.
        weights: One weight w_i for each adapter; empty is 1 for each.
        base: The base's folder or hub id, where it is not as recorded.
        revision: The base's hub revision, where it is not as recorded.
        output: Folder to write, new or empty; None is `merged` in the run's folder.
        dtype: float32, bfloat16 or float16; None keeps the base's.
        max_shard_size: Largest size of a file's tensors (5GB); None keeps the base's files.
        dequantize: Fold into the dequantized weights of the base as it was quantized while
            training, not into its 16-bit weights; one adapter alone, with weight 1.
        push: Where the folder goes on a hub.
        reporter: Where words and progress go.

    Returns:
        What was written.

    Raises:
        UserError: If an adapter is damaged, the base is another one, or the output is not empty.
        MachineError: If the disk is too small or fails.
    """
    reporter = reporter or SilentReporter()
    start = time.perf_counter()
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"got {dtype!r}", key="--dtype", hint=f"one of {', '.join(_DTYPES)}")
    if max_shard_size is not None:
        parse_size(max_shard_size)
    several = adapter if isinstance(adapter, list | tuple) and adapter else [adapter]
    adapters = [Adapter.open(Path(find_run(each))) for each in several]  # type: ignore[arg-type]
    shares = _check_weights(weights, len(adapters))
    output = output or _default_output(adapters[0].folder)
    check_unused_folder(output)
    if push is not None:
        push.check()
    job = _plan_job(adapters, shares, base, revision, dequantize=dequantize)
    texts = {CARD_NAME: write_merged_card(job.folders, shares, job.base, job.revision, output.name)}
    texts[PROVENANCE_NAME] = json.dumps(job.provenance(), indent=2) + "\n"
    form = _Form(output, dtype, max_shard_size, texts, _trusts(job.recipe))
    with tell_base(base, adapters[0].folder):
        written = _merge_whole(job, form, reporter) if job.is_whole else _merge(job, form, reporter)
    if written.quantization is not None:
        provenance = job.provenance() | {
            "base_quantization": written.quantization,
            "merged_weights": written.merged_weights,
            "logits_difference": written.logits_difference,
        }
        write_text_atomic(output / PROVENANCE_NAME, json.dumps(provenance, indent=2) + "\n")
    url = publish(output, push, reporter) if push is not None else None
    return MergeResult(
        output_dir=output,
        num_tensors=written.num_tensors,
        num_folded=written.num_folded,
        seconds=time.perf_counter() - start,
        peak_memory_gib=measure_peak_memory_gib(torch.device("cpu")),
        url=url,
        merged_weights=written.merged_weights,
        logits_difference=written.logits_difference,
    )


@dataclass(frozen=True)
class _Job:
    """What is merged into what.

    Args:
        adapters: The adapters, each opened once.
        shares: One weight for each.
        base: The base's folder or hub id.
        revision: Its hub revision.
        recipe: The recipe of the first adapter's run, where there is one.
        dequantize: Whether dequantized weights were asked for.
        streams: Whether every adapter is WeGeFT's and has no head, so that tensors are streamed.
        is_whole: Whether the adapter brings a head, or is the base's own parameters.
    """

    adapters: Sequence[Adapter]
    shares: Sequence[float]
    base: str
    revision: str | None
    recipe: Recipe | None
    dequantize: bool
    streams: bool
    is_whole: bool

    @property
    def folders(self) -> list[Path]:
        """The adapters' folders."""
        return [adapter.folder for adapter in self.adapters]

    @property
    def weighted(self) -> list[tuple[AdapterFiles, float]]:
        """Each WeGeFT adapter's files with its weight."""
        return [(a.files, share) for a, share in zip(self.adapters, self.shares, strict=True)]

    def provenance(self) -> dict[str, Any]:
        """Return what `wegeft_merge.json` records of the inputs."""
        return {
            "base_model_name_or_path": self.base,
            "revision": self.revision,
            "adapter": str(self.adapters[0].folder),
            "adapters": [
                {"path": str(folder), "weight": w}
                for folder, w in zip(self.folders, self.shares, strict=True)
            ],
            "peft_type": self.adapters[0].peft_type,
            "wegeft_version": VERSION,
        }


@dataclass(frozen=True)
class _Written:
    """What was written: see `MergeResult`; `quantization` is that of the training base."""

    num_tensors: int
    num_folded: int
    quantization: str | None = None
    merged_weights: str = "base"
    logits_difference: dict[str, float] | None = None


def _plan_job(
    adapters: Sequence[Adapter],
    shares: Sequence[float],
    base: str | None,
    revision: str | None,
    *,
    dequantize: bool,
) -> _Job:
    first = adapters[0]
    streams = [
        method_of_adapter(adapter.peft_type).has_generators and not is_whole(adapter)
        for adapter in adapters
    ]
    if not all(streams) and (len(adapters) > 1 or list(shares) != [1.0]):
        foreign = adapters[streams.index(False)]
        raise UserError(
            f"{_name(foreign)} can only be merged alone and with weight 1",
            file=str(foreign.folder),
            hint="several adapters, or a weight, need WeGeFT adapters of a language model",
        )
    if dequantize and is_whole(first):
        raise _only_alone()
    return _Job(
        adapters=adapters,
        shares=shares,
        base=base or first.base,
        revision=revision or (None if base else first.revision),
        recipe=find_recipe_of(first.folder),
        dequantize=dequantize,
        streams=all(streams),
        is_whole=is_whole(first),
    )


def _merge_whole(job: _Job, form: _Form, reporter: Reporter) -> _Written:
    """Merge an adapter with a head, or of the base's own parameters, in memory."""
    adapter = job.adapters[0]
    reporter.note(f"{_name(adapter)} is merged in memory")
    section = ModelSection(
        name_or_path=job.base, revision=job.revision, trust_remote_code=form.trusts
    )
    model, processor, num_folded = fold_whole(section, adapter, form.dtype, reporter)
    return _Written(_write_folder(model, processor, form), num_folded)


def _merge(job: _Job, form: _Form, reporter: Reporter) -> _Written:
    """Merge language models' adapters: streamed where they are WeGeFT's, else in memory."""
    base_dir = _find_base(job.base, job.revision, is_own=job.streams)
    if job.streams:
        _check_bases(base_dir, job.adapters, reporter)
    # Any of them may have been trained on a quantized base, in whatever order they are named.
    recorded = next((a.quantization for a in job.adapters if a.quantization is not None), None)
    if not job.streams and recorded is None and job.recipe is not None:
        recorded = name_quantization(job.recipe.model)  # older PEFT adapters record nothing
    quantization, dequantize = choose_weights(recorded, base_dir, job.dequantize)
    is_alone = list(job.shares) == [1.0]
    if dequantize and not is_alone:
        raise _only_alone()
    trained_base = describe_base(recorded, job.recipe, base_dir)
    if dequantize:
        reporter.note(f"merged into the dequantized weights ({quantization}), in memory")
        model, num_folded = fold_dequantized(trained_base, job.adapters[0])
        num_tensors = _write_model(model, str(base_dir), form)
    elif job.streams:
        num_tensors, num_folded = _merge_own(base_dir, job, form, reporter)
    else:
        reporter.note(f"a {job.adapters[0].peft_type} adapter is merged by PEFT, in memory")
        num_tensors, num_folded = _merge_by_peft(str(base_dir), job.adapters[0], form)
    difference = None
    if quantization is not None and is_alone:
        difference = compare_logits(trained_base, job.adapters[0], form.output, reporter)
    elif quantization is not None:
        reporter.warn(
            f"an adapter was trained on a base quantized as {quantization}; how far the merged "
            "model's logits are from it is measured only where that adapter is merged alone"
        )
    weights = "dequantized" if dequantize else "base"
    return _Written(num_tensors, num_folded, quantization, weights, difference)


def _only_alone() -> UserError:
    return UserError(
        "only one adapter of a language model, with weight 1, is folded into dequantized weights",
        key="--dequantize",
        hint="merge into the 16-bit base: without --dequantize, and with --base where the base's "
        "own files are quantized",
    )


def _check_weights(weights: Sequence[float], num_adapters: int) -> list[float]:
    if weights and len(weights) != num_adapters:
        raise UserError(
            f"{len(weights)} weights for {num_adapters} adapters",
            key="--weight",
            hint="give one for each adapter, in their order",
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise UserError(f"must be a finite number, got {weight}", key="--weight")
    return [float(weight) for weight in weights] or [1.0] * num_adapters


def _name(adapter: Adapter) -> str:
    whose = "a" if adapter.head is None else "a classifier's"
    return f"{whose} {adapter.peft_type} adapter"


def _trusts(recipe: Recipe | None) -> bool:
    return recipe is not None and recipe.model.trust_remote_code


def _find_base(name_or_path: str, revision: str | None, *, is_own: bool) -> Path:
    """Give the base's folder; PEFT merges into a GGUF file's weights too."""
    file = Path(name_or_path).expanduser()
    return file if file.is_file() and not is_own else fetch_base_folder(name_or_path, revision)


def _check_bases(base_dir: Path, adapters: Sequence[Adapter], reporter: Reporter) -> None:
    """Refuse a base without safetensors, or other than the one that an adapter was trained on."""
    if not list_tensors(base_dir):
        message = f"the folder {str(base_dir)!r} holds no safetensors"
        raise UserError(message, key="model.name_or_path")
    manifests = [adapter.files.manifest for adapter in adapters]
    found = None
    if any(manifest.base_fingerprint is not None for manifest in manifests):
        found = fingerprint_base(base_dir)
    for adapter, manifest in zip(adapters, manifests, strict=True):
        hint = f"give the right one with --base (it was {manifest.base_model_name_or_path!r})"
        place = f"the base in {str(base_dir)!r}"
        check_fingerprint(manifest, found, place, adapter.folder, hint=hint, warn=reporter.warn)


def _merge_own(base_dir: Path, job: _Job, form: _Form, reporter: Reporter) -> tuple[int, int]:
    """Merge WeGeFT adapters; return the numbers of all tensors and of the changed ones."""
    stored = list_tensors(base_dir)
    if not all(has_all_tensors(adapter.files, stored) for adapter in job.adapters):
        reporter.note("the base's files name its layers otherwise: merged in memory")
        return _merge_in_memory(base_dir, job, form)
    shapes = {name: info.shape for name, info in stored.items()}
    size = form.max_shard_size
    with reporter.progress("merging", 100) as advance:
        report = merge_stream(
            base_dir,
            form.output,
            build_edits(job.weighted, shapes),
            dtype=form.dtype,
            max_shard_bytes=None if size is None else parse_size(size),
            texts=form.texts,
            on_progress=lambda done, total: advance(round(100 * done / max(total, 1))),
        )
    return report.num_tensors, report.num_edited


def _merge_in_memory(base_dir: Path, job: _Job, form: _Form) -> tuple[int, int]:
    model = load_model(str(base_dir), trust_remote_code=form.trusts)
    renamed = [
        (name_as_in_model(model, files, folder), weight)
        for folder, (files, weight) in zip(job.folders, job.weighted, strict=True)
    ]
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    edits = build_edits(renamed, shapes)
    with torch.no_grad():
        for name, edit in edits.items():
            stored = parameters[name]
            exact = stored.to(torch.promote_types(stored.dtype, torch.float32))
            stored.copy_(edit(exact, 0))
    return _write_model(model, str(base_dir), form), len(edits)


def _merge_by_peft(name_or_path: str, adapter: Adapter, form: _Form) -> tuple[int, int]:
    model = load_model(name_or_path, trust_remote_code=form.trusts)
    merged, num_folded = fold_onto(model, adapter, ModelSection(name_or_path=name_or_path))
    return _write_model(merged, name_or_path, form), num_folded


def _write_model(model: Any, name_or_path: str, form: _Form) -> int:
    """Write a whole model with its base's tokenizer; give the number of its tensors."""
    tokenizer = load_tokenizer(name_or_path, trust_remote_code=form.trusts)
    return _write_folder(model, tokenizer, form)


def _write_folder(model: Any, processor: Any, form: _Form) -> int:
    if form.dtype is not None:
        model = model.to(getattr(torch, form.dtype))
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    check_free_space(form.output, num_bytes, "the merged model")
    with atomic_folder(form.output) as temporary, quiet_transformers():
        model.save_pretrained(str(temporary), max_shard_size=form.max_shard_size or _WHOLE_SHARD)
        processor.save_pretrained(str(temporary))
        for name, text in form.texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        return len(list_tensors(temporary))


def _default_output(adapter_dir: Path) -> Path:
    is_in_run = adapter_dir.name == "adapter"
    return adapter_dir.parent / ("merged" if is_in_run else f"{adapter_dir.name}-merged")
