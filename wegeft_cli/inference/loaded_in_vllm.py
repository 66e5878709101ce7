"""A target opened in vLLM: its base in the engine, its adapter as a LoRA that requests name."""

from __future__ import annotations

import atexit
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import load_finite_tensors
from wegeft_cli.errors import UserError
from wegeft_cli.generation import vllm_engine as vllm
from wegeft_cli.inference.loaded_model import LoadedModel, ModelTarget, model_errors
from wegeft_cli.methods.lora_equivalent.files import write_lora_files
from wegeft_cli.methods.lora_equivalent.plan import plan_lora_equivalent
from wegeft_cli.methods.lora_equivalent.readers import (
    check_lora_for_vllm,
    prepare_for_vllm,
)
from wegeft_cli.methods.registry import method_of
from wegeft_cli.models.loading import fetch_base_folder, load_tokenizer_of, name_quantization
from wegeft_cli.recipe.schema import ModelSection, Recipe


class LoadedInVllm(LoadedModel):
    """A model in vLLM; its base is the same engine asked without the adapter."""

    @contextmanager
    def base_model(self) -> Iterator[tuple[Any, Any]]:
        """Yield the engine without the adapter, and the tokenizer."""
        if self.adapter is None:
            raise UserError(
                "a merged model's base would need a second engine",
                key="--compare-base",
                hint="give the adapter, or score the base by itself and use `wegeft compare`",
            )
        yield self.model.without_lora(), self.tokenizer


def open_in_vllm(
    path: str | Path,
    recipe: Recipe | None,
    *,
    base: str | None,
    warn: Callable[[str], None] = lambda text: None,
) -> LoadedModel:
    """Start vLLM on what a command is to work on; arguments and errors as in `LoadedModel.open`.

    An adapter with a LoRA equivalent (WeGeFT, 1LoRA, tied LoRA) is passed as that, written to a
    temporary folder. An adapter of a quantized base is refused.
    """
    from transformers import AutoConfig, GenerationConfig

    target = ModelTarget.resolve(path, recipe, base=base).require_text()
    section, adapter, prompt = target.section, target.adapter, target.find_prompt()
    if (quantized := name_quantization(section)) is not None:
        # The equivalent is made from the dense weights, which are another model.
        raise UserError(
            f"this adapter was trained on a base in {quantized}, which vLLM is not given here",
            file=str(path),
            key="--backend",
            hint="leave --backend out, or score what `wegeft merge` makes of it",
        )
    with model_errors(path) if adapter is None else nullcontext():
        folder = fetch_base_folder(section.name_or_path, section.revision)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    has_own = (Path(folder) / "generation_config.json").is_file()
    told: dict[str, Any] = {
        "config": config,
        # As `from_pretrained` of the other engine: without such a file, out of the model's config.
        "generation_config": (
            GenerationConfig.from_pretrained(folder)
            if has_own
            else GenerationConfig.from_model_config(config)
        ),
        "dtype": find_dtype(section.dtype, config),
        "trust_remote_code": section.trust_remote_code,
    }
    tokenizer = load_tokenizer_of(replace(section, name_or_path=str(folder), revision=None))
    if adapter is None:
        model = vllm.open_model(str(folder), **told)
        return LoadedInVllm(
            model, tokenizer, section, recipe=recipe, write=vllm.generate_in_vllm, prompt=prompt
        )
    with ExitStack() as stack:
        lora_dir, rank = find_lora(adapter, folder, section, warn, stack)
        model = vllm.open_model(str(folder), lora_dir=lora_dir, rank=rank, **told)
        # The engine reads the files when the first request names them.
        scratch = stack.pop_all()
    atexit.register(scratch.close)
    weakref.finalize(model, scratch.close)
    return LoadedInVllm(
        model,
        tokenizer,
        section,
        adapter,
        recipe=recipe,
        write=vllm.generate_in_vllm,
        prompt=prompt,
    )


def find_dtype(asked: str, config: Any) -> str:
    """Return the type of the weights: `auto` is the checkpoint's, which vLLM would halve."""
    stored = getattr(config, "dtype", None)
    if asked != "auto" or stored is None:
        return asked
    return str(stored).removeprefix("torch.")


def find_lora(
    adapter: Adapter,
    base_dir: Path,
    section: ModelSection,
    warn: Callable[[str], None],
    stack: ExitStack,
) -> tuple[Path, int]:
    """Return the folder and the rank of the LoRA adapter that vLLM reads.

    An exact LoRA equivalent is written to a temporary folder of `stack`.
    """
    if not method_of(adapter).has_lora_equivalent(adapter):
        check_lora_for_vllm(adapter)
        tensors = load_finite_tensors(adapter.weights_path)
        ranks = [len(tensor) for name, tensor in tensors.items() if ".lora_A." in name]
        if not ranks:
            raise UserError("holds no LoRA pairs", file=str(adapter.weights_path))
        return adapter.folder, max(ranks)
    equivalent = plan_lora_equivalent(
        adapter, base_dir, trust_remote_code=section.trust_remote_code, warn=warn
    )
    equivalent = prepare_for_vllm(equivalent, adapter.folder, key="--backend")
    lora_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wegeft-lora-")))
    write_lora_files(equivalent, lora_dir, base=str(base_dir))
    return lora_dir, equivalent.rank
