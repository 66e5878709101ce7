"""A streamed merge equals the merge in memory bit for bit, and is whole or not there."""

import json
import os
import shutil
from concurrent.futures import Future
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.merging import streaming as stream
from wegeft_cli.storage.safetensors_reader import BLOCK_BYTES, StoredModel, block_rows
from wegeft_cli.storage.safetensors_writer import parse_size

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
ROWS = 5  # cuts 16 rows into blocks of unequal size


def merge_stream(folder, *args, **options):
    return stream.merge_stream(StoredModel(folder), *args, **options)


class AddProduct:
    """W + scale (W phi) psi, row by row: what a merge of generators does."""

    def __init__(self, width, rows=ROWS):
        generator = torch.Generator().manual_seed(width)
        self.phi = torch.randn(width, 2, generator=generator)
        self.psi = torch.randn(2, width, generator=generator)
        self.rows = rows
        self.seen = []

    def rows_at_once(self, shape):
        return self.rows

    def __call__(self, block, start_row):
        self.seen.append((start_row, tuple(block.shape), block.dtype))
        # Sums written out: a matrix product may round differently for other numbers of rows.
        inner = (block.unsqueeze(-1) * self.phi.to(block.dtype)).sum(1)
        return block + 2 * (inner.unsqueeze(-1) * self.psi.to(block.dtype)).sum(1)


@pytest.fixture
def edits():
    return {QUERY: AddProduct(16), DOWN: AddProduct(24)}


