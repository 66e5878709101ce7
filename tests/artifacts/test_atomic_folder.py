"""One folder in the place of another: a kill at any call leaves one of them, or is healed."""

import ctypes
import errno
import os
from pathlib import Path

import pytest

from wegeft_cli.storage.atomic import atomic_folder, exchange_folders, heal_folder


def fill(folder, text):
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


@pytest.fixture(params=["swap", "two renames"])
def system(request, monkeypatch):
    """With the system's exchange of two names, and without it."""
    if request.param == "two renames":

        def find(*args, **kwargs):
            raise OSError

        monkeypatch.setattr(ctypes, "CDLL", find)
    return request.param


def test_the_new_folder_takes_the_name(tmp_path, system):
    path = fill(tmp_path / "adapter", "old")
    exchange_folders(fill(tmp_path / "temp", "new"), path)
    assert (path / "file").read_text() == "new"
    (trash,) = tmp_path.glob(".trash-adapter-*")
    assert (trash / "file").read_text() == "old"
    assert not (tmp_path / "temp").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_an_empty_place_is_simply_taken(tmp_path, system, is_there):
    path = tmp_path / "adapter"
    if is_there:
        path.mkdir()
    exchange_folders(fill(tmp_path / "temp", "new"), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("num_calls", range(1, 5))
def test_killed_at_any_rename_the_next_start_finds_an_adapter(tmp_path, system, num_calls):
    """As a kill: at the k-th rename everything stops, with no handler run."""
    path = fill(tmp_path / "adapter", "old")
    temp = fill(tmp_path / "temp", "new")
    child = os.fork()
    if child == 0:  # pragma: no cover
        left, rename = num_calls, Path.rename

        def counted(self, target):
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return rename(self, target)

        Path.rename = counted
        exchange_folders(temp, path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    healed = heal_folder(path, ["file"])
    assert (path / "file").read_text() in ("old", "new")
    # Only between two renames is there a moment without the folder.
    assert healed == (system == "two renames" and num_calls == 2)
    assert (os.waitstatus_to_exitcode(status) == 9) == (num_calls <= (2 if system[0] == "t" else 1))


def test_a_fault_puts_the_old_folder_back(tmp_path, monkeypatch):
    def find(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", find)
    path = fill(tmp_path / "adapter", "old")
    with pytest.raises(FileNotFoundError):
        exchange_folders(tmp_path / "no such folder", path)
    assert (path / "file").read_text() == "old"


def test_after_the_swap_no_fault_undoes_it(tmp_path, monkeypatch):
    """What cannot be moved out of the way stays, but never counts as a failure."""
    path = fill(tmp_path / "adapter", "old")
    temp = fill(tmp_path / "temp", "new")
    rename = Path.rename

    def refuse(self, target):
        if Path(target).name.startswith(".trash-"):
            raise OSError(errno.EIO, "no")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        exchange_folders(temp, path)
        assert (path / "file").read_text() == "new"
        assert (temp / "file").read_text() == "old"
        with atomic_folder(path, replace=True) as folder:
            (folder / "file").write_text("newer")
    assert (path / "file").read_text() == "newer"


def test_nothing_to_heal(tmp_path):
    assert not heal_folder(tmp_path / "no" / "adapter", ["file"])
    path = fill(tmp_path / "adapter", "mine")
    fill(tmp_path / ".trash-adapter-1", "old")
    assert not heal_folder(path, ["file"])
    assert (path / "file").read_text() == "mine"
    fill(tmp_path / ".trash-other-1", "half")
    assert not heal_folder(tmp_path / "other", ["file", "another"])


def test_a_folder_replaced_through_the_front_door(tmp_path, system):
    path = fill(tmp_path / "adapter", "old")
    with atomic_folder(path, replace=True) as folder:
        (folder / "file").write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
    assert (path / "file").read_text() == "new"
