"""Export of an adapter as its exact LoRA equivalent, and of an adapter or a model as GGUF."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from wegeft_cli.errors import UserError
from wegeft_cli.exporting.lora import TwinPlan, plan_twin
from wegeft_cli.exporting.parity import PROMPTS, measure_parity
from wegeft_cli.methods.registry import require_generators
from wegeft_cli.methods.wegeft.lora_equivalent import Twin
from wegeft_cli.methods.wegeft.save_load import base_errors, check_base
from wegeft_cli.models.device_memory import measure_peak_memory_gib
from wegeft_cli.models.loading import fetch_base_folder
from wegeft_cli.publishing.hub import HubTarget, publish
from wegeft_cli.publishing.model_card import write_twin_card
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.storage.atomic import atomic_folder, check_free_space, check_unused_folder
from wegeft_cli.storage.safetensors_reader import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    list_tensors,
    tensor_bytes,
)
from wegeft_cli.storage.safetensors_writer import write_tensors
from wegeft_cli.version import VERSION

PARITY_NAME = "parity.json"
FORMATS = ("lora", "gguf")

_PREFIX = "base_model.model."
_NAMES_OF = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class ExportOptions:
    """How an export is to be written.

    Args:
        dtype: float32, bfloat16 or float16 (a model as GGUF: q8_0 too); None is float32 for an
            adapter, and as stored for a model.
        pad_rank: Fill the rank up with zeros to the next one that vLLM makes room for.
        pad_siblings: Give zeros to what servers stack with an adapted layer (q, k, v; gate, up).
        prompts: What the parity report asks; empty takes its own.
        parity: Whether to measure parity, for which the base is loaded.
        push: Hub repository that receives the result.
    """

    dtype: str | None = None
    pad_rank: bool = False
    pad_siblings: bool = False
    prompts: Sequence[str] = ()
    parity: bool = True
    push: HubTarget | None = None


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Args:
        output_dir: The folder.
        format: lora or gguf.
        kind: adapter or model.
        num_tensors: Tensors in the file.
        num_bytes: Their bytes.
        seconds: How long it took, the parity report included.
        peak_memory_gib: Highest resident memory of the process, in GiB.
        rank: The pairs' rank; None for a model.
        parity: The report, as parity.json holds it; None where there is none.
        url: Where it was pushed to; None for nowhere.
    """

    output_dir: Path
    format: str
    kind: str
    num_tensors: int
    num_bytes: int
    seconds: float = 0.0
    peak_memory_gib: float = 0.0
    rank: int | None = None
    parity: dict[str, Any] | None = field(default=None)
    url: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the result as a JSON object, paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def export(
    target: str | Path | None = None,
    *,
    format: str,
    output: Path | None = None,
    base: str | None = None,
    revision: str | None = None,
    options: ExportOptions | None = None,
    reporter: Reporter | None = None,
) -> ExportResult:
    """Write an adapter, or a model, in a form that other tools read.

    lora: the exact LoRA equivalent, `B = s W phi, A = psi` with scaling 1 (output side `B = s phi,
    A = psi W`), which stock PEFT, vLLM and SGLang read. gguf: the same pairs in llama.cpp's format,
    or a whole model if the target is a model folder.

    Args:
        target: An adapter or run folder, or (gguf) a model folder; None takes the newest finished
            run.
        output: Folder to write, new or empty; None is one named after the format beside the
            adapter.

    Raises:
        UserError: If the target is damaged or cannot be written so, the base is another one, or
            the output is not empty.
        MachineError: If the disk is too small or fails.
    """
    reporter, options = reporter or SilentReporter(), options or ExportOptions()
    start = time.perf_counter()
    if format not in FORMATS:
        raise UserError(f"got {format!r}", key="--format", hint=f"one of {', '.join(FORMATS)}")
    path = Path(target) if target is not None else None
    is_model = path is not None and ((path / "config.json").is_file() or not path.exists())
    allowed = [*DTYPE_NAMES, *(["q8_0"] if is_model and format == "gguf" else [])]
    if options.dtype is not None and options.dtype not in allowed:
        message = f"got {options.dtype!r}"
        raise UserError(message, key="--dtype", hint=f"one of {', '.join(allowed)}")
    if options.push is not None:
        options.push.check()
    if is_model:
        assert target is not None
        result = _export_model(str(target), format, output, revision, options, reporter)
    else:
        adapter = Adapter.open(target)
        if adapter.head is not None:
            raise UserError(
                "this is a classifier's adapter, whose head no other tool reads beside a LoRA pair",
                file=str(adapter.folder),
                hint="write the whole model: `wegeft merge`",
            )
        output = output or _default_output(adapter.folder, format)
        result = _export_adapter(adapter, format, output, base, revision, options, reporter)
    url = publish(result.output_dir, options.push, reporter) if options.push else None
    return replace(
        result,
        seconds=time.perf_counter() - start,
        peak_memory_gib=measure_peak_memory_gib(torch.device("cpu")),
        url=url,
    )


