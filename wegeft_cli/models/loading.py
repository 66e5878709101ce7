"""Load the base model and its tokenizer from a folder, a GGUF file or a hub."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from wegeft_cli.errors import BaseModelError, UserError
from wegeft_cli.models.base_folder import find_base_folder, is_path
from wegeft_cli.models.completeness import list_missing, list_unused, refuse_missing, warn_of_unused
from wegeft_cli.models.config_check import (
    check_begin_token,
    check_config,
    check_labels,
    check_special_tokens,
    check_tokenizer,
)
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.models.kernels import bound_kernel_caches
from wegeft_cli.models.quantization import build_quantization, keep_trainable
from wegeft_cli.recipe.schema import ModelSection, QuantMethod
from wegeft_cli.storage.containment import check_model_folder
from wegeft_cli.storage.safetensors_reader import DTYPE_NAMES, TORCH_DTYPES

_NEEDS_PILLOW = re.compile(r"\b(PIL|Pillow|torchvision)\b", re.IGNORECASE)
_ATTENTION = "model.attn_implementation"
_DTYPES = {name: TORCH_DTYPES[stored] for name, stored in DTYPE_NAMES.items()}


def load_config(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a model's configuration from a folder with `config.json`, a GGUF file or a hub id."""
    from transformers import AutoConfig

    with _translated(name_or_path):
        config = AutoConfig.from_pretrained(
            **_source(name_or_path, revision), trust_remote_code=trust_remote_code
        )
        check_config(config, find_base_folder(name_or_path, revision))
    return config


_LANGUAGE_MODEL = "causal language model"


def _auto_class(head: HeadSpec | None) -> Any:
    """Return the class of transformers that loads a model with a head, or a language model."""
    import transformers

    return getattr(transformers, "AutoModelForCausalLM" if head is None else head.auto_class)


def build_meta_model(
    config: Any, *, trust_remote_code: bool = False, head: HeadSpec | None = None
) -> nn.Module:
    """Build a model on the meta device (without weights), for counts and checks."""
    auto_class = _auto_class(head)  # some versions compute while they are imported
    with quiet_transformers(), torch.device("meta"):
        try:
            model: nn.Module = auto_class.from_config(config, trust_remote_code=trust_remote_code)
            return model
        except ValueError as error:
            raise BaseModelError(
                f"{type(config).__name__} is no {_LANGUAGE_MODEL if head is None else head.noun}",
                hint=str(error).splitlines()[0],
            ) from None
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a damaged value raises anything
            reason = (str(error).splitlines() or [""])[0]
            raise BaseModelError(
                f"no model can be built from its config.json: {type(error).__name__}: {reason}",
                hint="the file is damaged, or of another version: fetch it again",
            ) from error


