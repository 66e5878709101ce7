"""Rows of stored tensors are the rows that safetensors' own library gives."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from wegeft_cli.errors import UserError
from wegeft_cli.storage.safetensors_reader import read_rows, read_shard


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_rows_of_any_shape(tmp_path, dtype):
    tensors = {
        "matrix": torch.randn(7, 3).to(dtype),
        "vector": torch.randn(5).to(dtype),
        "number": torch.tensor(2.5, dtype=dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    stored = read_shard(tmp_path / "a.safetensors").tensors
    assert len(stored) == 4
    for name, tensor in tensors.items():
        assert torch.equal(read_rows(stored[name]), tensor)
    assert torch.equal(read_rows(stored["matrix"], 2, 5), tensors["matrix"][2:5])
    assert torch.equal(read_rows(stored["matrix"], 5, 99), tensors["matrix"][5:])
    assert torch.equal(read_rows(stored["vector"], 1, 2), tensors["vector"][1:2])


def test_quantised_tensors_and_changed_files_are_told(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3, dtype=torch.uint8)}, path)
    with pytest.raises(UserError, match="quantized"):
        read_rows(read_shard(path).tensors["a"])
    save_file({"b": torch.ones(4)}, path)
    info = read_shard(path).tensors["b"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="changed while"):
        read_rows(info)
