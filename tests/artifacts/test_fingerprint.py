"""The fingerprint is that of the weights, not of their files; damaged folders are told."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from wegeft_cli.artifacts.fingerprint import fingerprint_base, list_tensors
from wegeft_cli.errors import UserError
from wegeft_cli.storage.safetensors_reader import encode_header, file_order, read_shard

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy_dir(sharded_dir, tmp_path):
    return shutil.copytree(sharded_dir, tmp_path / "copy")


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_sharding_does_not_show(base_dir, sharded_dir):
    assert list_tensors(base_dir).keys() == list_tensors(sharded_dir).keys()
    fingerprint = fingerprint_base(base_dir)
    assert fingerprint == fingerprint_base(sharded_dir)
    assert fingerprint.startswith("sha256:")
    assert len(fingerprint) == len("sha256:") + 64


def test_headers_tell_what_torch_loads(base_dir):
    infos = list_tensors(base_dir)
    tensors = load_file(base_dir / "model.safetensors")
    assert infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert infos[name].shape == tuple(tensor.shape)
        assert infos[name].num_bytes == tensor.nbytes


def test_every_change_shows(base_dir, make_base, tmp_path):
    tensors = load_file(base_dir / "model.safetensors")
    name = "model.norm.weight"
    changed = tensors[name].clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(2.0))
    renamed = {(f"{n}_" if n == name else n): tensor for n, tensor in tensors.items()}
    variants = [
        tensors,
        tensors | {name: changed},
        tensors | {name: tensors[name].reshape(4, 4)},
        tensors | {name: tensors[name].view(torch.int32)},
        renamed,
    ]
    prints = []
    for number, variant in enumerate(variants):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(variant, folder / "model.safetensors")
        prints.append(fingerprint_base(folder))
    assert prints[0] == fingerprint_base(base_dir)
    assert len(set(prints)) == len(variants)


def test_a_folder_without_safetensors_has_none(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert fingerprint_base(tmp_path) is None
    assert list_tensors(tmp_path) == {}


def test_links_into_a_hub_cache_are_followed(sharded_dir, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded_dir.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert fingerprint_base(snapshot) == fingerprint_base(sharded_dir)


def test_no_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        list_tensors(tmp_path / "none")


def test_a_missing_shard_is_named(copy_dir):
    shard = sorted(copy_dir.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match="missing") as caught:
        list_tensors(copy_dir)
    assert caught.value.file == str(shard)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/x.safetensors", "..", "", "a.bin", "a\0.safetensors", 7, None],
)
def test_a_shard_outside_the_folder_is_refused(copy_dir, name):
    change_index(copy_dir, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(UserError, match="no name of a safetensors file") as caught:
        list_tensors(copy_dir)
    assert caught.value.key == "weight_map.model.norm.weight"


def test_an_index_that_names_what_is_not_there_is_refused(copy_dir):
    shard = min(path.name for path in copy_dir.glob("*.safetensors"))
    change_index(copy_dir, lambda weight_map: weight_map.update({"no.such.tensor": shard}))
    with pytest.raises(UserError, match=r"no\.such\.tensor"):
        list_tensors(copy_dir)


def test_one_tensor_in_two_shards_is_refused(copy_dir):
    first, second = sorted(copy_dir.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(UserError, match="is also in"):
        list_tensors(copy_dir)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_a_damaged_index_is_told(copy_dir, text):
    (copy_dir / INDEX).write_text(text)
    with pytest.raises(UserError) as caught:
        list_tensors(copy_dir)
    assert caught.value.file.startswith(str(copy_dir / INDEX))


def test_truncated_shards_are_told(copy_dir):
    shard = sorted(copy_dir.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    for num_bytes in (0, 5, 8, 40, len(data) // 2, len(data) - 1):
        shard.write_bytes(data[:num_bytes])
        with pytest.raises(UserError, match="damaged") as caught:
            fingerprint_base(copy_dir)
        assert caught.value.file == str(shard)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {"__metadata__": {"x": 1}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        [],
    ],
)
def test_headers_that_lie_are_told(tmp_path, header):
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(UserError, match="damaged"):
        list_tensors(tmp_path)


def test_a_new_header_is_the_one_of_the_library(tmp_path):
    types = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8]
    types += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.bool, torch.int16]
    tensors = {f"{'zyx'[n % 3]}ü{n}": torch.ones(3, n).to(t) for n, t in enumerate(types)}
    tensors["scalar"] = torch.tensor(1.0)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    shard = read_shard(path)
    names = sorted(tensors, key=lambda name: file_order(name, shard.tensors[name].dtype))
    layout = {name: (shard.tensors[name].dtype, shard.tensors[name].shape) for name in names}
    assert encode_header(layout, {"format": "pt"}) == shard.header
