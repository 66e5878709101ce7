"""Export of an adapter as its exact LoRA equivalent, and of an adapter or a model as GGUF."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from wegeft_cli.artifacts.adapter import Adapter, base_record_to_json, find_prompt_record
from wegeft_cli.artifacts.adapter_files import BASE_NAME, CARD_NAME
from wegeft_cli.errors import UserError
from wegeft_cli.exporting.parity import PROMPTS, measure_parity
from wegeft_cli.inference.form_choice import choose_chat_template
from wegeft_cli.methods.lora_equivalent.files import (
    count_bytes,
    plan_tensors,
    write_lora_files,
)
from wegeft_cli.methods.lora_equivalent.plan import LoraEquivalent, plan_lora_equivalent
from wegeft_cli.methods.lora_equivalent.readers import check_peft, prepare_for_vllm
from wegeft_cli.methods.registry import method_of, refuse_adapter
from wegeft_cli.methods.trained_base import base_errors
from wegeft_cli.models.base_folder import (
    CHAT_TEMPLATE_NAME,
    GENERATION_CONFIG_NAME,
    special_token_files,
)
from wegeft_cli.models.device_memory import measure_peak_memory_gib
from wegeft_cli.models.loading import fetch_base_folder, load_tokenizer_of, quiet_transformers
from wegeft_cli.publishing.hub import HubTarget, publish
from wegeft_cli.publishing.model_card import write_lora_card
from wegeft_cli.recipe.schema import ModelSection
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.storage.atomic import atomic_folder, check_free_space, check_unused_folder
from wegeft_cli.storage.safetensors_reader import DTYPE_NAMES, list_tensors

PARITY_NAME = "parity.json"
FORMATS = ("lora", "gguf")
SERVERS = ("vllm",)


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
        chat_template: base, or trained, which writes the prompt form of the training as the chat
            template.
        server: `vllm` writes what vLLM reads, and refuses what it does not. Default: what PEFT
            reads.
    """

    dtype: str | None = None
    pad_rank: bool = False
    pad_siblings: bool = False
    prompts: Sequence[str] = ()
    parity: bool = True
    push: HubTarget | None = None
    server: str | None = None
    chat_template: str = "base"


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
        """Return the result as a JSON object, paths as text."""
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

    lora: the exact LoRA equivalent with scaling 1, which stock PEFT, vLLM and SGLang read: of
    WeGeFT `B = s W phi, A = psi` (output side `B = s phi, A = psi W`), of 1LoRA `B = v, A = 1^T`,
    of tied LoRA `B = s diag(v) B, A = diag(u) A`. gguf: the same pairs in llama.cpp's format, or a
    whole model if the target is a model folder.

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
    if options.server is not None and (format != "lora" or options.server not in SERVERS):
        hint = f"with --format lora, one of {', '.join(SERVERS)}"
        raise UserError(f"got {options.server!r}", key="--for", hint=hint)
    path = Path(target) if target is not None else None
    # Only GGUF is made of models, so only there can a missing path be a model on a hub.
    is_on_hub = path is not None and format == "gguf" and not path.exists()
    is_model = is_on_hub or (path is not None and (path / "config.json").is_file())
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
    trained_form = choose_chat_template(
        find_prompt_record(model_dir), options.chat_template, ModelSection(str(model_dir)),
        reporter.warn,
    )  # fmt: skip
    with atomic_folder(output) as folder, reporter.progress("exporting", len(infos)) as advance:
        num_tensors = write_model_gguf(
            folder / "model.gguf",
            model_dir,
            infos,
            dtype=options.dtype,
            chat_template=trained_form,
            on_tensor=advance,
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
    method = method_of(adapter)
    if not method.has_lora_equivalent(adapter):
        is_readable = format == "lora" and not method.needs_package
        hint = "PEFT reads it as it is" if is_readable else "merge it and export the model"
        reason = "only WeGeFT, 1LoRA and tied LoRA have an exact LoRA equivalent"
        refuse_adapter(adapter, reason, hint=hint)
    if (quantized := adapter.quantization) is not None:
        reporter.warn(
            f"this adapter was trained on a base quantized as {quantized}; parity is measured on "
            "the 16-bit base, and served on that it answers otherwise than it was trained "
            "(`wegeft merge` measures by how much)"
        )
    name_or_path = base or adapter.base
    revision = revision or (None if base else adapter.revision)
    with base_errors(base, adapter.folder):
        base_dir = fetch_base_folder(name_or_path, revision)
        section = ModelSection(
            str(base_dir),
            trust_remote_code=adapter.trusts_remote_code,
            special_tokens=adapter.special_tokens,
        )
        trained_form = choose_chat_template(
            adapter.prompt,
            options.chat_template,
            section,
            reporter.warn,
        )
        plan = plan_lora_equivalent(
            adapter,
            base_dir,
            pad_rank=options.pad_rank,
            pad_siblings=options.pad_siblings,
            trust_remote_code=adapter.trusts_remote_code,
            warn=reporter.warn,
        )
    if options.server is None:
        _check_readers(plan, format, adapter.folder, reporter)
    else:
        plan = prepare_for_vllm(plan, adapter.folder, key="--for")
    export = _PairExport(adapter, base_dir, name_or_path, revision, plan, options, reporter)
    check_free_space(output, count_bytes(plan_tensors(plan, export.dtype)), "the export")
    with atomic_folder(output) as folder:
        result = (
            export.write_gguf(folder) if format == "gguf" else export.write_peft(folder, output)
        )
        _write_form(folder, adapter, section, format, trained_form, reporter)
        return replace(result, output_dir=output)


def _write_form(
    folder: Path,
    adapter: Adapter,
    base: ModelSection,
    format: str,
    chat_template: str | None,
    reporter: Reporter,
) -> None:
    """Write the prompt form of the training beside an exported adapter.

    With special tokens of its own, the tokenizer and the generation config, which a server can be
    given.
    """
    if (record := base_record_to_json(None, adapter.prompt)) is not None:
        (folder / BASE_NAME).write_text(record, encoding="utf-8")
    if base.special_tokens and format == "lora":
        tokenizer = load_tokenizer_of(base)
        with quiet_transformers():
            tokenizer.save_pretrained(str(folder))
        files = special_token_files(Path(base.name_or_path), tokenizer, base.special_tokens)
        (folder / GENERATION_CONFIG_NAME).write_text(files[GENERATION_CONFIG_NAME], "utf-8")
    elif base.special_tokens:
        reporter.warn(
            "llama.cpp reads the special tokens of the base's GGUF file, and this adapter was "
            f"trained with {base.special_tokens}: merge it and export the model"
        )
    if chat_template is not None:
        (folder / CHAT_TEMPLATE_NAME).write_text(chat_template, encoding="utf-8")


def _check_readers(
    plan: LoraEquivalent, format: str, adapter_dir: Path, reporter: Reporter
) -> None:
    """Refuse for llama.cpp, and warn for servers, what they do not read."""
    if plan.is_part and format == "lora":
        reporter.warn(
            f"the base is a {plan.architecture}, of which this is the text model: vLLM reads the "
            "LoRA only with the names of `--for vllm`"
        )
    if plan.is_pairs_alone:
        return
    others = f"experts ({plan.experts[0]}, ...)" if plan.experts else "biases or whole modules"
    if format == "gguf":
        raise UserError(
            f"llama.cpp reads LoRA pairs alone, and this adapter also changes {others}",
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
    plan: LoraEquivalent
    options: ExportOptions
    reporter: Reporter

    @property
    def dtype(self) -> str:
        """Type of the pairs' tensors."""
        return self.options.dtype or "float32"

    def write_gguf(self, folder: Path) -> ExportResult:
        """Write `adapter.gguf`."""
        from wegeft_cli.exporting.gguf_adapter import write_adapter_gguf

        with self.reporter.progress("exporting", len(self.plan.members)) as advance:
            num_tensors = write_adapter_gguf(
                folder / "adapter.gguf",
                self.plan,
                self.base_dir,
                dtype=self.dtype,
                base_name=self.name_or_path,
                on_layer=advance,
            )
        num_bytes = (folder / "adapter.gguf").stat().st_size
        rank = self.plan.rank
        return ExportResult(folder, "gguf", "adapter", num_tensors, num_bytes, rank=rank)

    def write_peft(self, folder: Path, output: Path) -> ExportResult:
        """Write PEFT's two files, the parity report and the card."""
        plan, layout = self.plan, plan_tensors(self.plan, self.dtype)
        with self.reporter.progress("exporting", len(layout)) as advance:
            write_lora_files(
                plan,
                folder,
                base=self.name_or_path,
                revision=self.revision,
                dtype=self.dtype,
                advance=advance,
            )
        if self.options.server is None:
            check_peft(plan, folder, self.adapter.folder)
        parity = self._measure_parity(folder)
        (folder / PARITY_NAME).write_text(json.dumps(parity, indent=2) + "\n", encoding="utf-8")
        card = write_lora_card(
            self.adapter,
            self.name_or_path,
            self.revision,
            title=output.resolve().name,
            method=plan.pairs.method,
            formula=plan.pairs.formula,
            rank=plan.rank,
            num_modules=len(plan.members),
            num_parameters=sum(
                math.prod(shape) for name, (_, shape) in layout.items() if ".lora_" in name
            ),
            for_servers=plan.is_pairs_alone,
            parity=parity,
        )
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        num_bytes = count_bytes(layout)
        return ExportResult(
            folder, "lora", "adapter", len(layout), num_bytes, rank=plan.rank, parity=parity
        )

    def _measure_parity(self, folder: Path) -> dict[str, Any]:
        if not self.options.parity:
            return {"is_measured": False, "reason": "switched off (--no-parity)"}
        if self.plan.is_renamed:
            return {"is_measured": False, "reason": "PEFT does not read the names of vLLM"}
        self.reporter.note("measuring parity: the base is loaded")
        parity = measure_parity(
            self.base_dir,
            self.adapter,
            folder,
            prompts=self.options.prompts or PROMPTS,
            trust_remote_code=self.adapter.trusts_remote_code,
        )
        if not parity["is_measured"]:
            self.reporter.warn(f"parity is not measured: {parity['reason']}")
        return parity


def _default_output(adapter_dir: Path, format: str) -> Path:
    is_in_run = adapter_dir.name == "adapter"
    return adapter_dir.parent / (format if is_in_run else f"{adapter_dir.name}-{format}")