def load_folder(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def merge_in_memory(folder, edits, dtype=None):
    tensors = load_folder(folder)
    for name, edit in edits.items():
        exact = tensors[name] if tensors[name].dtype == torch.float64 else tensors[name].float()
        tensors[name] = edit(exact, 0).to(dtype or tensors[name].dtype)
    return tensors if dtype is None else {name: t.to(dtype) for name, t in tensors.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert len(left) > 0
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_equals_the_merge_in_memory_to_the_byte(make_base, tmp_path, edits, dtype):
    base = make_base(dtype=dtype)
    report = merge_stream(base, tmp_path / "out", edits)
    save_file(merge_in_memory(base, edits), tmp_path / SINGLE, metadata={"format": "pt"})
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / SINGLE).read_bytes()
    assert report.num_edited == 2
    assert report.num_tensors == len(load_folder(base))
    assert report.num_bytes == sum(t.nbytes for t in load_folder(base).values())


class LateExecutor:
    """Runs each task when its result is asked for: as late as a slow disk can be."""

    def __init__(self, max_workers):
        assert max_workers == 1  # more could write blocks in another order

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        future.result = lambda: function(*args)
        return future


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slow_disk_writes_the_blocks_as_they_were(make_base, tmp_path, edits, monkeypatch, dtype):
    base = make_base(dtype=torch.float32)  # once tensors are copied, once all are converted
    monkeypatch.setattr(stream, "_COPY_BYTES", 100)
    merge_stream(base, tmp_path / "fast", edits, dtype=dtype)
    monkeypatch.setattr(stream, "ThreadPoolExecutor", LateExecutor)
    merge_stream(base, tmp_path / "slow", edits, dtype=dtype)
    expected = merge_in_memory(base, edits, getattr(torch, dtype))
    assert_same(load_folder(tmp_path / "fast"), expected)
    assert_same(load_folder(tmp_path / "slow"), expected)


def test_shards_index_and_other_files_stay(sharded_dir, tmp_path, edits, hash_folder, names_in):
    before = hash_folder(sharded_dir)
    merge_stream(sharded_dir, tmp_path / "out", edits)
    assert hash_folder(sharded_dir) == before
    assert_same(load_folder(tmp_path / "out"), merge_in_memory(sharded_dir, edits))
    assert names_in(tmp_path) == ["out"]
    after = hash_folder(tmp_path / "out")
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    weight_map = json.loads((sharded_dir / INDEX).read_text())["weight_map"]
    assert changed == {weight_map[QUERY], weight_map[DOWN]}


def test_transformers_loads_the_result(sharded_dir, tmp_path, edits):
    merge_stream(sharded_dir, tmp_path / "out", edits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = merge_in_memory(sharded_dir, edits)
    assert_same({name: model.state_dict()[name] for name in expected}, expected)


def test_tied_embeddings_stay_tied_and_the_head_is_not_there_to_edit(make_base, tmp_path, edits):
    base = make_base(tied=True)
    with pytest.raises(UserError, match=r"no tensor lm_head\.weight"):
        merge_stream(base, tmp_path / "out", {"lm_head.weight": AddProduct(16)})
    merge_stream(base, tmp_path / "out", edits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.state_dict()[QUERY], merge_in_memory(base, edits)[QUERY])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_type_for_all(sharded_dir, tmp_path, edits, dtype):
    merge_stream(sharded_dir, tmp_path / "out", edits, dtype=dtype)
    expected = merge_in_memory(sharded_dir, edits, getattr(torch, dtype))
    assert_same(load_folder(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    index, old = (json.loads((f / INDEX).read_text()) for f in (tmp_path / "out", sharded_dir))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert index["weight_map"] == old["weight_map"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)


def test_another_type_gives_the_librarys_bytes(base_dir, tmp_path):
    merge_stream(base_dir, tmp_path / "out", {}, dtype="bfloat16")
    cast = {name: tensor.bfloat16() for name, tensor in load_folder(base_dir).items()}
    save_file(cast, tmp_path / SINGLE, metadata={"format": "pt"})
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / SINGLE).read_bytes()


def test_the_type_in_configs_of_parts(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}, base / SINGLE)
    config = {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32"},
        "quantization_config": {"dtype": "float32"},
    }
    (base / "config.json").write_text(json.dumps(config))
    merge_stream(base, tmp_path / "out", {}, dtype="float16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "torch_dtype": "float16",
        "text_config": {"dtype": "float16"},
        "quantization_config": {"dtype": "float32"},
    }
    assert load_file(tmp_path / "out" / SINGLE)["n"].dtype == torch.int64


@pytest.mark.parametrize(("num_bytes", "is_one"), [(6000, False), (1, False), (10**9, True)])
def test_new_shards(sharded_dir, tmp_path, edits, num_bytes, is_one):
    merge_stream(sharded_dir, tmp_path / "out", edits, max_shard_bytes=num_bytes)
    assert_same(load_folder(tmp_path / "out"), merge_in_memory(sharded_dir, edits))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out" / INDEX).exists() != is_one
    assert (len(files) == 1) == is_one
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= num_bytes
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_memory_is_bounded_by_the_blocks(tmp_path):
    assert block_rows((10**6, 4096)) * 4096 * 4 == BLOCK_BYTES
    assert block_rows((10, 10**9)) == 1
    assert block_rows((7,)) * 4 == BLOCK_BYTES
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.ones(17, 8, dtype=torch.float16), "s": torch.tensor(2.0)}, base / SINGLE)
    edit, whole = AddProduct(8, rows=4), AddProduct(8, rows=10**9)
    merge_stream(base, tmp_path / "out", {"w": edit})
    assert edit.seen == [
        (start, (4 if start < 16 else 1, 8), torch.float32) for start in range(0, 17, 4)
    ]
    merge_stream(base, tmp_path / "whole", {"w": whole})
    assert whole.seen == [(0, (17, 8), torch.float32)]
    assert_same(load_folder(tmp_path / "out"), load_folder(tmp_path / "whole"))


