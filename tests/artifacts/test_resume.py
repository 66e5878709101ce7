"""A checkpoint is whole or passed over, and there is never less than one on disk."""

import json
import math
import os
import shutil

import pytest
import torch

from wegeft_cli.artifacts.checkpoint import (
    find_newest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    tidy_checkpoints,
)
from wegeft_cli.errors import MachineError, UserError

# One file of tensors is enough where every operation is tried in turn.
LEAN = ("adapter",)
# What save_checkpoint asks of the disk; a process may die before any of these.
OPERATIONS = ("open", "fsync", "rename", "mkdir", "chmod", "unlink", "rmdir")


def make_tensors(step):
    return {
        "adapter": {"phi": torch.full((3, 2), float(step)), "psi": torch.ones(2, 3)},
        "optimizer": {"phi.exp_avg": torch.zeros(3, 2, dtype=torch.bfloat16)},
        "rng-0": {"cpu": torch.get_rng_state()},
    }


def save(folder, step, keep=2, stems=("adapter", "optimizer", "rng-0")):
    tensors = {stem: make_tensors(step)[stem] for stem in stems}
    return save_checkpoint(
        folder, step, tensors=tensors, state={"step": step, "loss": [0.1]}, keep=keep
    )


def steps_in(folder):
    return sorted(int(path.name[-8:]) for path in folder.glob("step-*"))


def newest_step(folder):
    checkpoint, _ = find_newest_checkpoint(folder)
    assert torch.equal(
        checkpoint.tensors["adapter"]["phi"], make_tensors(checkpoint.step)["adapter"]["phi"]
    )
    return checkpoint.step


def test_what_killed_processes_left_goes_without_a_further_save(tmp_path):
    """But not an old checkpoint that nothing has replaced."""
    folder, kept = tmp_path / "c", tmp_path / "kept"
    tidy_checkpoints(folder)
    shutil.copytree(save(folder, 2), kept)
    save(folder, 2)
    shutil.copytree(kept, folder / ".trash-step-00000002-0a")  # as between two renames
    shutil.copytree(kept, folder / ".trash-step-00000001-0b")
    (folder / ".trash-step-00000001-0b" / "manifest.json").unlink()
    (folder / ".tmp-step-00000003-0c").mkdir()
    tidy_checkpoints(folder)
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    (folder / "step-00000002").rename(folder / ".trash-step-00000002-0d")
    tidy_checkpoints(folder)
    assert newest_step(folder) == 2


def test_it_reads_back_equal(tmp_path, names_in):
    tensors = make_tensors(7)
    state = {"floats": [0.1, 1e-300, math.inf], "big": 2**70, "text": "ü", "none": None, "d": {}}
    path = save_checkpoint(tmp_path / "c", 7, tensors=tensors, state=state, keep=1)
    assert path == tmp_path / "c" / "step-00000007"
    assert names_in(path) == [
        "adapter.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "state.json",
    ]
    loaded = load_checkpoint(path)
    assert loaded.step == 7
    assert loaded.state == state
    assert loaded.tensors.keys() == tensors.keys()
    for stem, values in tensors.items():
        assert loaded.tensors[stem].keys() == values.keys()
        for name, tensor in values.items():
            assert loaded.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[stem][name], tensor)


def test_nan_survives_and_the_loaded_tensors_outlive_their_files(tmp_path):
    path = save_checkpoint(
        tmp_path, 1, tensors=make_tensors(1), state={"loss": math.nan}, keep=None
    )
    loaded = load_checkpoint(path)
    shutil.rmtree(path)
    assert math.isnan(loaded.state["loss"])
    loaded.tensors["adapter"]["phi"].add_(1)
    assert torch.equal(loaded.tensors["adapter"]["phi"], torch.full((3, 2), 2.0))


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {1: "a"}, {"a": [{"b": torch.ones(1)}]}])
def test_a_state_that_json_would_change_is_refused(tmp_path, state, names_in):
    with pytest.raises(TypeError, match="state"):
        save_checkpoint(tmp_path, 1, tensors={}, state=state, keep=None)
    assert names_in(tmp_path) == []


def test_wrong_arguments_are_refused(tmp_path, names_in):
    for arguments in ({"keep": 0}, {"step": -1}, {"tensors": {"../x": {}}}):
        given = {"step": 1, "tensors": {}, "state": {}, "keep": None} | arguments
        with pytest.raises(ValueError, match=r"keep|stem"):
            save_checkpoint(tmp_path, **given)
    assert names_in(tmp_path) == []


