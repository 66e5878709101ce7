"""Refuse a damaged `config.json` before a model is built, and a tokenizer that never ends."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wegeft_cli.errors import BaseModelError, UserError
from wegeft_cli.storage.json_files import read_json

MAX_LAYERS = 10_000
"""Most layers of a model, or experts of a layer; the largest of today have a few hundred."""

_COUNTS = (
    "num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_local_experts",
    "num_experts", "n_routed_experts", "depths", "num_nextn_predict_layers", "num_hidden_groups",
)  # fmt: skip
_WIDTHS = ("hidden_size", "intermediate_size", "vocab_size")
_MAX_LABELS = 1_000_000
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_PROBE_CHARACTERS = "a A0.\n\t"
_PROBE_LENGTH = 40
_PROBE_SECONDS = 5.0
# A quantized weight takes at least two bits, and a declared text part may have no weights at all.
_SLACK, _SMALL = 64, 10**10


def check_config(config: Any, folder: Path | None) -> None:
    """Check values by which transformers would fail unclearly, or build without end.

    `folder` holds the weights, if they are on this machine.

    Raises:
        BaseModelError: If a value is of another kind or out of range.
    """
    file = None if folder is None else str(folder / "config.json")
    for part in _list_parts(config):
        for key, expected in _list_faults(part, _count_bytes(folder)):
            value = getattr(part, key)
            raise BaseModelError(
                f"`{key}` is {value!r:.60}; it must be {expected}",
                file=file,
                hint="the file is damaged, or of another model: fetch it again",
            )


def check_labels(file: Path) -> None:
    """Refuse a number of labels for which transformers would make names without end."""
    values = read_json(file, allow_nan=True)
    count = values.get("num_labels") if isinstance(values, dict) else None
    if isinstance(count, int) and count > _MAX_LABELS:
        raise BaseModelError(
            f"`num_labels` is {count}; it must be at most {_MAX_LABELS:,}",
            file=str(file),
            hint="the file is damaged: fetch it again",
        )


def check_tokenizer(tokenizer: Any, name_or_path: str) -> None:
    """Refuse a fast tokenizer whose expressions backtrack without end on short texts.

    Each text repeats one character, also those of the expressions. The engine gives up after
    10 million steps.
    """
    if not tokenizer.is_fast:
        return
    backend = tokenizer.backend_tokenizer
    expressions = [
        text
        for part in (backend.normalizer, backend.pre_tokenizer)
        if part is not None
        for text in _list_expressions(json.loads(part.__getstate__()))
    ]
    if not expressions:
        return
    characters = dict.fromkeys(_PROBE_CHARACTERS + "".join(expressions)[:1000])
    started = time.monotonic()
    for character in characters:
        is_endless = False
        try:
            backend.encode(_PROBE_LENGTH * character + "!\u00ac")
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            is_endless = True
        if is_endless or time.monotonic() - started > _PROBE_SECONDS:
            shown = ", ".join(f"{text!r:.60}" for text in expressions[:3])
            raise BaseModelError(
                f"an expression of the tokenizer backtracks without end; it has {shown}",
                file=str(Path(name_or_path) / "tokenizer.json"),
                hint="use another tokenizer: this one is damaged or hostile",
            )


def _list_expressions(settings: Any) -> Iterator[str]:
    """Yield the regular expressions of a normalizer or a pre-tokenizer."""
    if isinstance(settings, dict):
        if isinstance(settings.get("Regex"), str):
            yield settings["Regex"]
        for value in settings.values():
            yield from _list_expressions(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _list_expressions(value)


def _list_parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those in it, such as `text_config`."""
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if part is not None and part is not config and hasattr(part, "to_dict"):
            yield from _list_parts(part)


def _list_faults(config: Any, num_bytes: int) -> Iterator[tuple[str, str]]:
    names = getattr(config, "architectures", None)
    if names is not None and not (
        isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    ):
        yield "architectures", "a list of class names"
    for key in _COUNTS:
        value = getattr(config, key, None)
        if isinstance(value, list | tuple):  # one for each stage
            counts = [count for count in value if isinstance(count, int)]
        else:
            counts = [] if value is None else [value]
        if not all(_is_int(count, 0, MAX_LAYERS) for count in counts):
            yield key, f"a whole number of at most {MAX_LAYERS:,}"
    yield from _list_widths(config, num_bytes)
    window = getattr(config, "sliding_window", None)
    if window is not None and not isinstance(window, int):
        yield "sliding_window", "a whole number or null"
    for key in _TOKENS:
        value = getattr(config, key, None)
        ids = value if isinstance(value, list | tuple) else [value]
        if not all(each is None or _is_int(each, -1, 2**31) for each in ids):
            yield key, "a token id, or a list of them"


def _list_widths(config: Any, num_bytes: int) -> Iterator[tuple[str, str]]:
    most = max(_SLACK * num_bytes, _SMALL) if num_bytes else None
    width = getattr(config, "hidden_size", None)
    for key in _WIDTHS:
        value = getattr(config, key, None)
        if value is None or isinstance(value, list | tuple):
            continue  # one for each stage
        if not _is_int(value, 1, None):
            yield key, "a whole number of at least 1"
        elif most is not None and _is_int(width, 1, None) and value * width > most:
            yield key, f"a size that fits the base's weights of {num_bytes:,} bytes"


def _is_int(value: Any, least: int, most: int | None) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and value >= least and (most is None or value <= most)


def _count_bytes(folder: Path | None) -> int:
    if folder is None:
        return 0
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def check_special_tokens(tokenizer: Any, tokens: Mapping[str, str]) -> None:
    """Raise UserError if a token is not in the vocabulary: the frozen base has no row for it."""
    known = tokenizer.get_vocab()
    for name, text in tokens.items():
        if text not in known:
            raise UserError(
                f"the tokenizer has no token {text!r}",
                key=f"model.special_tokens.{name}",
                hint="choose a token of its vocabulary; a new token needs a base with a row for it "
                "(docs/data.md, special tokens)",
            )


def check_begin_token(own: Any, changed: Any) -> None:
    """Raise UserError if texts still begin with the tokenizer's own begin token.

    A fast tokenizer inserts it as its tokenizer.json says, which names the token itself.
    """
    first = changed("a").input_ids[:1]
    replaced = own.bos_token_id != changed.bos_token_id
    if replaced and own.bos_token_id is not None and first == [own.bos_token_id]:
        raise UserError(
            f"the tokenizer inserts {own.bos_token!r} in front of every text in any case",
            key="model.special_tokens.bos_token",
            hint="remove it, or change `post_processor` in the tokenizer.json of a copy of the "
            "base",
        )
