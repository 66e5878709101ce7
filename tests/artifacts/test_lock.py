"""One process at a time works in a folder, and a dead one is not in the way."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.storage.lock import LOCK_NAME, lock_folder


def test_a_locked_folder_names_its_holder(tmp_path):
    run_dir = tmp_path / "run"
    with lock_folder(run_dir):
        with pytest.raises(UserError, match=f"process {os.getpid()} on ") as caught:
            lock_folder(run_dir).__enter__()
        assert LOCK_NAME in str(caught.value.hint)
    with lock_folder(run_dir):
        pass


def test_a_lock_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / LOCK_NAME)
    with pytest.raises(UserError, match="not a regular file"), lock_folder(tmp_path):
        pass


def test_the_lock_goes_with_a_failed_body(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock_folder(tmp_path):
        raise KeyboardInterrupt
    assert (tmp_path / LOCK_NAME).read_bytes() == b""
    with lock_folder(tmp_path):
        assert (tmp_path / LOCK_NAME).read_bytes() != b""


def test_another_process_is_kept_out_and_a_killed_one_is_not_in_the_way(tmp_path):
    program = """
        import sys, pathlib
        from wegeft_cli.storage.lock import lock_folder
        with lock_folder(pathlib.Path(sys.argv[1])):
            print("locked", flush=True)
            sys.stdin.read()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on "):
            lock_folder(tmp_path).__enter__()
        holder.kill()
    assert str(holder.pid).encode() in (tmp_path / LOCK_NAME).read_bytes()
    with lock_folder(tmp_path):
        assert str(os.getpid()).encode() in (tmp_path / LOCK_NAME).read_bytes()


@pytest.mark.parametrize("code", [None, errno.ENOLCK])
def test_without_a_working_flock_the_file_decides(tmp_path, monkeypatch, code):
    # Network file systems: flock grants everything (None) or is not there at all.
    def flock(descriptor, flags):
        if code is not None:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with sleeper:
        monkeypatch.setattr("os.getpid", lambda: sleeper.pid)
        with lock_folder(tmp_path):
            monkeypatch.undo()
            monkeypatch.setattr("fcntl.flock", flock)
            with pytest.raises(UserError, match=f"process {sleeper.pid} on "):
                lock_folder(tmp_path).__enter__()
            text = (tmp_path / LOCK_NAME).read_text()
        sleeper.kill()
    (tmp_path / LOCK_NAME).write_text(text)
    with lock_folder(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text() != text
