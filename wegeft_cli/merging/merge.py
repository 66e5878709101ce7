"""Adapters and their base become one ordinary model folder, tensor by tensor."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wegeft_cli.artifacts.adapter import PROVENANCE_NAME, Adapter, is_checkpoint
from wegeft_cli.artifacts.adapter_files import CARD_NAME
from wegeft_cli.artifacts.fingerprint import fingerprint_tensors
from wegeft_cli.artifacts.prompt_record import PROMPT_KEY, PromptRecord
from wegeft_cli.errors import BaseModelError, UserError
from wegeft_cli.inference.form_choice import choose_chat_template
from wegeft_cli.merging.in_memory import (
    OutputFormat,
    fold_onto,
    fold_whole,
    is_whole,
    load_dense,
    write_model,
)
from wegeft_cli.merging.quantized import (
    choose_weights,
    compare_logits,
    describe_base,
    fold_dequantized,
)
from wegeft_cli.merging.streaming import merge_stream
from wegeft_cli.methods.registry import method_of
from wegeft_cli.methods.tensor_changes import TensorChange, sum_changes
from wegeft_cli.methods.trained_base import base_errors, check_fingerprint
from wegeft_cli.models.base_folder import chat_template_files, special_token_files
from wegeft_cli.models.completeness import warn_of_unused
from wegeft_cli.models.device_memory import measure_peak_memory_gib
from wegeft_cli.models.file_names import file_names
from wegeft_cli.models.loading import (
    build_skeleton,
    fetch_base_folder,
    load_tokenizer_of,
    name_quantization,
)
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.publishing.hub import HubTarget, publish
from wegeft_cli.publishing.model_card import write_merged_card
from wegeft_cli.recipe.schema import ModelSection
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.storage.atomic import check_unused_folder, write_text_atomic
from wegeft_cli.storage.safetensors_reader import StoredModel
from wegeft_cli.storage.safetensors_writer import parse_size
from wegeft_cli.version import VERSION

_DTYPES = ("float32", "bfloat16", "float16")


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
        """Return the result as a JSON object, paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