def test_casts_are_cut_into_blocks_too(base_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("wegeft_cli.storage.safetensors_reader.BLOCK_BYTES", 100)
    monkeypatch.setattr(stream, "_COPY_BYTES", 100)
    steps = []
    merge_stream(
        base_dir,
        tmp_path / "out",
        {},
        dtype="float16",
        on_progress=lambda *step: steps.append(step),
    )
    merge_stream(base_dir, tmp_path / "raw", {})
    done = [0] + [num_done for num_done, _ in steps]
    assert max(b - a for a, b in pairwise(done)) <= 50
    assert steps[-1][0] == steps[-1][1] == sum(t.nbytes for t in load_folder(base_dir).values()) / 2
    assert_same(load_folder(tmp_path / "raw"), load_folder(base_dir))


def test_single_numbers_vectors_and_empty_tensors(tmp_path):
    class Double:
        def rows_at_once(self, shape):
            return 2

        def __call__(self, block, start_row):
            return 2 * block

    base = tmp_path / "base"
    base.mkdir()
    tensors = {
        "scalar": torch.tensor(1.5),
        "bias": torch.arange(5.0),
        "none": torch.empty(0, 4),
        "flat": torch.empty(4, 0),
        "conv": torch.arange(24.0).reshape(3, 2, 2, 2),
        "ids": torch.arange(4),
    }
    save_file(tensors, base / SINGLE)
    edits = {name: Double() for name in tensors if name != "ids"}
    merge_stream(base, tmp_path / "out", edits)
    doubled = {name: tensor if name == "ids" else 2 * tensor for name, tensor in tensors.items()}
    assert_same(load_folder(tmp_path / "out"), doubled)
    merge_stream(base, tmp_path / "cast", {}, dtype="float16")
    assert load_folder(tmp_path / "cast")["flat"].shape == (4, 0)


def test_only_what_belongs_to_the_model_is_copied(base_dir, tmp_path, names_in):
    base = shutil.copytree(base_dir, tmp_path / "base")
    for name in ("pytorch_model.bin", "x.gguf", "tf_model.h5", "consolidated.safetensors", "a.pt"):
        (base / name).write_bytes(b"weights")
    for name in ("onnx", "original", ".cache", "1_Pooling"):
        (base / name).mkdir()
        (base / name / "config.json").write_text("{}")
    (base / "model.fp32.safetensors.index.json").write_text("{}")
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    (secret / "file").write_text("secret")
    (base / "loop").symlink_to(base)
    (base / "linked_folder").symlink_to(secret)
    (base / "LICENSE").symlink_to(secret / "file")
    (base / "dangling").symlink_to(tmp_path / "none")
    os.mkfifo(base / "pipe")
    with pytest.raises(UserError, match="leads out of its folder") as caught:
        merge_stream(base, tmp_path / "out", {})
    assert caught.value.file == str(base / "LICENSE")
    assert names_in(tmp_path) == ["base", "elsewhere"]
    (base / "LICENSE").unlink()
    (base / "terms").write_text("terms")
    (base / "LICENSE").symlink_to("terms")
    merge_stream(base, tmp_path / "out", {}, texts={"terms": "ours"})
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert (tmp_path / "out" / "terms").read_text() == "ours"
    assert names_in(tmp_path / "out") == sorted(
        [
            "1_Pooling",
            "LICENSE",
            "config.json",
            "generation_config.json",
            SINGLE,
            "terms",
            "tokenizer.json",
        ]
    )
    for place in (base, base / "1_Pooling"):
        (place / "stolen").symlink_to(secret / "file")
        with pytest.raises(UserError, match="leads out of its folder"):
            merge_stream(base, tmp_path / "second", {})
        assert not (tmp_path / "second").exists()
        (place / "stolen").unlink()


@pytest.mark.parametrize("kind", ["file", "index", "shard", "other repository"])
def test_no_weights_are_read_from_outside_the_folder(base_dir, sharded_dir, tmp_path, kind):
    is_sharded = kind in ("index", "shard")
    folder = tmp_path / "hub" / "models--a--b" / "snapshots" / "abc"
    base = shutil.copytree(sharded_dir if is_sharded else base_dir, folder)
    names = {"index": INDEX, "shard": next(base.glob("model-00002*")).name} if is_sharded else {}
    path = base / names.get(kind, SINGLE)
    elsewhere = tmp_path / "hub" / "models--c--d" / "blobs" / "x"
    elsewhere.parent.mkdir(parents=True)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(UserError, match="leads out of its folder") as caught:
        merge_stream(base, tmp_path / "out", {})
    assert caught.value.file == str(path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x.bin", "", None, 3,
     "a\\b.safetensors", "a\0.safetensors"],
)  # fmt: skip
def test_a_shards_name_cannot_lead_elsewhere(sharded_dir, tmp_path, name):
    base = shutil.copytree(sharded_dir, tmp_path / "base")
    save_file({QUERY: torch.zeros(16, 16)}, tmp_path / "secret.safetensors")
    index = json.loads((base / INDEX).read_text())
    index["weight_map"][QUERY] = name
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="is no name of a safetensors file in this folder"):
        merge_stream(base, tmp_path / "out", {})


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2 * 2**30), ("300", 300), ("7KB", 7000)],
)
def test_sizes_are_read(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "big", "-5GB", "0GB", "5XB", "1e9"])
def test_what_is_no_size_is_told(text):
    with pytest.raises(UserError, match="is no size"):
        parse_size(text)