def _export_model(
    target: str,
    format: str,
    output: Path | None,
    revision: str | None,
    options: ExportOptions,
    reporter: Reporter,
) -> ExportResult:
    if format != "gguf":
        raise UserError(
            f"{target!r} is a model: only an adapter has a LoRA equivalent",
            key="--format",
            hint="give the adapter or the run, or --format gguf",
        )
    from wegeft_cli.exporting.gguf_model import write_model_gguf

    model_dir = fetch_base_folder(target, revision)
    output = output or model_dir.resolve().with_name(f"{model_dir.resolve().name}-gguf")
    check_unused_folder(output)
    infos = list_tensors(model_dir)
    if not infos:
        raise UserError("this folder holds no safetensors", file=str(model_dir))
    check_free_space(output, sum(info.num_bytes for info in infos.values()), "the GGUF file")
    with atomic_folder(output) as folder, reporter.progress("exporting", len(infos)) as advance:
        num_tensors = write_model_gguf(
            folder / "model.gguf", model_dir, infos, dtype=options.dtype, on_tensor=advance
        )
        num_bytes = (folder / "model.gguf").stat().st_size
    return ExportResult(output, format, "model", num_tensors, num_bytes)


def _export_adapter(
    adapter: Adapter,
    format: str,
    output: Path,
    base: str | None,
    revision: str | None,
    options: ExportOptions,
    reporter: Reporter,
) -> ExportResult:
    check_unused_folder(output)
    hint = "merge it and export the model" if format == "gguf" else "PEFT reads it as it is"
    require_generators(adapter, "only a WeGeFT adapter has an exact LoRA equivalent", hint=hint)
    files = adapter.files
    if (quantized := files.manifest.base_quantization) is not None:
        reporter.warn(
            f"this adapter was trained on a base quantized as {quantized}; parity is measured on "
            "the 16-bit base, and served on that it answers otherwise than it was trained "
            "(`wegeft merge` measures by how much)"
        )
    name_or_path = base or adapter.base
    revision = revision or (None if base else adapter.revision)
    with base_errors(base, adapter.folder):
        base_dir = fetch_base_folder(name_or_path, revision)
        check_base(files.manifest, base_dir, adapter.folder, warn=reporter.warn)
        plan = plan_twin(
            files,
            base_dir,
            adapter.folder,
            pad_rank=options.pad_rank,
            pad_siblings=options.pad_siblings,
            trust_remote_code=adapter.trusts_remote_code,
        )
    _check_readers(plan, format, adapter.folder, reporter)
    export = _PairExport(adapter, base_dir, name_or_path, revision, plan, options, reporter)
    check_free_space(output, export.num_bytes, "the export")
    with atomic_folder(output) as folder:
        return replace(
            export.write_gguf(folder) if format == "gguf" else export.write_peft(folder, output),
            output_dir=output,
        )


def _check_readers(plan: TwinPlan, format: str, adapter_dir: Path, reporter: Reporter) -> None:
    """Refuse for llama.cpp, and warn for servers, what is more than LoRA pairs."""
    if plan.is_pairs_alone:
        return
    if format == "gguf":
        raise UserError(
            "llama.cpp reads LoRA pairs alone, and this adapter also changes biases or whole "
            "modules",
            file=str(adapter_dir),
            hint="wegeft merge, then wegeft export MERGED --format gguf",
        )
    reporter.warn("it holds more than LoRA pairs: PEFT reads it, vLLM and SGLang do not")


