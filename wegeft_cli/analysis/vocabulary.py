"""Directions in a language model's residual stream as tokens, from the base's files alone.

A module that writes to the residual stream (`o_proj`, `down_proj`) adds `c` to what the final norm
and the unembedding read, so with the norm's weight `g` the direct effect of `c` on the logits is
`E (g * c)`, up to the norm's scale (nostalgebraist 2020, Elhage et al. 2021); a LayerNorm also
takes the mean of `c` away. A module that reads the stream (`q_proj`, `up_proj`, ...) writes into a
space without tokens; for it, the input embeddings along its reading directions are shown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.models.loading import build_skeleton, load_tokenizer
from wegeft_cli.recipe.schema import ModelSection
from wegeft_cli.storage.json_files import read_object
from wegeft_cli.storage.safetensors_reader import TensorInfo, block_rows, read_rows

_WRITES = frozenset(
    {"o_proj", "down_proj", "out_proj", "c_proj", "fc2", "fc_out", "dense", "dense_4h_to_h"}
    | {"wo", "w2", "out_lin", "lin2", "linear2"}
)
_READS = frozenset(
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "in_proj"}
    | {"gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h"}
    | {"query", "key", "value", "w1", "w3", "q_lin", "k_lin", "v_lin", "lin1"}
)
# In the name of an architecture.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_UNEMBEDDINGS = ("lm_head", "embed_out", "output")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
# Final norms are outside of the layers, so their names have no number.
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "ln_out")
_PROBE_SCALE = 1000.0
"""Makes the norm's epsilon negligible."""


@dataclass(frozen=True)
class Vocabulary:
    """Tables that map directions to tokens.

    Args:
        hidden_size: Width of the residual stream.
        unembedding: [vocabulary, hidden_size].
        embedding: The input embedding, of the same shape; None if the files hold none.
        norm: The gains of the final norm, [hidden_size].
        is_centered: Whether the norm subtracts the mean (LayerNorm).
        tokenizer: Decodes tokens; None shows numbers.
    """

    hidden_size: int
    unembedding: TensorInfo
    embedding: TensorInfo | None
    norm: Tensor
    is_centered: bool
    tokenizer: Any

    def role_of(self, kind: str, shape: tuple[int, int]) -> str | None:
        """Return whether a module writes to or reads the residual stream, by name and width."""
        name = kind.partition(":")[0]
        d_out, d_in = shape
        if d_out == self.hidden_size and name in _WRITES:
            return "writes"
        if d_in == self.hidden_size and (name in _READS or d_out != self.hidden_size):
            return "reads" if self.embedding is not None else None
        return "writes" if d_out == self.hidden_size != d_in else None

    def to_logits(self, directions: Tensor) -> Tensor:
        """Map residual directions, [m, hidden_size], through the final norm's linear part."""
        if self.is_centered:
            directions = directions - directions.mean(dim=1, keepdim=True)
        return directions * self.norm.to(directions.dtype)

    def name(self, token: int) -> str:
        """Return a token's text."""
        if self.tokenizer is None:
            return f"#{token}"
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


def open_vocabulary(base_dir: Path, stored: dict[str, TensorInfo]) -> Vocabulary | str:
    """Find a language model's unembedding, final norm and tokenizer, or the reason for none."""
    config = read_object(base_dir / "config.json")
    names = " ".join(str(name) for name in config.get("architectures") or ())
    config = config.get("text_config") or config
    if not any(part in names for part in _LANGUAGE_MODELS):
        return "the base is no causal language model"
    embedding = _find(stored, _EMBEDDINGS)
    unembedding = _find(stored, _UNEMBEDDINGS) or embedding
    if unembedding is None or len(unembedding.shape) != 2:
        return "the base's files hold no unembedding under a known name"
    hidden_size = unembedding.shape[1]
    try:
        _, skeleton = build_skeleton(ModelSection(name_or_path=str(base_dir)))
    except UserError as error:
        return f"the base's final norm cannot be built: {error.message}"
    norm = _load_norm(skeleton, stored, hidden_size)
    if norm is None:
        return "the base's files hold no final norm under a known name"
    gains, is_centered = measure_norm(norm, hidden_size)
    try:
        tokenizer = load_tokenizer(str(base_dir))
    except UserError:
        tokenizer = None
    return Vocabulary(hidden_size, unembedding, embedding, gains, is_centered, tokenizer)