def test_a_hub_cache_is_read_through_its_links(sharded_dir, tmp_path, edits, hash_folder):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded_dir.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    merge_stream(snapshot, tmp_path / "out", edits)
    merge_stream(sharded_dir, tmp_path / "plain", edits)
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_failing_edit_leaves_nothing(sharded_dir, tmp_path, names_in):
    class Broken(AddProduct):
        def __call__(self, block, start_row):
            if start_row > 0:
                raise KeyboardInterrupt
            return super().__call__(block, start_row)

    with pytest.raises(KeyboardInterrupt):
        merge_stream(sharded_dir, tmp_path / "out", {DOWN: Broken(24)})
    assert names_in(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(sharded_dir, tmp_path, edits, names_in, hash_folder):
    before = hash_folder(sharded_dir)

    def fill(num_done, num_all):
        if num_done > num_all / 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(MachineError, match="No space left"):
        merge_stream(sharded_dir, tmp_path / "out", edits, on_progress=fill)
    assert names_in(tmp_path) == []
    assert hash_folder(sharded_dir) == before


def test_too_little_space_is_found_before_anything_is_written(
    base_dir, tmp_path, edits, names_in, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MachineError, match="are needed for the merged model"):
        merge_stream(base_dir, tmp_path / "out", edits)
    assert names_in(tmp_path) == []
    assert edits[QUERY].seen == []


def test_unknown_names_get_their_neighbours(base_dir, tmp_path):
    wrong = {QUERY.replace("q_proj", "g_proj"): AddProduct(16), "zzz": AddProduct(16)}
    with pytest.raises(ExceptionGroup) as caught:
        merge_stream(base_dir, tmp_path / "out", wrong)
    assert QUERY in caught.value.exceptions[0].hint
    assert len(caught.value.exceptions) == 2


def test_a_quantised_base_is_refused(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    tensors = {"a": torch.ones(4, 4, dtype=torch.uint8), "b": torch.ones(4).to(torch.float8_e5m2)}
    save_file(tensors, base / SINGLE)
    for name, stored in (("a", "U8"), ("b", "F8_E5M2")):
        with pytest.raises(UserError, match=f"stored as {stored}: a quantized base"):
            merge_stream(base, tmp_path / "out", {name: AddProduct(4)})
    merge_stream(base, tmp_path / "out", {}, dtype="float16")
    assert load_file(tmp_path / "out" / SINGLE)["b"].dtype == torch.float8_e5m2


def test_values_that_do_not_fit_are_told(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.tensor([1.0, 1e5])}, base / SINGLE)
    with pytest.raises(UserError, match="w gets values that are not finite in F16"):
        merge_stream(base, tmp_path / "out", {}, dtype="float16")
    merge_stream(base, tmp_path / "out", {}, dtype="bfloat16")


def test_wrong_folders_and_types_are_refused(base_dir, tmp_path, edits, names_in):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither"):
        merge_stream(tmp_path / "empty", tmp_path / "out", edits)
    with pytest.raises(UserError, match="no such folder"):
        merge_stream(tmp_path / "none", tmp_path / "out", edits)
    with pytest.raises(UserError, match="outside"):
        merge_stream(base_dir, base_dir / "merged", edits)
    with pytest.raises(UserError, match="outside"):
        merge_stream(base_dir, base_dir, edits)
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        merge_stream(base_dir, tmp_path / "out", edits, dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        merge_stream(base_dir, tmp_path / "full", edits)
    assert names_in(tmp_path) == ["empty", "full"]
    with pytest.raises(ValueError, match="block"):
        merge_stream(base_dir, tmp_path / "out", {QUERY: AddProduct24()})


class AddProduct24(AddProduct):
    """An edit of a programmer who forgot the shape."""

    def __init__(self):
        super().__init__(16)

    def __call__(self, block, start_row):
        return block[:, :3]
