"""Files and folders appear whole or not at all, and the disk's errors are told once."""

import errno
import os
import resource
import shutil
import stat
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wegeft_cli.errors import MachineError, UserError, cut_text, disk_errors
from wegeft_cli.storage.atomic import (
    atomic_file,
    atomic_folder,
    check_free_space,
    hash_bytes,
    remove_leftover_files,
    remove_leftovers,
    save_tensors_atomic,
    write_bytes_atomic,
    write_text_atomic,
)
from wegeft_cli.storage.json_files import shorten
from wegeft_cli.storage.sizes import format_size


@contextmanager
def full_disk(num_bytes):
    """A real error from the system once a file grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def umask(mask):
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def leave_half(path, error):
    path.write_text("half")
    raise error


def test_text_and_bytes_replace_what_was_there(tmp_path, names_in):
    path = tmp_path / "deep" / "file.txt"
    write_text_atomic(path, "one")
    write_text_atomic(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü"
    write_bytes_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert names_in(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, names_in, error):
    path = tmp_path / "file"
    write_text_atomic(path, "old")
    with pytest.raises(error), atomic_file(path) as temp:
        leave_half(temp, error)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    write_text_atomic(tmp_path / "link", "new")
    assert (tmp_path / "other").read_text() == "mine"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path, mask, mode):
    with umask(mask):
        save_tensors_atomic(tmp_path / "a.safetensors", {"x": torch.ones(2)})
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "b").write_text("b")
            (folder / "sub" / "b").chmod(0o600)
    for name in ("a.safetensors", "folder/sub/b"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_tensors_come_back_equal_and_may_share_memory(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "turned": whole.t(), "row": whole[1], "none": torch.empty(0, 3)}
    save_tensors_atomic(tmp_path / "t.safetensors", tensors)
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_a_full_disk_is_a_machine_error_and_leaves_nothing(tmp_path, names_in):
    with full_disk(1000), pytest.raises(MachineError, match="File too large"):
        save_tensors_atomic(tmp_path / "t.safetensors", {"x": torch.ones(1000)})
    with full_disk(1000), pytest.raises(MachineError, match="File too large"):
        write_bytes_atomic(tmp_path / "b", bytes(2000))
    with (
        full_disk(1000),
        pytest.raises(MachineError, match="File too large"),
        atomic_folder(tmp_path / "folder") as folder,
    ):
        (folder / "large").write_bytes(bytes(2000))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, MachineError),
        (errno.EROFS, MachineError),
        (errno.EIO, MachineError),
        (errno.EACCES, UserError),
        (errno.ENOTDIR, UserError),
    ],
)
def test_errors_of_the_system_are_sorted(tmp_path, code, kind):
    with pytest.raises(UserError) as caught, disk_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is kind
    assert caught.value.file == str(tmp_path)
    assert os.strerror(code) in caught.value.message


def test_a_path_through_a_file_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        write_text_atomic(tmp_path / "file" / "below", "text")
    assert not isinstance(caught.value, MachineError)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_is_whole_or_not_there(tmp_path, names_in, error):
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        leave_half(folder / "half", error)
    assert names_in(tmp_path) == []
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("whole")
        assert names_in(tmp_path / "out") == []
    assert names_in(tmp_path / "out") == ["whole"]
    assert names_in(tmp_path) == ["out"]


def test_a_full_destination_is_refused_or_replaced(tmp_path, names_in):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(UserError, match="not empty"), atomic_folder(tmp_path / "out"):
        pytest.fail("the body must not run")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", replace=True):
        raise RuntimeError
    assert names_in(tmp_path / "out") == ["old"]
    with atomic_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").write_text("new")
    assert names_in(tmp_path / "out") == ["new"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file exists"), atomic_folder(tmp_path / "file"):
        pytest.fail("the body must not run")
    assert names_in(tmp_path) == ["file", "out"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, names_in):
    (tmp_path / ".tmp-out-dead").mkdir()
    (tmp_path / ".tmp-out-dead" / "file").write_text("half")
    with atomic_folder(tmp_path / "out") as folder:
        assert names_in(tmp_path) == [folder.name]
        remove_leftovers(tmp_path, ".tmp-")
        (folder / "file").write_text("whole")
    assert names_in(tmp_path) == ["out"]


def test_files_that_a_killed_process_left_go_by_their_name(tmp_path, names_in):
    mine = [".tmp-0123abcd-run.json", ".tmp-ffffffff-run.json"]
    others = [
        "run.json",
        ".tmp-0123abcd-other.json",
        ".tmp-xyz-run.json",
        ".tmp-0123abcd-my-run.json",
    ]
    for name in (*mine, *others):
        (tmp_path / name).touch()
    remove_leftover_files(tmp_path, ["run.json", "none.json"])
    assert set(names_in(tmp_path)) == set(others)


def test_an_old_temporary_file_that_no_process_holds_is_removed(tmp_path, names_in):
    old, new, other = ".tmp-0123abcd-out.json", ".tmp-ffffffff-out.json", ".tmp-0123abcd-b.json"
    for name in (old, new, other):
        (tmp_path / name).write_text("half")
    long_ago = time.time() - 3600
    for name in (old, other):
        os.utime(tmp_path / name, (long_ago, long_ago))
    with atomic_file(tmp_path / "out.json") as temp:
        temp.write_text("first")
        os.utime(temp, (long_ago, long_ago))
        write_text_atomic(tmp_path / "out.json", "second")
        assert temp.exists()  # its process holds it
    assert (tmp_path / "out.json").read_text() == "first"
    assert names_in(tmp_path) == sorted([new, other, "out.json"])


def test_free_space_is_checked_before_the_work(tmp_path):
    check_free_space(tmp_path / "not" / "yet", 1, "a byte")
    with pytest.raises(MachineError, match=r"GiB are needed for a world, and .* GiB are free"):
        check_free_space(tmp_path / "not" / "yet", 2**60, "a world")


def test_a_file_system_without_room_is_told_as_such():
    with pytest.raises(MachineError, match="the file system at /proc has no room for files"):
        check_free_space(Path("/proc/x"), 1, "a byte")


def test_a_small_need_is_not_told_as_nothing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(MachineError, match=r"1\.0 MiB are needed for it, and 0 B are free"):
        check_free_space(tmp_path, 2**20, "it")


def test_hash_of_a_stretch_and_of_a_file_that_ends_early(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"xabcx")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_bytes(path, 1, 3) == abc
    path.write_bytes(b"abc")
    assert hash_bytes(path) == abc
    with pytest.raises(UserError, match="ends too early"):
        hash_bytes(path, 1, 3)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (0.002 * 2**30, "2.0 MiB"),
        (2**29, "512.0 MiB"),
        (1.25 * 2**30, "1.25 GiB"),
        (2**42, "4096.00 GiB"),
    ],
)
def test_sizes_have_the_unit_in_which_they_are_at_least_one(num_bytes, text):
    assert format_size(num_bytes) == text


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("short", 5, "short"),
        ("several words of a text", 20, "several words of..."),
        ("several words of it", 18, "several words..."),
        ("several words of", 15, "several..."),
        ("a" * 30, 10, "aaaaaaa..."),
        ("an " + "a" * 30, 20, "an aaaaaaaaaaaaaa..."),
    ],
)
def test_a_message_shows_whole_words_of_a_long_text(text, limit, cut):
    assert cut_text(text, limit) == cut
    assert shorten(text, limit=limit + 2).strip("'").startswith(cut.removesuffix("...")[:8])