def _load_norm(
    skeleton: nn.Module, stored: dict[str, TensorInfo], hidden_size: int
) -> nn.Module | None:
    """Return a copy of the final norm's module with the weights of the base's files."""
    decoder = getattr(skeleton, "get_decoder", lambda: None)() or skeleton
    for name in _NORMS:
        for module_name, module in decoder.named_modules():
            parts = module_name.split(".")
            parameters = dict(module.named_parameters())
            shapes = {tuple(parameter.shape) for parameter in parameters.values()}
            is_numbered = any(part.isdigit() for part in parts)
            if parts[-1] != name or is_numbered or not shapes <= {(hidden_size,)}:
                continue
            found = {key: _find(stored, [name], key, hidden_size) for key in parameters}
            weights = {key: read_rows(info) for key, info in found.items() if info is not None}
            if len(weights) < len(parameters):
                return None
            norm = copy.deepcopy(module).to_empty(device="cpu").double()
            norm.load_state_dict(weights, strict=False)
            return norm
    return None


@torch.no_grad()
def measure_norm(norm: nn.Module, size: int) -> tuple[Tensor, bool]:
    """Return the gains of a norm and whether it subtracts the mean, from its outputs alone.

    A norm multiplies a vector of mean 0 and mean square 1 by its gains. It maps a constant vector
    to its bias if it subtracts the mean.
    """
    num_minus = size // 2
    probe = torch.full((size,), math.sqrt(num_minus / (size - num_minus)), dtype=torch.float64)
    probe[1::2] = -math.sqrt((size - num_minus) / num_minus)
    bias = norm(torch.zeros(1, 1, size, dtype=torch.float64))[0, 0].double()
    gains = (norm(_PROBE_SCALE * probe[None, None])[0, 0].double() - bias) / probe
    constant = norm(torch.full((1, 1, size), _PROBE_SCALE, dtype=torch.float64))[0, 0].double()
    is_centered = bool((constant - bias).abs().max() < 1e-2 * gains.abs().max())
    return gains, is_centered


def rank_tokens(
    info: TensorInfo, directions: Tensor, num_tokens: int, *, cosine: bool = False
) -> list[tuple[list[tuple[int, float]], list[tuple[int, float]]]]:
    """Find the tokens whose rows have the largest and smallest products with each direction.

    The table is streamed in blocks of rows, once for all directions.

    Args:
        info: The table, [vocabulary, hidden_size].
        directions: [m, hidden_size].
        num_tokens: Number of tokens at each end.
    """
    num_tokens = min(num_tokens, info.shape[0])
    best: list[Tensor] = [torch.empty(0, len(directions)) for _ in range(2)]
    ids: list[Tensor] = [torch.empty(0, len(directions), dtype=torch.long) for _ in range(2)]
    wanted = directions.float()
    if cosine:
        wanted = torch.nn.functional.normalize(wanted, dim=1)
    step = block_rows(info.shape)
    for start in range(0, info.shape[0], step):
        rows = read_rows(info, start, start + step).float()
        if cosine:
            rows = torch.nn.functional.normalize(rows, dim=1)
        scores = rows @ wanted.T
        numbers = torch.arange(start, start + len(rows))[:, None].expand_as(scores)
        for end, sign in enumerate((1.0, -1.0)):
            values = torch.cat([best[end], sign * scores])
            kept = torch.topk(values, min(num_tokens, len(values)), dim=0)
            ids[end] = torch.cat([ids[end], numbers]).gather(0, kept.indices)
            best[end] = kept.values
    return [
        (
            list(zip(ids[0][:, m].tolist(), best[0][:, m].tolist(), strict=True)),
            list(zip(ids[1][:, m].tolist(), (-best[1][:, m]).tolist(), strict=True)),
        )
        for m in range(len(directions))
    ]


def _find(
    stored: dict[str, TensorInfo],
    names: Sequence[str],
    key: str = "weight",
    size: int | None = None,
) -> TensorInfo | None:
    """Find a tensor by its module's last name, outside the numbered layers.

    With `size`, a vector of this size.
    """
    for name in names:
        for stored_name, info in stored.items():
            parts = stored_name.split(".")
            fits = size is None or info.shape == (size,)
            if fits and parts[-2:] == [name, key] and not any(part.isdigit() for part in parts):
                return info
    return None