@checked_arguments
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
    chat_template: str = "base",
    push: HubTarget | None = None,
    reporter: Reporter | None = None,
) -> MergeResult:
    """Fold adapters into their base: W' = W + sum of w_i s_i W phi_i psi_i, in float32 or better.

    Each change is that of the base's own weight, so the order of the adapters does not matter.
    Modules that were trained whole take the place of the base's (W + w (trained - W) where the
    weight is not 1). WeGeFT adapters are streamed: the base's shards are copied in blocks of rows
    and the model is never held. So is one adapter of affine edits, unless layers without a bias
    get one. One adapter of another PEFT method is merged by PEFT, in memory; in memory too a
    classifier's, whose head comes with it, and what trained the base's own weights.

    Args:
        adapter: An adapter, run or checkpoint folder, or several; None takes the newest finished
            run. The adapter of a checkpoint is written beside the run's own.
        weights: One weight w_i for each adapter; empty is 1 for each.
        base: The base's folder or hub id, where it is not as recorded.
        revision: The base's hub revision, where it is not as recorded.
        output: Folder to write, new or empty; None is `merged` in the run's folder.
        dtype: float32, bfloat16 or float16; None keeps the base's.
        max_shard_size: Largest size of a file's tensors (5GB); None keeps the base's files.
        dequantize: Fold into the dequantized weights of the base as it was quantized while
            training, not into its 16-bit weights; one adapter alone, with weight 1.
        chat_template: Chat template of the folder: base (the base's own) or trained (the prompt
            form of the training).
        push: Hub repository that receives the folder.
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
    adapters = [Adapter.open(_find(each, base, reporter)) for each in several]
    shares = _check_weights(weights, len(adapters))
    output = output or _default_output(adapters[0].folder)
    check_unused_folder(output)
    if push is not None:
        push.check()
    job = _plan_job(adapters, shares, base, revision, dequantize=dequantize)
    prompt = job.prompt
    with base_errors(base, adapters[0].folder):
        trained_form = choose_chat_template(prompt, chat_template, job.section, reporter.warn)
    texts = {
        CARD_NAME: write_merged_card(
            [each.folder for each in adapters],
            shares,
            job.section.name_or_path,
            job.section.revision,
            output.name,
            prompt,
            holds_form=trained_form is not None,
        ),
        PROVENANCE_NAME: json.dumps(job.provenance(), indent=2) + "\n",
    }
    tokens = job.section.special_tokens
    form = OutputFormat(output, dtype, max_shard_size, texts, trained_form, tokens)
    with base_errors(base, adapters[0].folder):
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
        section: The base.
        dequantize: Whether dequantized weights were asked for.
        has_changes: Whether every adapter's method is streamed.
        must_stream: Whether a base without safetensors is refused, as for every WeGeFT adapter.
    """

    adapters: Sequence[Adapter]
    shares: Sequence[float]
    section: ModelSection
    dequantize: bool
    has_changes: bool
    must_stream: bool

    @property
    def first(self) -> Adapter:
        """The adapter whose run and base count."""
        return self.adapters[0]

    @property
    def is_whole(self) -> bool:
        """Whether the adapter brings a head, or is the base's own parameters."""
        return is_whole(self.first)

    @property
    def is_alone(self) -> bool:
        """Whether one adapter is merged with weight 1."""
        return list(self.shares) == [1.0]

    @property
    def prompt(self) -> PromptRecord | None:
        """The prompt form of the training, if it is known and all adapters have the same."""
        first = self.first.prompt
        return first if all(each.prompt == first for each in self.adapters) else None

    def changes(
        self, shapes: Mapping[str, tuple[int, ...]], model: nn.Module | None = None
    ) -> dict[str, TensorChange] | None:
        """Return the summed changes of all adapters, see `Method.tensor_changes`."""
        found = []
        for adapter, share in zip(self.adapters, self.shares, strict=True):
            changes = method_of(adapter).tensor_changes(adapter, share, shapes, model=model)
            if changes is None:
                return None
            found.append(changes)
        return sum_changes(found)

    def provenance(self) -> dict[str, Any]:
        """Return what `wegeft_merge.json` records of the inputs."""
        return {
            "base_model_name_or_path": self.section.name_or_path,
            "revision": self.section.revision,
            "adapter": str(self.first.folder),
            "adapters": [
                {"path": str(adapter.folder), "weight": w}
                for adapter, w in zip(self.adapters, self.shares, strict=True)
            ],
            "peft_type": self.first.peft_type,
            PROMPT_KEY: None if self.prompt is None else self.prompt.to_json(),
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
    for adapter in adapters:
        method_of(adapter).check_adapter(adapter)
    whole = [adapter for adapter in adapters if is_whole(adapter)]
    foreign = whole or [each for each in adapters if not method_of(each).has_generators]
    if foreign and (len(adapters) > 1 or list(shares) != [1.0]):
        raise UserError(
            f"{_name(foreign[0])} can only be merged alone and with weight 1",
            file=str(foreign[0].folder),
            hint="several adapters, or a weight, need WeGeFT adapters of a language model",
        )
    if dequantize and is_whole(first):
        raise _only_alone()
    section = ModelSection(
        name_or_path=base or first.base,
        revision=revision or (None if base else first.revision),
        trust_remote_code=first.trusts_remote_code,
        special_tokens=_find_special_tokens(adapters),
    )
    has_changes = not whole and all(method_of(adapter).is_streamed for adapter in adapters)
    return _Job(adapters, shares, section, dequantize, has_changes, must_stream=not foreign)


def _find_special_tokens(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Return the special tokens that all adapters were trained with."""
    first = adapters[0].special_tokens
    for adapter in adapters[1:]:
        if adapter.special_tokens != first:
            raise UserError(
                "the adapters were trained with different special tokens: "
                f"{adapter.special_tokens or 'those of the base'}, and the first with "
                f"{first or 'those of the base'}",
                file=str(adapter.folder),
                hint="merge adapters that were trained with the same model.special_tokens",
            )
    return first


def _merge_whole(job: _Job, form: OutputFormat, reporter: Reporter) -> _Written:
    """Merge an adapter with a head, or of the base's own parameters, in memory."""
    reporter.note(f"{_name(job.first)} is merged in memory")
    model, processor, num_folded = fold_whole(job.section, job.first, form.dtype, reporter)
    return _Written(write_model(model, processor, form), num_folded)


def _merge(job: _Job, form: OutputFormat, reporter: Reporter) -> _Written:
    """Merge language models' adapters: streamed where their method is, else in memory."""
    base = job.section
    base_dir = _find_base(base.name_or_path, base.revision, must_be_folder=job.must_stream)
    stored = StoredModel(base_dir)
    is_stored = job.must_stream or (base_dir.is_dir() and bool(stored.tensors))
    section = replace(base, name_or_path=str(base_dir), revision=None)
    job = replace(job, section=section, has_changes=job.has_changes and is_stored)
    if job.has_changes:
        _check_bases(stored, job.adapters, reporter)
    # Any of them may have been trained on a quantized base.
    recorded = next((a.quantization for a in job.adapters if a.quantization is not None), None)
    recipe = job.first.recipe
    if not job.has_changes and recorded is None and recipe is not None:
        recorded = name_quantization(recipe.model)  # older PEFT adapters record nothing
    quantization, dequantize = choose_weights(recorded, base_dir, job.dequantize)
    if dequantize and not job.is_alone:
        raise _only_alone()
    trained_base = describe_base(recorded, recipe, base_dir)
    if dequantize:
        reporter.note(f"merged into the dequantized weights ({quantization}), in memory")
        model, num_folded = fold_dequantized(trained_base, job.first)
        num_tensors = write_model(model, load_tokenizer_of(job.section), form)
    elif job.has_changes:
        num_tensors, num_folded = _merge_changes(stored, job, form, reporter)
    else:
        by_whom = "" if method_of(job.first).needs_package else "by PEFT, "
        reporter.note(f"{_name(job.first)} is merged {by_whom}in memory")
        num_tensors, num_folded = _merge_in_memory(job, form, reporter)
    difference = None
    if quantization is not None and job.is_alone:
        difference = compare_logits(trained_base, job.first, form.folder, reporter)
    elif quantization is not None:
        reporter.warn(
            f"an adapter was trained on a base quantized as {quantization}; how far the merged "
            "model's logits are from it is measured only where that adapter is merged alone"
        )
    weights = "dequantized" if dequantize else "base"
    return _Written(num_tensors, num_folded, quantization, weights, difference)


def _find(path: Any, base: str | None, reporter: Reporter) -> str | Path | None:
    """Return an adapter's place; the adapter of a checkpoint is written first."""
    if path is None or not is_checkpoint(Path(path)):
        return path
    # Imported here, so that another merge does not load all that training needs.
    from wegeft_cli.runs.checkpoint_adapter import write_checkpoint_adapter

    return write_checkpoint_adapter(Path(path), reporter, base=base)


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


def _find_base(name_or_path: str, revision: str | None, *, must_be_folder: bool) -> Path:
    """Return the base's folder; PEFT merges into a GGUF file's weights too."""
    file = Path(name_or_path).expanduser()
    if file.is_file() and not must_be_folder:
        return file
    return fetch_base_folder(name_or_path, revision)


def _check_bases(stored: StoredModel, adapters: Sequence[Adapter], reporter: Reporter) -> None:
    """Refuse a base without safetensors, or other than the one that an adapter was trained on."""
    place = f"{str(stored.folder)!r}"
    if not stored.tensors:
        message = f"the folder {place} holds no safetensors"
        raise BaseModelError(message)
    found = None
    if any(adapter.base_fingerprint is not None for adapter in adapters):
        found = fingerprint_tensors(stored.tensors)
    for adapter in adapters:
        hint = f"give the right one with --base (it was {adapter.base!r})"
        base = f"the base in {place}"
        check_fingerprint(adapter, found, base, adapter.folder, hint=hint, warn=reporter.warn)


def _merge_changes(
    stored: StoredModel, job: _Job, form: OutputFormat, reporter: Reporter
) -> tuple[int, int]:
    """Merge by tensor changes; return the numbers of all tensors and of the changed ones."""
    shapes = {name: info.shape for name, info in stored.tensors.items()}
    changes = job.changes(shapes)
    if changes is None:
        changes = _find_changes(job, shapes)
    if changes is None:
        reporter.note(
            "the base's files lack tensors that the merge changes, by these names: merged in memory"
        )
        return _merge_in_memory(job, form, reporter)
    size = form.max_shard_size
    texts: dict[str, str | None] = dict(form.texts)
    if form.chat_template is not None:
        texts |= chat_template_files(stored.folder, form.chat_template)
    if form.special_tokens:
        tokenizer = load_tokenizer_of(job.section)
        texts |= special_token_files(stored.folder, tokenizer, form.special_tokens, texts)
    with reporter.progress("merging", 100) as advance:
        report = merge_stream(
            stored,
            form.folder,
            changes,
            dtype=form.dtype,
            max_shard_bytes=None if size is None else parse_size(size),
            texts=texts,
            on_progress=lambda done, total: advance(round(100 * done / max(total, 1))),
        )
    return report.num_tensors, report.num_edited


def _find_changes(
    job: _Job, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorChange] | None:
    """Return the changes of an adapter that records no names of the files, by the model's names.

    The model is built without weights. None where its files hold a tensor in another form.
    """
    _, skeleton = build_skeleton(job.section)
    names = file_names(skeleton).match(shapes)
    own = {**shapes, **{name: shapes[file] for name, file in names.items()}}
    try:
        changes = job.changes(own, skeleton)
    except KeyError:
        return None
    return None if changes is None else {names.get(n, n): each for n, each in changes.items()}


def _merge_in_memory(job: _Job, form: OutputFormat, reporter: Reporter) -> tuple[int, int]:
    """Merge into the loaded base; return the numbers of all tensors and of the changed ones."""
    model, tokenizer = load_dense(job.section)
    warn_of_unused(model, reporter.warn)  # the merged model is without them
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    changes = job.changes(shapes, model) if job.has_changes else None
    if changes is None:  # the method itself changes the model, which may get new tensors
        model, num_folded = fold_onto(model, job.first, job.section)
        return write_model(model, tokenizer, form), num_folded
    with torch.no_grad():
        for name, change in changes.items():
            stored = parameters[name]
            exact = stored.to(torch.promote_types(stored.dtype, torch.float32))
            stored.copy_(change(exact, 0))
    return write_model(model, tokenizer, form), len(changes)


def _default_output(adapter_dir: Path) -> Path:
    is_in_run = adapter_dir.name == "adapter"
    return adapter_dir.parent / ("merged" if is_in_run else f"{adapter_dir.name}-merged")
