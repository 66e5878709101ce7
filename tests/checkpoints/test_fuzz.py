"""Random damage either does no harm or is a UserError, and nothing else."""

import json
import random
import shutil

import pytest

from wegeft_cli.checkpoints.adapter import load_adapter_files
from wegeft_cli.checkpoints.fingerprint import fingerprint_base
from wegeft_cli.checkpoints.resume import load_checkpoint, save_checkpoint
from wegeft_cli.errors import UserError

NUM_DAMAGES = 300
ODD_VALUES = [None, True, -1, 0, 1e999, 10**400, "", "../x", "\ud800", "\0", [], {}, [[]], [0, -1]]


def damage_bytes(random_, data):
    data = bytearray(data)
    for _ in range(random_.randint(1, 3)):
        place = random_.randrange(len(data))
        kind = random_.randrange(4)
        if kind == 0:
            data[place] ^= 1 << random_.randrange(8)
        elif kind == 1:
            data[place] = random_.randrange(256)
        elif kind == 2:
            del data[place : place + random_.randint(1, 9)]
        else:
            data[place:place] = random_.randbytes(random_.randint(1, 9))
        if not data:
            return b""
    return bytes(data if random_.random() < 0.8 else data[: random_.randrange(len(data))])


def damage_json(random_, value):
    """Change one place of a JSON value: drop it, rename it, or put something odd there."""
    if isinstance(value, dict) and value:
        key = random_.choice(list(value))
        if random_.random() < 0.5:
            return value | {key: damage_json(random_, value[key])}
        rest = {name: item for name, item in value.items() if name != key}
        return rest if random_.random() < 0.5 else rest | {f"{key}x": value[key]}
    if isinstance(value, list) and value and random_.random() < 0.7:
        place = random_.randrange(len(value))
        return [*value[:place], damage_json(random_, value[place]), *value[place + 1 :]]
    return random_.choice(ODD_VALUES)


def damage(random_, data, num_header):
    """Damage a JSON file, or the header of a safetensors file (`num_header` bytes after 8)."""
    if random_.random() < 0.5:
        return damage_bytes(random_, data)
    if num_header is None:
        return json.dumps(damage_json(random_, json.loads(data))).encode()
    header = json.dumps(damage_json(random_, json.loads(data[8 : 8 + num_header]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + num_header :]


@pytest.fixture
def checkpoint_dir(tmp_path, factors):
    tensors = {"adapter": {"phi": factors["q_proj"][0]}}
    return save_checkpoint(tmp_path / "c", 1, tensors=tensors, state={"a": [1]}, keep=None)


@pytest.mark.parametrize(
    ("fixture", "pattern", "load"),
    [
        ("adapter_dir", "adapter_config.json", load_adapter_files),
        ("adapter_dir", "*.safetensors", load_adapter_files),
        ("base_dir", "*.safetensors", fingerprint_base),
        ("sharded_dir", "*.index.json", fingerprint_base),
        ("checkpoint_dir", "manifest.json", load_checkpoint),
        ("checkpoint_dir", "state.json", load_checkpoint),
        ("checkpoint_dir", "*.safetensors", load_checkpoint),
    ],
)
def test_damage_is_told_or_does_no_harm(request, tmp_path, fixture, pattern, load):
    folder = shutil.copytree(request.getfixturevalue(fixture), tmp_path / "damaged")
    paths = sorted(folder.glob(pattern))
    assert len(paths) == 1
    data = paths[0].read_bytes()
    is_tensors = paths[0].suffix == ".safetensors"
    num_header = int.from_bytes(data[:8], "little") if is_tensors else None
    random_ = random.Random(0)
    num_told = 0
    for _ in range(NUM_DAMAGES):
        paths[0].write_bytes(damage(random_, data, num_header))
        try:
            load(folder)
        except* UserError as group:
            num_told += 1
            for fault in group.exceptions:
                str(fault).encode("utf-8")
    assert num_told > NUM_DAMAGES / 2
    paths[0].write_bytes(data)
    load(folder)
