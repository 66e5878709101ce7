"""Weights of a base for its LoRA equivalent, one layer or one expert at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wegeft_cli.storage.safetensors_reader import TensorInfo, read_rows


class Weights(Protocol):
    """Tensors of a base."""

    def read(self, name: str) -> Tensor | None:
        """Return a tensor, or None if there is none of this name."""

    def read_expert(self, name: str, number: int, count: int) -> Tensor:
        """Return the matrix of one of `count` experts of a stacked weight."""


@dataclass(frozen=True)
class StoredWeights:
    """Tensors of the base's files.

    Args:
        infos: The tensors by their names in the files.
        pieces: Stacked weights -> the tensors of the files that hold their matrices, see
            `FileNames.find_pieces`.
    """

    infos: Mapping[str, TensorInfo]
    pieces: Mapping[str, Sequence[str]]

    def read(self, name: str) -> Tensor | None:
        """Read a tensor of the files."""
        return read_rows(self.infos[name]) if name in self.infos else None

    def read_expert(self, name: str, number: int, count: int) -> Tensor:
        """Read the matrix of one expert, which may be several tensors of the files."""
        if name in self.infos:
            return read_rows(self.infos[name], number, number + 1)[0]
        return torch.cat([read_rows(self.infos[each]) for each in self.pieces[name][number::count]])


@dataclass(frozen=True)
class LoadedWeights:
    """Parameters of the base in memory, by the names in the model."""

    parameters: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor | None:
        """Return a parameter."""
        return self.parameters[name].detach() if name in self.parameters else None

    def read_expert(self, name: str, number: int, count: int) -> Tensor:
        """Return the matrix of one expert."""
        return self.parameters[name][number].detach()
