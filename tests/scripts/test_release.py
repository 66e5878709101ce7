"""`make release-check`: what it builds is whole, and each fault of a build is found."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("release_check")


def test_expected_files_are_modules_data_and_recipes(script: ModuleType, repository: Path) -> None:
    expected = script.list_expected(repository)
    assert len(expected) >= 200
    assert {
        "wegeft_cli/py.typed",
        "wegeft_cli/shipped/quickstart.yaml",
        "wegeft_cli/shipped/recipe.schema.json",
        "wegeft_cli/cli/app.py",
    } <= expected
    assert sum(name.endswith(".jinja") for name in expected) >= 2
    assert not any("__pycache__" in name for name in expected)


def test_faults_of_a_wheel_are_found(script: ModuleType) -> None:
    expected = {"wegeft_cli/py.typed", "wegeft_cli/a.py"}
    names = {"wegeft_cli/a.py", "tests/test_a.py", "w-1.dist-info/METADATA"}
    assert script.check_wheel(names, expected) == [
        "the wheel lacks wegeft_cli/py.typed",
        "the wheel contains tests/test_a.py",
        "the wheel lacks its license",
    ]


def test_faults_of_an_sdist_are_found(script: ModuleType) -> None:
    expected = {"wegeft_cli/runs/a.py", "wegeft_cli/shipped/quickstart.yaml"}
    whole = {
        *("wegeft_cli/runs/a.py", "recipes/quickstart.yaml", "pyproject.toml", "setup.py"),
        *("README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"),
    }
    assert script.check_sdist(whole, expected) == []
    spoiled = {*whole, "tests/test_a.py", ".cache/a", "wegeft_cli/__pycache__/a.pyc"}
    assert script.check_sdist(spoiled - {"LICENSE"}, expected) == [
        "the sdist lacks LICENSE",
        "the sdist contains .cache/a",
        "the sdist contains tests/test_a.py",
        "the sdist contains wegeft_cli/__pycache__/a.pyc",
    ]


def test_faults_of_metadata_are_found(script: ModuleType) -> None:
    good = "Name: wegeft-cli\nVersion: 1.0\n\n# wegeft\n\n[paper](https://arxiv.org/abs/1)\n"
    assert script.check_metadata(good, "1.0") == []
    bad = "Name: wegeft-cli\nVersion: 0.9\n\n# other\n\n![picture](docs/images/a.svg)\n"
    assert len(script.check_metadata(bad, "1.0")) == 3


def test_wheels_are_compared_by_content(script: ModuleType, tmp_path: Path) -> None:
    for name, text in (("a.whl", "1"), ("b.whl", "2")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("same.py", "")
            archive.writestr("other.py", text)
            archive.writestr("w.dist-info/RECORD", text)
    faults = script.compare_wheels(tmp_path / "a.whl", tmp_path / "b.whl")
    assert faults == ["the wheel of the sdist differs in other.py"]


@pytest.mark.slow
def test_the_files_of_a_release_pass(repository: Path) -> None:
    pytest.importorskip("build")
    pytest.importorskip("twine")
    command = [sys.executable, "scripts/release_check.py", "--no-install", "--no-isolation"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2