def load_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    head: HeadSpec | None = None,
    **options: Any,
) -> nn.Module:
    """Load a model with its weights (safetensors or GGUF; pickles are refused).

    Args:
        dtype: auto (as in the checkpoint), float32, bfloat16 or float16.
        attn_implementation: Attention kernel by its transformers name; None lets transformers
            choose.
        head: Head of a classifier, with random weights if the checkpoint has none of that shape;
            None loads a causal language model. The model's `missing_weights` maps the tensors that
            the checkpoint lacks to the reasons; `unused_weights` are those that it alone has.

    Returns:
        The model in evaluation mode, on the CPU by default. `bound_kernel_caches` has set two
        environment variables.

    Raises:
        UserError: If there is no such model, its weights are unreadable, or a language model's are
            incomplete.
    """
    source = _source(name_or_path, revision)
    if "gguf_file" not in source:
        source["use_safetensors"] = True
    config = load_config(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    if head is not None:
        head.apply(config)
        source["config"] = config
    with _translated(name_or_path), quiet_transformers():
        # transformers mutes its report together with its progress bars, so it is read here.
        model, report = _auto_class(head).from_pretrained(
            **source,
            dtype=_DTYPES.get(dtype, "auto"),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    bound_kernel_caches(model)
    missing = list_missing(report)
    if head is None:
        refuse_missing(model, missing, name_or_path)
    else:
        model.missing_weights = missing
    model.unused_weights = list_unused(report, has_head=head is not None)
    return model.eval()


def load_image_processor(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a model's image processor."""
    from transformers import AutoImageProcessor

    path = Path(name_or_path).expanduser()
    if path.is_dir() and not (path / "preprocessor_config.json").is_file():
        raise BaseModelError(
            f"{name_or_path!r} holds no preprocessor_config.json, which defines how its images "
            "are scaled",
            hint="put it beside config.json: transformers' ViTImageProcessor(...).save_pretrained",
        )
    with _translated(name_or_path, what="image processor"), quiet_transformers():
        return AutoImageProcessor.from_pretrained(
            **_source(name_or_path, revision), trust_remote_code=trust_remote_code
        )


def load_tokenizer_of(section: ModelSection) -> Any:
    """Load the tokenizer of a recipe's `model` with its special tokens."""
    return load_tokenizer(
        section.name_or_path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        special_tokens=section.special_tokens,
    )


def load_tokenizer(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    special_tokens: Mapping[str, str] | None = None,
) -> Any:
    """Load a model's tokenizer from a folder, a GGUF file or a hub id.

    `special_tokens` maps `bos_token`, `eos_token` or `pad_token` to tokens of the vocabulary that
    replace the tokenizer's own. They are applied as if its `tokenizer_config.json` named them.
    """
    from transformers import AutoTokenizer

    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    with _translated(name_or_path, what="tokenizer"), quiet_transformers():
        source = _source(name_or_path, revision)
        tokenizer = load(**source)
        if special_tokens:
            check_special_tokens(tokenizer, special_tokens)
            own, tokenizer = tokenizer, load(**source, **special_tokens)
            check_begin_token(own, tokenizer)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        # For some families transformers builds an empty tokenizer with only special tokens.
        raise BaseModelError(
            f"{name_or_path!r} holds no tokenizer",
            hint="put the tokenizer's files (tokenizer.json and its config) beside config.json",
        )
    check_tokenizer(tokenizer, name_or_path)
    return tokenizer


def fetch_base_folder(name_or_path: str, revision: str | None = None) -> Path:
    """Return the folder with a model's safetensors, downloaded if they are on a hub."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists() or is_path(name_or_path):
        _source(name_or_path, revision)  # reports a missing path
        raise UserError(
            f"{name_or_path!r} is a single file; a folder with safetensors is needed",
            hint="save the base once with transformers' save_pretrained and give that folder",
        )
    from huggingface_hub import snapshot_download

    with _translated(name_or_path):
        # The cache may be incomplete; offline, the hub's client returns it as it is.
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))


def pad_token_id(tokenizer: Any) -> int:
    """Return the padding id: eos, or 0. Any id works, because masks come from lengths."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if candidate is not None:
            return int(candidate)
    raise AssertionError("unreachable")


def _source(name_or_path: str, revision: str | None) -> dict[str, Any]:
    """Return `from_pretrained`'s arguments for a name; raise UserError for a missing path."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise BaseModelError(
                f"{name_or_path!r} is a file, but neither a model folder nor a GGUF file",
            )
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        check_model_folder(path)
        if not (path / "config.json").is_file():
            raise BaseModelError(
                f"the folder {name_or_path!r} holds no config.json",
                hint="give the folder of a transformers model",
            )
        check_labels(path / "config.json")
        return {"pretrained_model_name_or_path": str(path)}
    if is_path(name_or_path):
        raise BaseModelError(
            f"no folder {name_or_path!r}",
            hint="give a model folder or a hub id such as org/name",
        )
    return {"pretrained_model_name_or_path": name_or_path, "revision": revision or "main"}


@contextmanager
def _translated(name_or_path: str, what: str = "model") -> Iterator[None]:
    """Translate the errors of transformers and the hub for a missing or damaged model.

    A damaged file can cause any error: TypeError, KeyError, and more.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # A panic in a Rust library is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if "trust_remote_code" in str(error):
            hint = "it wants to run its own code: set model.trust_remote_code if you trust it"
        elif isinstance(error, SafetensorError):
            hint = "a safetensors file of it is damaged: fetch or write it again"
        elif isinstance(error, OSError):
            hint = "check the name, the revision, the network and your hub login, or give a folder"
        elif isinstance(error, ImportError) and _NEEDS_PILLOW.search(str(error)):
            hint = "pip install 'wegeft-cli[vision]'"
        elif isinstance(error, (ValueError, ImportError)):
            hint = None
        else:
            reason = f"{type(error).__name__}: {reason}"
            hint = "one of its files is damaged, or of another version: fetch it again"
        message = f"cannot load the {what} of {name_or_path!r}: {reason}"
        if _ATTENTION.rpartition(".")[2] in reason:
            raise UserError(message, key=_ATTENTION, hint=hint) from error
        raise BaseModelError(message, hint=hint) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' progress bars and messages during loading."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    _switch_bars(transformers_logging.disable_progress_bar)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        _switch_bars(transformers_logging.enable_progress_bar)


def _switch_bars(switch: Callable[[], None]) -> None:
    """Switch the progress bars; the hub only warns if the environment has set them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        switch()


def load_backbone(base_dir: Path) -> nn.Module:
    """Load a folder's model without a head, in evaluation mode on the CPU."""
    from transformers import AutoModel

    try:
        with quiet_transformers():
            model: nn.Module = AutoModel.from_pretrained(
                str(base_dir), use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        message = f"the base cannot be loaded: {lines[0] if lines else type(error).__name__}"
        raise UserError(message, file=str(base_dir)) from error
    return model.eval()


def load_base(
    section: ModelSection, *, warn: Callable[[str], None] = lambda text: None, **options: Any
) -> nn.Module:
    """Load the frozen base on the CPU, or on the process's device if bitsandbytes quantizes it.

    `warn` is called with a sentence about tensors that the model does not use.
    """
    kind = name_quantization(section)
    dtype: str = section.dtype
    if kind is not None:
        # Types of the layers' products must be known before the weights are read.
        computing = find_dtype(section)
        options["quantization_config"] = build_quantization(kind, computing)
        dtype = str(computing).removeprefix("torch.")
    load = partial(
        load_model,
        section.name_or_path,
        revision=section.revision,
        dtype=dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        **options,
    )
    if "distributed_config" in options:
        # Importing FSDP2 takes a second, so only sharded bases do it.
        from wegeft_cli.models.fsdp import load_share

        model = load_share(load)
    else:
        model = load()
    warn_of_unused(model, warn)
    keep_trainable(model)
    return model


def name_quantization(section: ModelSection) -> str | None:
    """Return `<package>_<bits>bit` for a section that quantizes its base, or None."""
    if not (section.load_in_4bit or section.load_in_8bit):
        return None
    return f"{section.quant_method}_{4 if section.load_in_4bit else 8}bit"


def quantise_as(section: ModelSection, kind: str | None) -> ModelSection:
    """Return the section with the quantization that an adapter records (`kind`).

    None, or a method of another package, leaves the section unchanged.
    """
    method, _, bits = (kind or "").partition("_")
    known = bits in ("4bit", "8bit")
    return replace(
        section,
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        quant_method=cast(QuantMethod, method) if known else ModelSection.quant_method,
    )


def find_dtype(section: ModelSection, config: Any = None) -> torch.dtype:
    """Return the type of a base's dense weights: the recipe's, else its configuration's.

    `config` is the model's configuration; it is loaded if it is None and needed.
    """
    if section.dtype in _DTYPES:
        return _DTYPES[section.dtype]
    config = load_base_config(section) if config is None else config
    declared = getattr(config, "dtype", None)
    return declared if isinstance(declared, torch.dtype) else torch.float32


def load_base_config(section: ModelSection) -> Any:
    """Load the configuration of the recipe's `model`."""
    return load_config(
        section.name_or_path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )


def build_skeleton(section: ModelSection, head: HeadSpec | None = None) -> tuple[Any, nn.Module]:
    """Return the base's configuration, and the base on the meta device."""
    config = load_base_config(section)
    if head is not None:
        head.apply(config)
    trusts = section.trust_remote_code
    return config, build_meta_model(config, trust_remote_code=trusts, head=head)
