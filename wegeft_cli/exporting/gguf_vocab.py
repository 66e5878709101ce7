"""A tokenizer as llama.cpp has it: tokens, their kinds, and how text is cut before merging."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError, cut_text
from wegeft_cli.exporting.gguf_layers import import_gguf
from wegeft_cli.storage.json_files import read_json

_SPACE = "\u2581"  # what SentencePiece writes for a space
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NEVER = -1e9  # score of a token that no merge makes

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before merging -> llama.cpp's name of it.
_CUTS = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}


def add_vocab(
    writer: Any, model_dir: Path, num_rows: int, chat_template: str | None = None
) -> None:
    """Put a model's tokenizer into a file that is being written.

    `chat_template` replaces the model's own.

    Raises:
        UserError: If the tokenizer is missing, damaged, or cuts text in a way that is not known.
    """
    gguf = import_gguf()
    path = model_dir / "tokenizer.json"
    values = read_json(path)
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("vocab"):
        raise _unknown(path, "it is no byte-pair encoding")
    try:
        if model.get("byte_fallback"):
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
            writer.add_add_space_prefix(_prepends_space(values))
            scores = _merge_scores(model)
        else:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(_name_cut(values, path))
            scores = None
        tokens = list(_list_tokens(values, num_rows, gguf.TokenType))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"this tokenizer is damaged: {error!r}", file=str(path)) from error
    writer.add_token_list([text for text, _ in tokens])
    if scores is not None:
        writer.add_token_scores([scores.get(text, _NEVER) for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    special = gguf.SpecialVocab(model_dir, load_merges=scores is None, n_vocab=len(tokens))
    if chat_template is not None:
        special.chat_template = chat_template
    special.add_to_gguf(writer, quiet=True)


def _list_tokens(values: Mapping[str, Any], num_rows: int, kinds: Any) -> Iterator[tuple[str, int]]:
    """Return text and kind of every token, by its number."""
    by_number = {number: text for text, number in values["model"]["vocab"].items()}
    added = {token["id"]: token for token in values.get("added_tokens") or ()}
    by_number |= {number: token["content"] for number, token in added.items()}
    last = max(by_number)
    if last >= num_rows:
        raise ValueError(f"token {last} of a model with {num_rows} rows")
    unknown = values["model"].get("unk_token")
    for number in range(num_rows):
        text = by_number.get(number)
        if text is None:
            yield f"[PAD{number}]", kinds.UNUSED
        elif text == unknown:
            yield text, kinds.UNKNOWN
        elif number in added:
            yield text, kinds.CONTROL if added[number].get("special") else kinds.USER_DEFINED
        elif values["model"].get("byte_fallback") and _BYTE.fullmatch(text):
            yield text, kinds.BYTE
        else:
            yield text, kinds.NORMAL


def _merge_scores(model: Mapping[str, Any]) -> dict[str, float]:
    """Return each token the rank of the merge that makes it: earlier merges score higher."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault("".join(pair), -float(rank))
    return scores


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, those inside sequences too."""
    if not isinstance(part, dict):
        return
    inner = part.get("normalizers") or part.get("pretokenizers")
    if part.get("type") == "Sequence":
        for each in inner or ():
            yield from _steps(each)
    else:
        yield part


def _prepends_space(values: Mapping[str, Any]) -> bool:
    for step in (*_steps(values.get("normalizer")), *_steps(values.get("pre_tokenizer"))):
        if step["type"] == "Prepend" and step.get("prepend") == _SPACE:
            return True
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def _name_cut(values: Mapping[str, Any], path: Path) -> str:
    """Return llama.cpp's name of how this tokenizer cuts text: a wrong one gives wrong tokens."""
    steps = list(_steps(values.get("pre_tokenizer")))
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _unknown(path, "it is not byte-level")
    before = steps[:-1]
    if not before and last.get("use_regex", True):
        return "gpt-2"
    if len(before) == 1 and before[0]["type"] == "Digits" and last.get("use_regex", True):
        return "smollm" if before[0].get("individual_digits") else ""
    if len(before) == 1 and before[0]["type"] == "Split" and not last.get("use_regex", True):
        pattern = before[0]["pattern"].get("Regex")
        if pattern in _CUTS and before[0].get("behavior") == "Isolated":
            return _CUTS[pattern]
    raise _unknown(path, f"it cuts text by {cut_text(json.dumps(before), 120)}")


def _unknown(path: Path, why: str) -> UserError:
    return UserError(
        f"llama.cpp's name of this tokenizer is not known here: {why}",
        file=str(path),
        hint="llama.cpp's convert_hf_to_gguf.py knows more of them",
    )