def test_rotation_keeps_the_newest(tmp_path, names_in):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep=3)
    assert names_in(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    save(tmp_path, 6, keep=None)
    assert steps_in(tmp_path) == [3, 4, 5, 6]
    save(tmp_path, 7, keep=1)
    assert steps_in(tmp_path) == [7]


def test_protected_steps_stay_beside_the_newest(tmp_path, names_in):
    for step in range(1, 6):
        tensors = make_tensors(step)
        save_checkpoint(tmp_path, step, tensors=tensors, state={}, keep=1, protect=[2, 9])
    assert names_in(tmp_path) == ["step-00000002", "step-00000005"]
    assert find_newest_checkpoint(tmp_path)[0].step == 5
    save_checkpoint(tmp_path, 6, tensors={}, state={}, keep=1, protect=[6])
    assert names_in(tmp_path) == ["step-00000006"]


def test_the_newest_is_the_one_written_last(tmp_path):
    # A user went back to step 10 on purpose: the old future must not win over the new one.
    for step in (10, 20, 30):
        save(tmp_path, step, keep=None)
    save(tmp_path, 15, keep=2)
    assert newest_step(tmp_path) == 15
    assert steps_in(tmp_path) == [15, 30]
    save(tmp_path, 30, keep=2)
    assert newest_step(tmp_path) == 30
    assert steps_in(tmp_path) == [15, 30]


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert find_newest_checkpoint(tmp_path / "none") == (None, [])
    (tmp_path / "step-0").mkdir()
    (tmp_path / "notes").mkdir()
    assert find_newest_checkpoint(tmp_path) == (None, [])
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, remove])
@pytest.mark.parametrize("name", ["adapter.safetensors", "rng-0.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, name):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "step-00000002")
    assert caught.value.file.endswith(name)
    checkpoint, notes = find_newest_checkpoint(tmp_path)
    assert checkpoint.step == 1
    assert len(notes) == 1
    assert "step-00000002" in notes[0]


@pytest.mark.parametrize("damage", [truncate, remove])
def test_a_checkpoint_without_a_whole_manifest_is_passed_over(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "manifest.json"
    path.write_bytes(path.read_bytes().rstrip())
    damage(path)
    checkpoint, notes = find_newest_checkpoint(tmp_path)
    assert checkpoint.step == 1
    assert "step-00000002" in notes[0]
    # It is also the first that rotation lets go.
    save(tmp_path, 3, keep=2)
    assert steps_in(tmp_path) == [1, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"step": "2"},
        {"serial": None},
        {"files": {}},
        {"files": []},
        {"files": {"../state.json": {"size": 1, "sha256": ""}}},
        {"files": {"state.json": {"size": True, "sha256": ""}}},
        {"files": {"state.json": 3}},
    ],
)
def test_a_manifest_that_lies_is_told(tmp_path, change):
    path = save(tmp_path, 2) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "step-00000002")
    assert caught.value.file == str(path)


def test_all_damaged_means_none_with_all_notes(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.json")
    checkpoint, notes = find_newest_checkpoint(tmp_path)
    assert checkpoint is None
    assert len(notes) == 2


class Counter:
    """Lets the first so many operations on the disk through; then does something else."""

    def __init__(self, monkeypatch, num_allowed, then):
        self.num_left = num_allowed
        self.then = then
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, operation):
        def counted(*args, **kwargs):
            self.num_left -= 1
            if self.num_left == -1:
                self.then()
            return operation(*args, **kwargs)

        return counted


def fail():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("second", [2, 1])
def test_a_failure_at_any_operation_loses_nothing(tmp_path, monkeypatch, second, names_in):
    """`second` 1 saves the same step again, which exchanges one folder for another."""
    num_failed = 0
    for num_allowed in range(200):
        folder = tmp_path / str(num_allowed)
        save(folder, 1, keep=1, stems=LEAN)
        with monkeypatch.context() as context:
            counter = Counter(context, num_allowed, fail)
            try:
                save(folder, second, keep=1, stems=LEAN)
            except MachineError:
                num_failed += 1
                assert not [name for name in names_in(folder) if name.startswith(".tmp-")]
        # A save that is done may leave the folder that it replaced; the next one clears it away.
        assert newest_step(folder) in (1, second)
        save(folder, 3, keep=1, stems=LEAN)
        assert names_in(folder) == ["step-00000003"]
        if counter.num_left >= 0:
            break
    else:
        pytest.fail("the loop must reach a save without a failure")
    assert num_failed > 20


# Python 3.12 warns of forks beside threads; the child touches none of torch's.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("second", [2, 1])
def test_a_process_killed_at_any_operation_loses_nothing(tmp_path, monkeypatch, second, names_in):
    num_killed = 0
    for num_allowed in range(200):
        folder = tmp_path / str(num_allowed)
        save(folder, 1, keep=1, stems=LEAN)
        child = os.fork()
        if child == 0:
            Counter(monkeypatch, num_allowed, lambda: os._exit(9))
            save(folder, second, keep=1, stems=LEAN)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        num_killed += code == 9
        assert newest_step(folder) in (1, second)
        save(folder, 3, keep=1, stems=LEAN)
        assert names_in(folder) == ["step-00000003"]
        if code == 0:
            break
    else:
        pytest.fail("the loop must reach a save that nobody killed")
    assert num_killed > 20