@dataclass(frozen=True)
class _PairExport:
    """Writes the LoRA pairs of one adapter into a folder, in either format."""

    adapter: Adapter
    base_dir: Path
    name_or_path: str
    revision: str | None
    plan: TwinPlan
    options: ExportOptions
    reporter: Reporter

    @property
    def dtype(self) -> str:
        """Name of the type in a safetensors file."""
        return DTYPE_NAMES[self.options.dtype or "float32"]

    @property
    def num_bytes(self) -> int:
        """Bytes of the pairs."""
        return sum(tensor_bytes(self.dtype, shape) for shape in _plan_tensors(self.plan).values())

    def write_gguf(self, folder: Path) -> ExportResult:
        """Write `adapter.gguf`."""
        from wegeft_cli.exporting.gguf_adapter import write_adapter_gguf

        with self.reporter.progress("exporting", len(self.plan.members)) as advance:
            num_tensors = write_adapter_gguf(
                folder / "adapter.gguf",
                self.plan,
                self.base_dir,
                dtype=self.options.dtype or "float32",
                base_name=self.name_or_path,
                on_layer=advance,
            )
        num_bytes = (folder / "adapter.gguf").stat().st_size
        rank = self.plan.rank
        return ExportResult(folder, "gguf", "adapter", num_tensors, num_bytes, rank=rank)

    def write_peft(self, folder: Path, output: Path) -> ExportResult:
        """Write PEFT's two files, the parity report and the card."""
        plan = self.plan
        fingerprint = plan.files.manifest.base_fingerprint or "unknown"
        metadata = {"format": "pt", "wegeft_version": VERSION, "base_fingerprint": fingerprint}
        saved = {f"{_PREFIX}{name}": tensor for name, tensor in plan.files.saved_modules.items()}
        shapes = _plan_tensors(plan)
        layout = {name: (self.dtype, shape) for name, shape in shapes.items()}
        layout |= {name: (_NAMES_OF[t.dtype], tuple(t.shape)) for name, t in saved.items()}
        with self.reporter.progress("exporting", len(layout)) as advance:
            maker = _Maker(plan, saved, advance)
            num_bytes = write_tensors(folder / WEIGHTS_NAME, layout, maker, metadata)
        config = _make_config(plan, self.name_or_path, self.revision)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        parity = self._measure_parity(folder)
        (folder / PARITY_NAME).write_text(json.dumps(parity, indent=2) + "\n", encoding="utf-8")
        card = write_twin_card(
            self.adapter.folder,
            self.name_or_path,
            self.revision,
            title=output.resolve().name,
            rank=plan.rank,
            num_modules=len(plan.members),
            num_parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
            for_servers=plan.is_pairs_alone,
            parity=parity,
        )
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        return ExportResult(
            folder, "lora", "adapter", len(layout), num_bytes, rank=plan.rank, parity=parity
        )

    def _measure_parity(self, folder: Path) -> dict[str, Any]:
        if not self.options.parity:
            return {"is_measured": False, "reason": "switched off (--no-parity)"}
        self.reporter.note("measuring parity: the base is loaded")
        parity = measure_parity(
            self.base_dir,
            self.adapter.folder,
            folder,
            prompts=self.options.prompts or PROMPTS,
            trust_remote_code=self.adapter.trusts_remote_code,
        )
        if not parity["is_measured"]:
            self.reporter.warn(f"parity is not measured: {parity['reason']}")
        return parity


class _Maker:
    """Compute the tensors of the LoRA pairs by name; each layer's pair is computed once.

    Args:
        plan: The plan.
        saved: Modules that were trained whole, by their tensors' names in the file.
        advance: Callback with the number of tensors done.
    """

    def __init__(
        self, plan: TwinPlan, saved: Mapping[str, Tensor], advance: Callable[[int], None]
    ) -> None:
        self.plan = plan
        self.saved = saved
        self.advance = advance
        self.num_done = 0
        self.name, self.twin = "", Twin(torch.empty(0), torch.empty(0))

    def __call__(self, full_name: str) -> Tensor:
        self.num_done += 1
        self.advance(self.num_done)
        if full_name in self.saved:
            return self.saved[full_name]
        name, _, part = full_name.removeprefix(_PREFIX).rpartition(".lora_")
        if name != self.name:
            self.name, self.twin = name, self.plan.make(name)
        if part == "A.weight":
            return self.twin.A
        if part == "B.weight":
            return self.twin.B
        return self.twin.bias if self.twin.bias is not None else torch.zeros(len(self.twin.B))


def _plan_tensors(plan: TwinPlan) -> dict[str, tuple[int, ...]]:
    """Give name and shape of every tensor of the pairs, as PEFT calls them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in plan.members:
        target = plan.linears[name]
        shapes[f"{_PREFIX}{name}.lora_A.weight"] = (plan.rank, target.d_in)
        shapes[f"{_PREFIX}{name}.lora_B.weight"] = (target.d_out, plan.rank)
        if plan.biased:  # PEFT's switch is one for all layers
            shapes[f"{_PREFIX}{name}.lora_B.bias"] = (target.d_out,)
    return shapes


def _make_config(plan: TwinPlan, name_or_path: str, revision: str | None) -> dict[str, Any]:
    """Give the adapter's config: all that readers ask for, everything else at PEFT's defaults."""
    manifest = plan.files.manifest
    return {
        "peft_type": "LORA",
        "task_type": manifest.task_type,
        "base_model_name_or_path": name_or_path,
        "revision": revision,
        "inference_mode": True,
        "r": plan.rank,
        "lora_alpha": plan.rank,
        "lora_dropout": 0.0,
        "target_modules": plan.find_targets(),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": plan.is_transposed,
        "modules_to_save": list(manifest.modules_to_save) or None,
        **({"lora_bias": True} if plan.biased else {}),
    }


def _default_output(adapter_dir: Path, format: str) -> Path:
    is_in_run = adapter_dir.name == "adapter"
    return adapter_dir.parent / (format if is_in_run else f"{adapter_dir.name}-{format}")
